"""What a pre-processor costs: to train, beside adversarial training of its model, and to use.

    python -m experiments.bench_cropd                  # the laptop preset's networks; minutes
    python -m experiments.bench_cropd --preset smoke   # seconds

One training step of each row of the CRoPD experiment, in turn in one process and on one device, so
that seconds can be compared; in the experiment's table they may come from several machines. Each
step is multiplied by the steps of its training: a pre-processor's are those of the preset, and
adversarial fine-tuning is counted by the epoch, since its validation ends it. Then the forward
pass of the bare and of the defended models, likewise in turn: what each adds to one image, and to
64 at once.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrobust as jr
from experiments import common, cropd, plots, records, timing
from experiments import cropd_settings as settings
from jaxrobust import models, training

NAME = "bench_cropd"
RIVAL, BARE = "aff", "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed."""

    preset: settings.Config = settings.PRESETS["laptop"]
    datasets: tuple[str, ...] = ("emoji", "mnist5k")
    methods: tuple[str, ...] = (
        "recommended", "gaussian_dae", "autoencoder", "reported", "alf", RIVAL
    )  # fmt: skip
    fronts: tuple[str, ...] = ("recommended", "jpeg", "total_variation")
    batches: tuple[int, ...] = (1, 64)
    repeats: int = 15  # of a step; of a forward pass `passes`
    passes: int = 60
    seconds: float = 120.0


PRESETS = {
    "full": Config(),
    "smoke": Config(
        preset=dataclasses.replace(
            settings.PRESETS["smoke"],
            methods={name: settings.METHODS[name] for name in ("none", "recommended", RIVAL)},
            rival_steps=1,
        ),
        datasets=("cutouts",), methods=("recommended", RIVAL), fronts=("recommended",),
        batches=(1, 2), repeats=2, passes=2,
    ),
}  # fmt: skip


def row(name: str, config: settings.Config, world: settings.World) -> tuple[Callable, dict]:
    """(one step that is waited for, what is counted of it) of a method's training."""
    method, problem, shape = config.methods[name], world.problem, world.train.images.shape[1:]
    if method.kind in ("alf", "aff"):
        world, _ = cropd.without_a_tenth(world)
        frozen = ("foundation",) if method.kind == "alf" else ()
        model = models.defend(None, world.size, world.foundation, world.classes, frozen=frozen)
        attack = jr.linf_pgd(problem.eps, steps=config.rival_steps)
        objective, epochs, rate = training.adversarial(attack), None, config.rival_rate
    else:
        model = cropd.autoencoder_of(method, problem, shape)
        objective, rate = cropd.objective_of(method, problem, config, shape), config.rate
        epochs = cropd.epochs_of(model, objective, problem, config, shape)
    per_epoch = jr.data.steps_per_epoch(world.train, config.batch_size)
    steps = (epochs or config.rival_epochs) * per_epoch
    step, optimizer = cropd.step_of(model, objective, steps, rate, config, problem)
    make = partial(
        training.create_state, model, optimizer, shape=shape, ema=True, extra=objective.extra
    )
    mesh = jr.parallel.data_mesh(1)
    state = jr.parallel.create(make, mesh, jax.random.key(0))
    rows = slice(config.batch_size)
    batch = {
        "image": world.train.images[rows],
        "label": np.asarray(world.train.labels[rows]),
        "index": jnp.arange(config.batch_size, dtype=jnp.int32),
    }
    run, batch = jr.parallel.data_parallel(step, mesh), jr.parallel.shard_batch(batch, mesh)

    def once():
        nonlocal state
        state, metrics = run(state, batch)
        return float(metrics["loss"])

    counted = {
        "step_flops": cropd.flops(model, objective, config, shape),
        "steps_per_epoch": per_epoch,
        "epochs": epochs,
    }
    return once, counted


def forward(name: str, config: settings.Config, world: settings.World, batch: int) -> Callable:
    """One forward pass of a defended model, or of the bare one, that is waited for."""
    method, problem, shape = config.methods[name], world.problem, world.train.images.shape[1:]
    front, own = None, {}
    if method.kind in cropd.FILTERS:
        front, own = models.build(method.kind, **method.options), {"params": {}}
    elif method.kind in cropd.FRONTS:
        front = cropd.autoencoder_of(method, problem, shape)
        own = front.init(jax.random.key(0))
    model = models.defend(front, world.size, world.foundation, world.classes)
    fresh = model.init(jax.random.key(0), shape)
    parts = {"foundation": world.published, "head": models.part(fresh, "head")}
    variables = jax.device_put(models.join(**parts, preprocessor=own if front else None))
    run, x = jax.jit(model.apply), jnp.asarray(world.train.images[:batch])
    return lambda: run(variables, x).block_until_ready()


def table(cells: list[Mapping[str, Any]], chosen: Mapping[str, float] | None = None) -> str:
    """What training costs, and what a forward pass; `chosen` as of `training_table`."""
    training, passes = (
        [c for c in cells if ("batch" in c["key"]) == forward] for forward in (False, True)
    )
    return "\n\n".join(filter(None, (training_table(training, chosen), forward_table(passes))))


def forward_table(cells: list[Mapping[str, Any]]) -> str:
    """Milliseconds of a forward pass, and those that the pre-processor adds; "" without any."""
    of = {tuple(cell["key"].values()): 1e3 * cell["metrics"]["seconds_median"] for cell in cells}
    batches = sorted({batch for _, _, batch in of})
    rows = []
    for dataset, name in dict.fromkeys(key[:2] for key in of):
        line = [dataset, name]
        for batch in batches:
            took, bare = of[dataset, name, batch], of[dataset, BARE, batch]
            line += [f"{took:.1f}", "" if name == BARE else f"{took - bare:+.1f}"]
        rows.append(line)
    columns = [(f"ms, batch {batch}", "added") for batch in batches]
    header = ["set", "in front of the model", *(name for pair in columns for name in pair)]
    return common.markdown(header, rows) if rows else ""


def training_table(
    cells: list[Mapping[str, Any]], chosen: Mapping[str, float] | None = None
) -> str:
    """Milliseconds and operations of a step, and of a whole training in epochs of fine-tuning.

    Args:
        cells: of the results file.
        chosen: the epoch of fine-tuning that was the best one, by data set, if that is known.
    """
    of = {(cell["key"]["dataset"], cell["key"]["method"]): cell["metrics"] for cell in cells}
    rows = []
    for (dataset, method), found in of.items():
        rival, epochs = of.get((dataset, RIVAL)), found["epochs"]
        costs = ["", "", ""]
        if epochs and rival:
            flops, seconds = (
                epochs * of_epoch(found, name) / of_epoch(rival, name)
                for name in ("step_flops", "seconds_median")
            )
            best = (chosen or {}).get(dataset)
            costs = [f"{flops:.2f}", f"{seconds:.2f}", f"{seconds / best:.0%}" if best else ""]
        rows.append(
            [
                dataset, method, f"{1e3 * found['seconds_median']:.1f}",
                f"{found['step_flops'] / 1e9:.2f}",
                f"{found['step_flops'] / found['seconds_median'] / 1e9:.0f}",
                str(epochs or ""), *costs,
            ]
        )  # fmt: skip
    header = [
        "set", "training", "ms per step", "GFLOP per step", "GFLOP/s", "epochs",
        f"FLOPs of all, in epochs of {RIVAL}", "seconds of all, likewise",
        f"seconds of all, of {RIVAL}'s to its best epoch",
    ]  # fmt: skip
    return common.markdown(header, rows) if rows else ""


def readme_table(path: Path) -> str:
    """The table of a results file; fine-tuning's best epochs are the laptop preset's medians."""
    trained = path.with_name("cropd-laptop.json")
    rows = plots.rows_of(plots.read(trained), "dataset", "method") if trained.exists() else {}
    best = {
        dataset: float(np.median([cell["train_epochs"] for cell in cells]))
        for (dataset, method), cells in rows.items()
        if method == RIVAL
    }
    return table(json.loads(path.read_text())["cells"], best)


def of_epoch(found: Mapping[str, Any], name: str) -> float:
    """FLOPs or seconds of one epoch."""
    return found[name] * found["steps_per_epoch"]


def main(config: Config, options) -> None:
    """Times and writes."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = options.out / f"{NAME}-{options.preset if options.preset == 'smoke' else kind}.json"
    if options.plot_only:
        print(table(records.Results(path, NAME, options.preset, config).cells))
        return
    path.unlink(missing_ok=True)
    results = records.Results(path, NAME, options.preset, config)
    for dataset in config.datasets:
        begun = time.monotonic()
        world = cropd.world_of(config.preset.problems[dataset], config.preset)
        rows = {name: row(name, config.preset, world) for name in config.methods}
        runs = {name: once for name, (once, _) in rows.items()}
        timed = timing.interleaved(runs, repeats=config.repeats, seconds=config.seconds)
        for name, figures in timed.items():
            key = {"dataset": dataset, "method": name}
            results.add(key, {**figures, **rows[name][1]}, time.monotonic() - begun)
        for batch in config.batches:
            names = (BARE, *config.fronts)
            runs = {name: forward(name, config.preset, world, batch) for name in names}
            timed = timing.interleaved(runs, repeats=config.passes, seconds=config.seconds)
            for name, figures in timed.items():
                key = {"dataset": dataset, "method": name, "batch": batch}
                results.add(key, figures, time.monotonic() - begun)
        print(f"{dataset}: {time.monotonic() - begun:.0f} s", flush=True)
    print(table(results.cells))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS, default="full")
    main(PRESETS[chosen.preset], chosen)
