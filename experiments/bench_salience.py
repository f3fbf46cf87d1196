"""Salience maps: what 4,000 of them cost, beside the adversarial training that uses them.

    python -m experiments.bench_salience                  # two networks, minutes on 2 cores
    python -m experiments.bench_salience --preset smoke   # seconds

Every source scores the whole training set in one compiled pass; the maps are then kept on disk by
example. All sources and a training step with its PGD are timed in turn in one process. The share is
that of one pass, map making and writing included, in a training of so many epochs.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxrobust as jr
from experiments import common, records, timing
from experiments.sipat import source_of
from experiments.sipat_settings import PROBLEMS, Problem
from jaxrobust import salience, sipat, training

NAME = "bench_salience"
TRAINING = "training step"
CACHE = "maps from the cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed."""

    problems: Mapping[str, Problem] = dataclasses.field(default_factory=lambda: PROBLEMS)
    sources: tuple[str, ...] = (
        "gradient", "smooth_grad", "integrated_gradients", "grad_cam", "layer_cam", "rise",
    )  # fmt: skip
    images: int = 4000
    attack_steps: int = 5
    area: float = 0.2
    repeats: int = 5
    seconds: float = 120.0


PRESETS = {
    "full": Config(),
    "smoke": Config(
        problems={"mnist5k": PROBLEMS["mnist5k"]}, sources=("gradient", "grad_cam"), images=64,
        attack_steps=1, repeats=2,
    ),
}  # fmt: skip


def runners(problem: Problem, config: Config, folder: Path, options) -> dict[str, Callable]:
    """Every source on all images, the cache, and a training step that spares a map."""
    examples = jr.data.load(problem.dataset, problem.train_split)
    images, labels, indices = (
        part[: config.images] for part in (examples.images, examples.labels, examples.indices)
    )
    model = jr.models.build(**problem.model)
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0), images.shape[1:]))

    def maps_by(method):
        scores = salience.compute(
            method, model.apply, variables, images, labels, key=jax.random.key(0)
        )
        return salience.top_fraction(scores, config.area)

    methods = {name: source_of(name, problem) for name in config.sources}
    runs = {
        name: lambda method=method: jax.block_until_ready(maps_by(method))
        for name, method in methods.items()
    }
    made = np.asarray(runs[config.sources[0]]())
    settings = salience.made_by(methods[config.sources[0]], variables, dataset=problem.dataset)
    runs[CACHE] = lambda: salience.cached(folder, settings, indices, lambda rows: made[rows])
    batch = {"image": images, "label": labels, "index": indices, "salience": made}
    batch = {name: column[: problem.batch_size] for name, column in batch.items()}
    runs[TRAINING] = step_of(model, problem, config, batch, options)
    return runs


def step_of(model, problem: Problem, config: Config, batch: dict, options) -> Callable[[], float]:
    """A function that takes one training step of SIP-AT and waits for it."""
    mesh = common.mesh_for(options, len(batch["label"]))
    optimizer = training.sgd(0.01)
    attack = jr.linf_pgd(problem.eps, steps=config.attack_steps)
    objective = sipat.salience_preserving(training.adversarial(attack))
    shape = batch["image"].shape[1:]
    state = jr.parallel.create(
        lambda: training.create_state(model, optimizer, jax.random.key(0), shape), mesh
    )
    run = jr.parallel.data_parallel(training.train_step(model, optimizer, objective), mesh)
    batch = jr.parallel.shard_batch(batch, mesh)

    def once():
        nonlocal state
        state, metrics = run(state, batch)
        return float(metrics["loss"])

    return once


def writing(problem: Problem, config: Config, folder: Path) -> float:
    """Seconds that it takes to write the maps to the cache."""
    shape = jr.data.load(problem.dataset, problem.train_split).images.shape[1:3]
    maps = np.random.default_rng(0).integers(0, 2, (config.images, *shape, 1)).astype(np.float32)
    begun = time.perf_counter()
    salience.cached(folder, {"written": problem.dataset}, np.arange(len(maps)), lambda rows: maps)
    return time.perf_counter() - begun


def table(cells: list[dict[str, Any]]) -> str:
    """Seconds and shares, as Markdown."""
    rows = []
    for cell in cells:
        figures, key = cell["metrics"], cell["key"]
        share = figures.get("share_of_training")
        shown = "" if share is None else common.percent(share, 2)
        seconds = f"{figures['seconds_median']:.4f}"
        rows.append([key["dataset"], key["what"], seconds, shown])
    return common.markdown(["data set", "what", "seconds", "% of training"], rows)


def main(config: Config, options) -> None:
    """Times and writes."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = options.out / f"{NAME}-{options.preset if options.preset == 'smoke' else kind}.json"
    path.unlink(missing_ok=True)
    results = records.Results(path, NAME, options.preset, config)
    for name, problem in config.problems.items():
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            runs = runners(problem, config, Path(folder), options)
            timed = timing.interleaved(runs, repeats=config.repeats, seconds=config.seconds)
            written = writing(problem, config, Path(folder))
        steps = problem.epochs * -(-config.images // problem.batch_size)
        whole = steps * timed[TRAINING]["seconds_median"]
        for what, figures in timed.items():
            extra = {"images": config.images}
            if what == TRAINING:
                extra = {"images": problem.batch_size, "training_seconds": whole}
            elif what == CACHE:
                extra["share_of_training"] = figures["seconds_median"] / whole
            else:
                spent = figures["seconds_median"] + written
                extra |= {"write_seconds": written, "share_of_training": spent / whole}
            results.add(
                {"dataset": name, "what": what}, {**figures, **extra}, time.monotonic() - begun
            )
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    print(table(results.cells))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS, default="full")
    main(PRESETS[chosen.preset], chosen)
