"""SIP-AT: does it matter which pixels are spared in adversarial training, or only how many?

    python -m experiments.sipat                    # quick: digits of MNIST-5k, one seed, minutes
    python -m experiments.sipat --preset laptop    # MNIST-5k and cut-outs, three seeds, many hours
    python -m experiments.sipat --preset paper     # CIFAR-10 and CUB-200-2011, on accelerators
    python -m experiments.sipat --preset smoke     # seconds

Adversarial training that leaves salient pixels alone (Redgrave and Czajka 2025), with every source
of salience, beside its controls: a random mask of equal area, the least salient pixels, the
inverted mask, and plain adversarial training at a smaller eps. All train one network, equally long.
Evaluation is unmasked: PGD-50 over a grid of eps, AutoAttack's standard suite at two of them, and
attacks that may change salient pixels only, or all others only. A run that is stopped goes on.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import jaxrobust as jr
from experiments import common, plots_sipat
from experiments.adversarial_training import first
from jaxrobust import salience, sipat, training

NAME = "sipat"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One row: what is trained, and what of the image it spares."""

    loss: str = "at"  # or "standard", "trades", "mart"
    source: str | None = None  # of the scores; None spares nothing
    area: float = 0.2  # share of the pixels that is spared; people's maps have their own
    control: str | None = None  # "shuffled", "least": as many pixels, other ones
    teacher: str = "standard"  # the method whose network the scores explain
    masking: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eps_share: float = 1.0


def controlled(area: float) -> dict[str, Method]:
    """A spared area with its two controls."""
    percent = round(100 * area)
    return {
        f"sip_gradient_{percent}": Method(source="gradient", area=area),
        f"random_{percent}": Method(source="gradient", area=area, control="shuffled"),
        f"least_{percent}": Method(source="gradient", area=area, control="least"),
    }


METHODS = {
    "standard": Method(loss="standard"),
    "at": Method(),
    "trades": Method(loss="trades"),
    "at_eps_83": Method(eps_share=0.83),
    "at_eps_67": Method(eps_share=0.67),
    "at_eps_50": Method(eps_share=0.5),
    **controlled(0.2),
    **controlled(0.05),
    **controlled(0.5),
    "inverted_20": Method(source="gradient", masking={"invert": True}),
    "sip_post_hoc_20": Method(source="gradient", masking={"post_hoc": True}),
    "sip_soft_20": Method(source="gradient", masking={"mode": "soft"}),
    "sip_smooth_grad_20": Method(source="smooth_grad"),
    "sip_integrated_20": Method(source="integrated_gradients"),
    "sip_grad_cam_20": Method(source="grad_cam"),
    "sip_layer_cam_20": Method(source="layer_cam"),
    "sip_rise_20": Method(source="rise"),
    "sip_robust_20": Method(source="gradient", teacher="at"),
    "sip_human": Method(source="human"),
    "random_human": Method(source="human", control="shuffled"),
    "sip_trades_20": Method(source="gradient", loss="trades"),
    "part_20": Method(source="grad_cam", masking={"salient": 1.0, "background": 0.875}),
    "half_eps_20": Method(source="gradient", masking={"salient": 0.5}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One data set, the network for it, and the eps that it is judged at."""

    dataset: str
    model: Mapping[str, Any]
    tap: str  # the activation that Grad-CAM and LayerCAM look at
    eps: float
    grid: tuple[float, ...]
    suite_eps: tuple[float, ...]
    train_split: str = "train+validation"
    epochs: int = 20
    batch_size: int = 50
    rate: float = 1e-2
    standard_rate: float = 2e-3
    shift: int = 1
    flip: bool = False
    optimizer: str = "adam"
    weight_decay: float = 0.0


PROBLEMS = {
    "mnist5k": Problem(
        dataset="mnist5k", model={"name": "small_cnn"}, tap="conv2", eps=0.3,
        grid=(0.05, 0.1, 0.2, 0.3), suite_eps=(0.1, 0.3),
    ),
    "cutouts": Problem(
        dataset="cutouts",
        model={
            "name": "small_cnn", "channels": (32, 64, 128), "strides": (1, 2, 2), "kernel": 3,
            "dense": (128,), "classes": 8,
        },
        tap="conv3", eps=8 / 255, grid=tuple(k / 255 for k in (1, 2, 4, 8)),
        suite_eps=(2 / 255, 8 / 255), rate=3e-3, standard_rate=2e-3, shift=2,
    ),
}  # fmt: skip
CIFAR = Problem(
    dataset="cifar10", model={"name": "preact_resnet18", "norm": "batch"}, tap="layer4",
    eps=8 / 255, grid=tuple(k / 255 for k in (1, 2, 4, 8)), suite_eps=(2 / 255, 8 / 255),
    train_split="train", epochs=200, batch_size=128, optimizer="sgd", rate=0.1, standard_rate=0.1,
    shift=4, flip=True, weight_decay=5e-4,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One preset; a cell is one (data set, method, seed)."""

    problems: Mapping[str, Problem] = dataclasses.field(default_factory=lambda: PROBLEMS)
    methods: Mapping[str, Method] = dataclasses.field(default_factory=lambda: METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    train_images: int | None = None
    attack_steps: int = 5
    eps_warmup: float = 0.3
    ema_decay: float = 0.99
    save_every: float = 30.0
    test_images: int = 1000
    pgd_steps: int = 50
    suite_images: int = 300
    # Rows that the suite judges: the frontier's ends and every control.
    suite: tuple[str, ...] = (
        "at", "at_eps_67", "sip_gradient_20", "random_20", "least_20", "inverted_20", "sip_human",
    )  # fmt: skip


FEW = ("standard", "at", "at_eps_67", "sip_gradient_20", "random_20", "least_20", "sip_human")
PRESETS = {
    "smoke": Config(
        problems={"mnist5k": dataclasses.replace(PROBLEMS["mnist5k"], epochs=1)},
        methods={n: METHODS[n] for n in ("standard", "at", "sip_gradient_20", "random_20")},
        seeds=(0,), train_images=200, attack_steps=1, save_every=0.5, test_images=32, pgd_steps=2,
        suite=(),
    ),
    "quick": Config(
        problems={"mnist5k": PROBLEMS["mnist5k"]}, methods={name: METHODS[name] for name in FEW},
        seeds=(0,), suite=(),
    ),
    "laptop": Config(),
    "paper": Config(
        problems={
            "cifar10": CIFAR,
            "cifar100": dataclasses.replace(
                CIFAR, dataset="cifar100", model={**CIFAR.model, "classes": 100}
            ),
            "cub200": dataclasses.replace(
                CIFAR, dataset="cub200", model={**CIFAR.model, "classes": 200}, epochs=50,
                batch_size=32,
            ),
        },
        attack_steps=10, ema_decay=0.995, test_images=10000,
    ),
}  # fmt: skip


# ---- training -----------------------------------------------------------------------------------


def weights(key: dict, config: Config, sets: dict, options) -> tuple[jr.models.Model, dict, dict]:
    """The cell's network, trained if it is not there: (model, variables, what that took)."""
    problem, method = config.problems[key["dataset"]], config.methods[key["method"]]
    model = jr.models.build(**problem.model)
    path = common.run_folder(options, config, key) / "weights.safetensors"
    taken = {}
    if not path.exists():
        train_set, taken = annotated(key, config, sets, options)
        fitted = train(key, config, model, train_set, path.parent, options)
        jr.checkpoint.save_weights(path, jax.tree.map(np.asarray, fitted.variables))
        taken |= {"train_seconds": round(fitted.seconds, 2)}
    variables = {"batch_stats": {}, **jr.checkpoint.load_weights(path)}
    return model, variables, {**taken, "spared_area": spared_area(method, problem)}


def train(key, config, model, train_set, directory, options) -> training.Fitted:
    """Trains one network on a set that carries its maps."""
    problem, method = config.problems[key["dataset"]], config.methods[key["method"]]
    steps = problem.epochs * jr.data.steps_per_epoch(train_set, problem.batch_size)
    objective = objective_of(method, problem, config, steps)
    peak = problem.standard_rate if method.loss == "standard" else problem.rate
    rate = training.learning_rate("cosine", peak, steps, warmup=0.1)
    decay = {"weight_decay": problem.weight_decay}
    optimizer = (training.sgd if problem.optimizer == "sgd" else optax.adamw)(rate, **decay)
    mesh = common.mesh_for(options, problem.batch_size)
    shape = train_set.images.shape[1:]
    create = partial(training.create_state, model, optimizer, ema=True, extra=objective.extra)
    state = jr.parallel.create(lambda seed: create(seed, shape), mesh, jax.random.key(key["seed"]))
    parts = [partial(jr.data.pad_crop, pad=problem.shift)] if problem.shift else []
    parts += [jr.data.flip] if problem.flip else []
    augment = jr.data.compose(*parts) if parts else None
    step = training.train_step(
        model, optimizer, objective, augment=augment, ema_decay=config.ema_decay
    )
    return training.fit(
        step, state, train_set, batch_size=problem.batch_size, epochs=problem.epochs,
        seed=key["seed"], mesh=mesh, mapping=options.mapping, averaged=True, directory=directory,
        save_every=config.save_every, label=" ".join(map(str, key.values())),
    )  # fmt: skip


def objective_of(method: Method, problem: Problem, config: Config, steps: int):
    """The method's loss, made to spare what its maps say."""
    if method.loss == "standard":
        return training.standard()
    attack = jr.linf_pgd(method.eps_share * problem.eps, steps=config.attack_steps)
    ramp = optax.linear_schedule(0.0, 1.0, max(round(config.eps_warmup * steps), 1))
    losses = {"at": training.adversarial, "trades": training.trades, "mart": training.mart}
    objective = losses[method.loss](attack, eps_schedule=ramp)
    if method.source is None:
        return objective
    return sipat.salience_preserving(objective, sipat.Masking(**method.masking))


# ---- salience -----------------------------------------------------------------------------------


def source_of(name: str, problem: Problem):
    """The scoring method of a name, set for the problem's network."""
    if name in ("grad_cam", "layer_cam"):
        return partial(getattr(salience, name), tap=problem.tap)
    return getattr(salience, name)


def annotated(key, config, sets, options) -> tuple[jr.data.Dataset, dict]:
    """The training set with the method's maps, and what they cost."""
    method, train_set = config.methods[key["method"]], sets[key["dataset"]]["train"]
    if method.source is None:
        return train_set._replace(salience=None), {}
    begun = time.perf_counter()
    scores = scores_of(key, method, config, sets, options, "train")
    maps = maps_of(method, scores, key["seed"])
    seconds = time.perf_counter() - begun
    return salience.attach(train_set, maps), {"salience_seconds": round(seconds, 2)}


def scores_of(key, method, config, sets, options, split) -> np.ndarray:
    """What a map is made of: people's annotation, or scores of a network, kept on disk."""
    examples = sets[key["dataset"]][split]
    if method.source == "human":
        # On MNIST the ink is what a person would mark.
        return examples.images if examples.salience is None else examples.salience
    problem = config.problems[key["dataset"]]
    source = source_of(method.source, problem)
    model, variables, _ = weights({**key, "method": method.teacher}, config, sets, options)
    settings = salience.made_by(source, variables, dataset=key["dataset"], split=split)

    def make(rows):
        batch = examples.images[rows], examples.labels[rows]
        return np.asarray(
            salience.compute(source, model.apply, variables, *batch, key=jax.random.key(0))
        )

    return salience.cached(options.runs / "salience", settings, examples.indices, make)


def maps_of(method: Method, scores: np.ndarray, seed: int) -> np.ndarray:
    """The map that a method trains with."""
    if method.source == "human":
        maps = scores
    elif method.control == "least":
        maps = salience.least_salient(scores, method.area)
    elif method.masking.get("mode") == "soft":
        maps = salience.rank_map(scores, method.area)
    else:
        maps = salience.top_fraction(scores, method.area)
    if method.control == "shuffled":
        maps = salience.shuffled(jax.random.key(1000 + seed), maps)
    return np.asarray(maps, np.float32)


def spared_area(method: Method, problem: Problem) -> float | None:
    """The share of the pixels that is spared; people's maps differ, and say it in training."""
    if method.source is None:
        return 0.0
    return None if method.source == "human" else method.area


# ---- evaluation ---------------------------------------------------------------------------------


def evaluate(key, config, sets, options, model, variables) -> dict[str, Any]:
    """Unmasked accuracy over the grid, under the suite, and under the two regional attacks."""
    problem, test = config.problems[key["dataset"]], sets[key["dataset"]]["test"]
    images, labels = test.images, test.labels
    attack = jr.linf_pgd(problem.eps, steps=config.pgd_steps)
    grid = (0.0, *problem.grid)
    curve = jr.evaluation.accuracy_curve(
        model.apply, variables, images, labels, attack, grid, key=jax.random.key(17),
        progress="PGD",
    )  # fmt: skip
    # One map for all rows, so that they can be compared.
    judge = Method(source="gradient" if test.salience is None else "human")
    maps = maps_of(judge, scores_of(key, judge, config, sets, options, "test"), 0)
    regions = {
        name: float(
            correct(
                model.apply, variables, images, labels, maps, attack=attack, key=jax.random.key(18)
            ).mean()
        )
        for name, correct in (
            ("salience_only_accuracy", sipat.salience_only_correct),
            ("background_only_accuracy", sipat.background_only_correct),
        )
    }
    return {
        "clean_accuracy": float(curve[0].mean()),
        "grid": list(problem.grid),
        f"pgd{config.pgd_steps}_accuracy": [float(part) for part in curve[1:].mean(1)],
        **regions,
        **(suite(key, config, test, model, variables) if key["method"] in config.suite else {}),
    }


def suite(key, config, test, model, variables) -> dict[str, Any]:
    """AutoAttack's standard suite on the first test images."""
    problem, rows = config.problems[key["dataset"]], slice(0, config.suite_images)
    logits_fn = lambda x, variables: model.apply(variables, x)  # noqa: E731
    found = [
        jr.auto_attack(
            logits_fn, test.images[rows], test.labels[rows], eps=eps, key=jax.random.key(19),
            args=(variables,),
        )
        for eps in problem.suite_eps
    ]  # fmt: skip
    return {
        "suite_eps": list(problem.suite_eps),
        "suite_accuracy": [float(result.robust.mean()) for result in found],
    }


def load(config: Config) -> dict[str, dict[str, jr.data.Dataset]]:
    """Training and test images of every problem."""
    return {
        name: {
            "train": first(jr.data.load(p.dataset, p.train_split), config.train_images),
            "test": first(jr.data.load(p.dataset, "test"), config.test_images),
        }
        for name, p in config.problems.items()
    }


def keys(config: Config) -> list[dict]:
    """All cells, seed by seed; methods that others take scores from come first."""
    return [
        {"dataset": dataset, "method": method, "seed": seed}
        for seed in config.seeds
        for dataset in config.problems
        for method in config.methods
    ]


def main(config: Config, options) -> None:
    """Runs what is missing, then draws the plots and prints the table."""
    path = options.out / f"{NAME}-{options.preset}.json"
    results = common.Results(path, NAME, options.preset, config)
    if not options.plot_only:
        sets = load(config)
        for key in tqdm(keys(config), desc=NAME, unit="cell"):
            if results.find(key) is None:
                begun = time.monotonic()
                model, variables, taken = weights(key, config, sets, options)
                metrics = evaluate(key, config, sets, options, model, variables)
                results.add(key, {**metrics, **taken}, time.monotonic() - begun)
    plots_sipat.curves(path)
    plots_sipat.frontier(path)
    print(plots_sipat.table(path))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS)
    main(PRESETS[chosen.preset], chosen)
