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

import time
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import jaxrobust as jr
from experiments import common, plots_sipat, records
from experiments.sipat_settings import PRESETS, UNANNOTATED, Config, Method, Problem
from jaxrobust import salience, sipat, training

NAME = "sipat"


# ---- training -----------------------------------------------------------------------------------


def weights(key: dict, config: Config, sets: dict, options) -> tuple[jr.models.Model, dict, dict]:
    """The cell's network, trained if it is not there: (model, variables, what that took)."""
    method, model = config.methods[key["method"]], sets[key["dataset"]]["model"]
    folder = records.run_folder(options, config, key)

    def make():
        train_set, taken = annotated(key, config, sets, options)
        area = area_of(key, config, sets, options)
        fitted = train(key, config, model, train_set, area, folder, options)
        return fitted.variables, taken | {"train_seconds": round(fitted.seconds, 2)}

    variables, taken = records.kept(folder, "weights", make)
    return model, variables, {**taken, "spared_area": spared_area(method)}


def train(key, config, model, train_set, area, directory, options) -> training.Fitted:
    """Trains one network on a set that carries its maps, or the scores that `area` selects from."""
    problem, method = config.problems[key["dataset"]], config.methods[key["method"]]
    steps = problem.epochs * jr.data.steps_per_epoch(train_set, problem.batch_size)
    objective = objective_of(method, problem, config, steps, area)
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


def objective_of(method: Method, problem: Problem, config: Config, steps: int, area=None):
    """The method's loss, made to spare what its maps say, or `area` of what its scores say."""
    if method.loss == "standard":
        return training.standard()
    attack = jr.linf_pgd(method.eps_share * problem.eps, steps=config.attack_steps)
    ramp = optax.linear_schedule(0.0, 1.0, max(round(config.eps_warmup * steps), 1))
    losses = {"at": training.adversarial, "trades": training.trades, "mart": training.mart}
    objective = losses[method.loss](attack, eps_schedule=ramp)
    if method.source is None:
        return objective
    if method.end_area is not None:
        area = optax.linear_schedule(method.area, method.end_area, steps)
    return sipat.salience_preserving(objective, sipat.Masking(**method.masking), area=area)


def area_of(key: dict, config: Config, sets: dict, options) -> np.ndarray | None:
    """A share for each class, where the method asks for it.

    It is in proportion to how often the adversarially trained network fails on the class under the
    training's attack, with the method's area as the mean over the images.
    """
    problem, method = config.problems[key["dataset"]], config.methods[key["method"]]
    if not method.per_class:
        return None
    train_set = sets[key["dataset"]]["train"]
    model, variables, _ = weights({**key, "method": "at"}, config, sets, options)
    attack = jr.linf_pgd(problem.eps, steps=config.attack_steps)
    images, labels = train_set.images, np.asarray(train_set.labels)
    right = jr.evaluation.accuracy_curve(
        model.apply, variables, images, labels, attack, (problem.eps,), key=jax.random.key(16)
    )[0]
    classes = int(labels.max()) + 1
    failing = np.array([1 - right[labels == c].mean() for c in range(classes)]) + 1e-6
    return np.clip(method.area * failing / failing[labels].mean(), 0, 1).astype(np.float32)


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
        return train_set.replace(salience=None), {}
    if method.source != "human":  # The teacher's training is no cost of the maps.
        weights({**key, "method": method.teacher}, config, sets, options)
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
        return salience.compute(source, model.apply, variables, *batch, key=jax.random.key(0))

    return salience.cached(options.runs / "salience", settings, examples.indices, make)


def maps_of(method: Method, scores: np.ndarray, seed: int) -> np.ndarray:
    """The map that a method trains with, or the scores that its step selects from."""
    ranked = -scores if method.control == "least" else scores
    if method.source == "human":
        maps = scores
    elif method.varies:
        maps = salience.soft(ranked)
    elif method.masking.get("mode") == "soft":
        maps = salience.rank_map(ranked, method.area)
    else:
        maps = salience.top_fraction(ranked, method.area)
    if method.control == "shuffled":
        maps = salience.shuffled(jax.random.key(1000 + seed), maps)
    return np.asarray(maps, np.float32)


def spared_area(method: Method) -> float | None:
    """The mean share of the pixels that is spared, None where it is people's maps that say it."""
    if method.source is None:
        return 0.0
    if method.source == "human":
        return None
    return method.area if method.end_area is None else (method.area + method.end_area) / 2


# ---- evaluation ---------------------------------------------------------------------------------


def evaluate(key, config, sets, options, model, variables) -> dict[str, Any]:
    """Unmasked accuracy over the grid, under the suite, and under the two regional attacks."""
    problem, test = config.problems[key["dataset"]], sets[key["dataset"]]["test"]
    images, labels = test.images, test.labels
    attack = jr.linf_pgd(problem.eps, steps=config.pgd_steps)
    grid = (0.0, *problem.grid)
    curve = jr.evaluation.accuracy_curve(
        model.apply, variables, images, labels, attack, grid, key=jax.random.key(17),
        progress=True,
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
        "images": len(labels),
        "outcomes": records.packed(curve),  # clean, then over the grid
        **regions,
        **(suite(key, config, test, model, variables) if key["method"] in config.suite else {}),
    }


def suite(key, config, test, model, variables) -> dict[str, Any]:
    """AutoAttack's standard suite on the first test images."""
    problem, rows = config.problems[key["dataset"]], slice(0, config.suite_images)
    logits_fn = common.LogitsOf(model.apply)
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


def pictures(config, sets, options, path) -> None:
    """Training images, what is spared of them, and the perturbation with and without sparing it."""
    for dataset, problem in config.problems.items():
        key = {"dataset": dataset, "method": "sip_gradient_20", "seed": config.seeds[0]}
        model, variables, _ = weights(key, config, sets, options)
        examples, _ = annotated(key, config, sets, options)
        images, labels, maps = (
            a[:6] for a in (examples.images, examples.labels, examples.salience)
        )

        def loss_fn(x, variables, labels, model=model):
            return jr.losses.cross_entropy(model.apply(variables, x), labels)

        attack = jr.sip_pgd(problem.eps, steps=config.pgd_steps)
        spared, plain = (
            attack(loss_fn, images, jax.random.key(0), chosen, args=(variables, labels)) - images
            for chosen in (maps, np.zeros_like(maps))
        )
        plots_sipat.pictures(path, dataset, images, maps, spared, plain)


def load(config: Config) -> dict[str, dict[str, Any]]:
    """Training and test images of every problem, and its network, which all its cells share."""
    return {
        name: {
            "train": jr.data.load(p.dataset, p.train_split).take(slice(config.train_images)),
            "test": jr.data.load(p.dataset, "test").take(slice(config.test_images)),
            "model": jr.models.build(**p.model),
        }
        for name, p in config.problems.items()
    }


def keys(config: Config) -> list[dict]:
    """All cells, seed by seed; methods that others take scores from come first."""
    return [
        {"dataset": dataset, "method": name, "seed": seed}
        for seed in config.seeds
        for dataset in config.problems
        for name, method in config.methods.items()
        if method.source != "human" or dataset not in UNANNOTATED
    ]


def main(config: Config, options) -> None:
    """Runs what is missing, then draws the plots and prints the table."""
    path = options.out / f"{NAME}-{options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    if not options.plot_only:
        sets = load(config)
        for key in results.missing(keys(config), partial(records.run_folder, options, config)):
            begun = time.monotonic()
            model, variables, taken = weights(key, config, sets, options)
            metrics = evaluate(key, config, sets, options, model, variables)
            results.add(key, {**metrics, **taken}, time.monotonic() - begun)
        pictures(config, sets, options, path)
    plots_sipat.curves(path)
    plots_sipat.frontier(path)
    print(plots_sipat.table(path))
    print(plots_sipat.verdict(path))
    print(plots_sipat.follow_up(path))
    print(plots_sipat.beside_suite(path))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS)
    main(PRESETS[chosen.preset], chosen)
