"""AutoAttack against the reference PyTorch implementation: the same answer, and how much faster.

    pip install -e '.[bench]'
    python -m experiments.bench_autoattack                  # 1 hour on 2 cores; resumes by cell
    python -m experiments.bench_autoattack --preset large   # a residual network, as long again
    python -m experiments.bench_autoattack --preset wide    # PreActResNet-18, one attack, minutes
    python -m experiments.bench_autoattack --preset smoke   # ours alone, seconds

Networks are trained adversarially here, and both sides attack the same weights: every attack alone
on all images, and then the standard suite. Ours is compiled before it is timed, by an attack at a
radius at which everything falls; PyTorch has nothing to compile. The reference is `pyautoattack`,
checked by its authors against the original. A network too large to train here is timed untrained,
against its own answers, at a radius so small that they hold: every image then takes all the steps.
What the results file holds is not measured again.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import jaxrobust as jr
from experiments import common, plots, records
from jaxrobust import evaluation, training

NAME = "bench_autoattack"
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
SUITE = "standard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One network, how it is trained (not at all if `epochs` is 0), and how it is attacked."""

    model: Mapping[str, Any]
    dataset: str
    norm: str
    eps: float
    epochs: int
    rate: float
    images: int


DIGITS = {"name": "small_cnn", "channels": (16, 32), "strides": (1, 2), "kernel": 3}
SMALL = {
    "digits_cnn": Problem(
        model=DIGITS, dataset="digits", norm="linf", eps=0.15, epochs=60, rate=5e-3, images=1000
    ),
    "mnist_cnn": Problem(
        model={"name": "small_cnn"}, dataset="mnist5k", norm="linf", eps=0.3, epochs=20, rate=1e-2,
        images=1000,
    ),
    "mnist_cnn_l2": Problem(
        model={"name": "small_cnn"}, dataset="mnist5k", norm="l2", eps=2.0, epochs=20, rate=1e-2,
        images=1000,
    ),
}  # fmt: skip
LARGE = Problem(
    model={
        "name": "preact_resnet", "norm": "batch", "stages": (1,) * 4, "widths": (16, 32, 64, 128)
    },
    dataset="mnist5k", norm="linf", eps=0.3, epochs=8, rate=5e-3, images=200,
)  # fmt: skip
WIDE = Problem(
    model={"name": "preact_resnet18", "norm": "batch"}, dataset="cifar10", norm="linf", eps=1e-5,
    epochs=0, rate=0.0, images=16,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is attacked."""

    problems: Mapping[str, Problem] = dataclasses.field(default_factory=lambda: SMALL)
    attacks: tuple[str, ...] = (*ATTACKS, SUITE)
    queries: int = 5000
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 256
    peers: bool = True


PRESETS = {
    "full": Config(),
    "large": Config(problems={"preact_resnet10": LARGE}),
    "wide": Config(problems={"preact_resnet18": WIDE}, attacks=("apgd-ce",), batch_size=16),
    "smoke": Config(
        problems={
            "digits_cnn": Problem(
                model=DIGITS, dataset="digits", norm="linf", eps=0.1, epochs=3, rate=5e-3, images=32
            )
        },
        attacks=("apgd-ce", "square"),
        queries=100,
        seeds=(0,),
        batch_size=16,
        peers=False,
    ),
}


def trained(name: str, problem: Problem, config: Config, options) -> tuple[jr.models.Model, dict]:
    """The network with its weights, from the run folder if they are there."""
    model = jr.models.build(**problem.model)
    if not problem.epochs:
        images = jr.data.foolbox_photos(problem.dataset).images
        return model, model.init(jax.random.key(0), images.shape[1:])
    path = records.run_folder(options, config, {"model": name}) / "weights.safetensors"
    if path.exists():
        return model, jr.checkpoint.load_weights(path)
    examples = jr.data.load(problem.dataset, "train+validation")
    steps = problem.epochs * jr.data.steps_per_epoch(examples, 50)
    rate = training.learning_rate("cosine", problem.rate, steps, warmup=0.1)
    optimizer = optax.adam(rate)
    ramp = optax.linear_schedule(0.0, 1.0, round(0.3 * steps))
    attack = jr.pgd(problem.norm, problem.eps, steps=5)
    objective = training.adversarial(attack, eps_schedule=ramp)
    mesh = common.mesh_for(options, 50)
    state = jr.parallel.create(
        lambda: training.create_state(
            model, optimizer, jax.random.key(0), examples.images.shape[1:], extra=objective.extra
        ),
        mesh,
    )
    augment = jr.data.compose(partial(jr.data.pad_crop, pad=1))
    step = training.train_step(model, optimizer, objective, augment=augment)
    fitted = training.fit(
        step, state, examples, batch_size=50, epochs=problem.epochs, mesh=mesh, label=name,
        directory=path.parent,
    )  # fmt: skip
    variables = jax.tree.map(np.asarray, fitted.variables)
    jr.checkpoint.save_weights(path, variables)
    return model, variables


def examples_of(problem: Problem, model, variables) -> tuple[np.ndarray, np.ndarray]:
    """Test images first; a small set is filled up with others, since nothing is claimed of them."""
    if not problem.epochs:
        images = jr.data.foolbox_photos(problem.dataset).images[: problem.images]
        return images, np.asarray(model.apply(variables, images).argmax(1))
    test, rest = (jr.data.load(problem.dataset, s) for s in ("test", "train+validation"))
    images = np.concatenate([test.images, rest.images])[: problem.images]
    return images, np.concatenate([test.labels, rest.labels])[: problem.images]


def ours(model, variables, problem: Problem, attack: str, config: Config, options):
    """A function of a seed that gives the accuracy under our attack, compiled."""
    images, labels = examples_of(problem, model, variables)
    mesh = jr.parallel.data_mesh(jax.local_devices()[: options.devices])
    placed = jr.parallel.create(lambda: jax.tree.map(jax.numpy.asarray, variables), mesh)
    suite = evaluation.suite("standard", problem.norm, problem.eps)
    suite["square"] = dataclasses.replace(suite["square"], queries=config.queries)
    chosen = suite if attack == SUITE else {attack: suite[attack]}

    def logits_fn(x, variables):
        return model.apply(variables, x)

    def run(seed, attacks=chosen, rows=slice(None), eps=problem.eps):
        result = jr.auto_attack(
            logits_fn, images[rows], labels[rows], eps=eps, norm=problem.norm,
            version="custom", attacks=attacks, key=jax.random.key(seed), args=(placed,),
            batch_size=config.batch_size, mesh=mesh, progress=False,
        )  # fmt: skip
        return float(result.robust.mean())

    # Radii are no part of a program: both of its shapes, for many examples and for few.
    everything = {"linf": 1.0, "l2": 1e3, "l1": 1e6}[problem.norm]
    for name, one in chosen.items():
        easy = {name: dataclasses.replace(one, eps=everything)}
        run(0, easy, eps=everything), run(0, easy, slice(0, 1), everything)
    return run


def reference(model, variables, problem: Problem, attack: str, config: Config):
    """A function of a seed that gives the accuracy under the reference's attack."""
    import torch
    from pyautoattack import AutoAttack

    from experiments import torch_twins

    images, labels = examples_of(problem, model, variables)
    net = torch_twins.freeze(torch_twins.twin(model.config, variables, images.shape[1:]))
    x, y = torch_twins.nchw(images), torch.from_numpy(np.array(labels)).long()
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[problem.norm]
    names = list(ATTACKS) if attack == SUITE else [attack]

    def run(seed):
        suite = AutoAttack(
            net, norm=norm, eps=problem.eps, version="custom", attacks=names, seed=seed
        )
        suite.verbose = False
        suite.apgd.n_restarts, suite.square.n_queries = 1, config.queries
        x_adv, _ = suite.run_standard_evaluation(x, y, batch_size=config.batch_size)
        with torch.no_grad():
            return float((net(x_adv).argmax(1) == y).float().mean())

    return run


def table(path: Path) -> str:
    """Accuracy and speed of both, per network and attack, as Markdown."""
    rows = defaultdict(lambda: defaultdict(list))
    for cell in plots.read(path)["cells"]:
        key, figures = cell["key"], cell["metrics"]
        row = (key["model"], f"{key['norm']} {key['eps']:g}", key["attack"])
        rows[row][key["library"]].append(figures)
    header = ["network", "threat", "attack", "accuracy %, ours", "reference", "images/s, ours",
              "reference", "x"]  # fmt: skip
    lines = []
    for (model, threat, attack), found in rows.items():
        columns, rates = [], []
        for library in ("jaxrobust", "reference"):
            cells = found.get(library)
            columns.append(plots.spread([c["accuracy"] for c in cells]) if cells else "not run")
            rates.append(np.median([c["images_per_second"] for c in cells]) if cells else None)
        ratio = f"{rates[0] / rates[1]:.2f}" if None not in rates else "not run"
        shown = ["not run" if rate is None else f"{rate:.1f}" for rate in rates]
        lines.append([model, threat, attack, *columns, *shown, ratio])
    return common.markdown(header, lines)


def main(config: Config, options) -> None:
    """Attacks every network with every attack in turn, seed by seed, and writes the results."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    names = {"full": kind, "large": f"{kind}-large", "wide": f"{kind}-wide"}
    path = options.out / f"{NAME}-{names.get(options.preset, options.preset)}.json"
    results = records.Results(path, NAME, options.preset, config)
    jobs = [
        (name, attack, seed)
        for name in config.problems
        for seed in config.seeds
        for attack in config.attacks
    ]
    networks, compiled = {}, {}
    for name, attack, seed in tqdm(jobs, desc=NAME, unit="cell"):
        problem = config.problems[name]
        for library in ("jaxrobust", "reference") if config.peers else ("jaxrobust",):
            key = {
                "library": library, "model": name, "attack": attack, "norm": problem.norm,
                "eps": problem.eps, "seed": seed, "images": problem.images,
            }  # fmt: skip
            if results.find(key) is not None:
                continue
            if name not in networks:
                networks[name] = trained(name, problem, config, options)
            begun, first = time.perf_counter(), None
            if library == "reference":
                run = reference(*networks[name], problem, attack, config)
            elif (name, attack) in compiled:
                run = compiled[name, attack]
            else:
                run = compiled[name, attack] = ours(
                    *networks[name], problem, attack, config, options
                )
                first = time.perf_counter() - begun
            timed = time.perf_counter()
            accuracy = run(seed)
            seconds = time.perf_counter() - timed
            figures = {
                "accuracy": accuracy,
                "attack_seconds": seconds,
                "images_per_second": problem.images / seconds,
                **({} if first is None else {"first_seconds": first}),
            }
            results.add(key, figures, time.perf_counter() - begun)
    print(table(path))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS, default="full")
    main(PRESETS[chosen.preset], chosen)
