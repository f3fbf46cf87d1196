"""CRoPD: what a trained pre-processor in front of a frozen foundation model is worth, and costs.

    python -m experiments.cropd                    # quick: cut-outs, one seed, PGD; minutes
    python -m experiments.cropd --preset laptop    # three sets, three seeds, AutoAttack; many hours
    python -m experiments.cropd --preset paper     # CIFAR, SVHN, ImageNette, on accelerators
    python -m experiments.cropd --preset smoke     # seconds

EfficientNet-lite0 stays as published. Each row puts something in front of it and fits a linear head
on clean features; "alf" trains the head adversarially, "aff" the whole model, which is what the
pre-processor is meant to save. All are attacked white-box, through everything: PGD over a grid, and
for the final rows AutoAttack's standard suite together with attacks on the code and the features,
BPDA and transfer, per-example worst case. "Non-adaptive" is an attack on the bare model, shown to
say how little it says. A run that is stopped goes on.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxrobust as jr
from experiments import common, plots_cropd
from experiments.cropd_settings import PRESETS, Config, Method, Problem
from jaxrobust import attacks, cropd, models, training

NAME = "cropd"
FRONTS = ("autoencoder", "denoiser", "jpeg", "total_variation")


class World(NamedTuple):
    """A downstream set and the foundation model that all its cells share."""

    problem: Problem
    train: jr.data.Dataset
    test: jr.data.Dataset
    foundation: models.Model
    published: dict
    size: tuple[int, int, int]

    @property
    def classes(self) -> int:
        """How many classes the head has."""
        return len(self.train.class_names)


class Built(NamedTuple):
    """A defended model with its variables, and what its training took."""

    model: models.Model
    variables: dict
    costs: dict[str, Any]


# ---- training -----------------------------------------------------------------------------------


def build(key: dict, config: Config, world: World, options) -> Built:
    """The cell's defended model, trained if it is not there."""
    method = config.methods[key["method"]]
    if method.kind in ("alf", "aff"):
        return rival(key, config, world, options)
    front, ours, costs = None, None, {}
    if method.kind in FRONTS:
        front, ours, costs = preprocessor(key, config, world, options)
    model = models.defend(front, world.size, world.foundation, world.classes)
    variables = models.join(preprocessor=ours, foundation=world.published)
    begun = time.perf_counter()
    head = fit_head(model, variables, config, world)
    costs = {**costs, "head_seconds": round(time.perf_counter() - begun, 2)}
    return Built(
        model, models.join(preprocessor=ours, foundation=world.published, head=head), costs
    )


def fit_head(model, variables, config: Config, world: World) -> dict:
    """A linear head on clean features, as the user of a foundation model would fit it."""
    found = cropd.features(model, variables, world.train.images, batch_size=config.batch)
    return cropd.fit_head(found, world.train.labels, world.classes, decay=config.decay)


def preprocessor(key, config: Config, world: World, options) -> tuple[models.Model, dict, dict]:
    """(model, variables, costs) of what stands in front; it sees no foundation model."""
    method, problem = config.methods[key["method"]], world.problem
    shape = world.train.images.shape[1:]
    if method.kind in ("jpeg", "total_variation"):
        return models.build(method.kind, **method.options), {"params": {}}, {}
    model = models.autoencoder(
        shape, widths=problem.widths, latent_norm=True,
        latent_channels=method.latent_channels or problem.latent_channels,
    )  # fmt: skip
    objective = objective_of(method, problem, config)
    fitted = trained(key, config, world, options, model, objective, config.epochs, config.rate)
    return model, fitted[0], fitted[1]


def objective_of(method: Method, problem: Problem, config: Config) -> training.Objective:
    """What a pre-processor is trained for."""
    if method.kind == "denoiser":
        return training.denoising(config.noise_per_eps * problem.eps)
    weights = cropd.Weights(
        method.clean, method.contrast, method.denoising, method.displacement
    )  # fmt: skip
    attack = jr.linf_pgd(problem.eps, steps=config.attack_steps)
    return cropd.robust_autoencoder(
        attack, weights=weights, form=method.form, temperature=method.temperature
    )


def rival(key, config: Config, world: World, options) -> Built:
    """Adversarial training of the head alone, or of all of the foundation model."""
    frozen = ("foundation",) if config.methods[key["method"]].kind == "alf" else ()
    model = models.defend(None, world.size, world.foundation, world.classes, frozen=frozen)
    start = models.join(foundation=world.published)
    start = models.join(foundation=world.published, head=fit_head(model, start, config, world))
    attack = jr.linf_pgd(world.problem.eps, steps=config.rival_steps)
    ramp = optax.linear_schedule(0.0, 1.0, config.rival_epochs * 10)
    objective = training.adversarial(attack, eps_schedule=ramp)
    variables, costs = trained(
        key, config, world, options, model, objective, config.rival_epochs, config.rival_rate, start
    )
    return Built(model, variables, costs)


def trained(key, config, world, options, model, objective, epochs, rate, start=None):
    """(variables, costs) after training, from the run folder if it is done."""
    folder = common.run_folder(options, config, key)
    path = folder / "weights.safetensors"
    steps = epochs * jr.data.steps_per_epoch(world.train, config.batch_size)
    schedule = training.learning_rate("cosine", rate, steps, warmup=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    problem, shape = world.problem, world.train.images.shape[1:]
    parts = [partial(jr.data.pad_crop, pad=problem.shift)] + [jr.data.flip] * problem.flip
    step = training.train_step(
        model, optimizer, objective, augment=jr.data.compose(*parts), ema_decay=config.ema_decay
    )

    def create(seed):
        state = training.create_state(
            model, optimizer, seed, shape, ema=True, extra=objective.extra
        )
        if start is None:
            return state
        params, stats = (jax.tree.map(jnp.asarray, start[k]) for k in ("params", "batch_stats"))
        return state._replace(
            params=params, batch_stats=stats, opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, (params, stats)),
        )  # fmt: skip

    costs = {"train_flops": flops(step, create, config, shape) * steps}
    if not path.exists():
        mesh = common.mesh_for(options, config.batch_size)
        state = jr.parallel.create(create, mesh, jax.random.key(key["seed"]))
        fitted = training.fit(
            step, state, world.train, batch_size=config.batch_size, epochs=epochs,
            seed=key["seed"], mesh=mesh, mapping=options.mapping, averaged=True,
            directory=folder, save_every=config.save_every, label=" ".join(map(str, key.values())),
        )  # fmt: skip
        jr.checkpoint.save_weights(path, jax.tree.map(np.asarray, fitted.variables))
        costs["train_seconds"] = round(fitted.seconds, 2)
    variables = {"batch_stats": {}, **jr.checkpoint.load_weights(path)}
    counts = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))}
    return variables, {**costs, **counts}


def flops(step, create, config: Config, shape) -> float:
    """Matrix products and convolutions of one training step."""
    state = jax.eval_shape(create, jax.random.key(0))
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    return jr.flops.count_flops(step, state, batch).matmul


# ---- evaluation ---------------------------------------------------------------------------------


def evaluate(key: dict, config: Config, world: World, options, built: Built) -> dict[str, Any]:
    """Accuracies of a defended model, each under the name of what attacked it."""
    model, variables, _ = built
    test, eps = world.test, world.problem.eps
    options_ = {"batch_size": config.batch}
    grid = (0.0, eps / 2, eps, 2 * eps)
    attack = jr.linf_pgd(eps, steps=config.pgd_steps)
    curve = jr.evaluation.accuracy_curve(
        model.apply, variables, test.images, test.labels, attack, grid, key=jax.random.key(17),
        batch_size=max(config.batch // len(grid), 1), progress="PGD",
    )  # fmt: skip
    bare = build({**key, "method": "none"}, config, world, options)
    loss_fn = jr.evaluation.LossOfModel(bare.model.apply)
    blind = in_batches(
        lambda x, y, keys: attack(loss_fn, x, keys, args=(bare.variables, y)), test, config, 18
    )
    correct = partial(jr.evaluation.correct, model.apply, variables, **options_)
    found = {
        "clean_accuracy": float(curve[0].mean()),
        "grid": list(grid[1:]),
        f"pgd{config.pgd_steps}_accuracy": [float(part) for part in curve[1:].mean(1)],
        "nonadaptive_accuracy": float(correct(blind, test.labels).mean()),
        **latency(model, variables, test.images, config),
    }
    if key["method"] in config.final:
        found |= worst_case(key, config, world, options, built, bare, attack)
    return found


def worst_case(key, config, world, options, built, bare, attack) -> dict[str, Any]:
    """The standard suite and every attack that knows the defence, per-example worst case."""
    model, variables, _ = built
    few = world.test.take(slice(config.suite_images))
    logits_fn, eps = common.LogitsOf(model.apply), world.problem.eps
    report = jr.evaluate(
        logits_fn, few.images, few.labels, threats={"linf": eps}, key=jax.random.key(19),
        suite=common.suite_of(config.queries), args=(variables,), batch_size=config.batch,
        card_images=config.batch, curve_images=config.batch,
        out=common.run_folder(options, config, key),
    )  # fmt: skip
    threat = report.threats["linf"]
    robust = {"suite": threat.robust}
    for name, x_adv in adaptive(config, world, options, key, built, bare, attack, few):
        robust[name] = jr.evaluation.correct(
            model.apply, variables, x_adv, few.labels, batch_size=config.batch
        )
    flags = [check.name for check in threat.checks if check.verdict == "flag"]
    return {
        "suite_images": len(few.labels),
        "robust_accuracy": float(np.logical_and.reduce(list(robust.values())).mean()),
        "robust": [int(flag) for flag in np.logical_and.reduce(list(robust.values()))],
        "by_attack": {name: float(flags_.mean()) for name, flags_ in robust.items()},
        "card_flags": flags,
        "suite_seconds": round(sum(threat.seconds.values()), 1),
    }


def adaptive(config, world, options, key, built, bare, attack, few):
    """(name, x_adv) of attacks on code and features, through the pre-processor, and from others."""
    model, variables, _ = built
    front = model.config["preprocessor"]
    tap = f"foundation.{model.config['tap']}"
    encoders = {"features": Encoder(model.apply, tap)}
    if front and front["name"] == "autoencoder":
        encoders["latent"] = Encoder(model.apply, "preprocessor.latent")
    for number, (name, encode) in enumerate(encoders.items()):
        away, towards = attacks.latent_distance(encode), attacks.feature_match(encode)
        goal = few.images[other_class(few.labels)]

        def drive(x, y, keys, loss_fn=away, encode=encode):
            return attack(loss_fn, x, keys, args=(encode(x, variables), variables))

        def match(x, y, keys, goal, loss_fn=towards, encode=encode):
            return attack(loss_fn, x, keys, args=(encode(goal, variables), variables))

        yield f"{name} away", in_batches(drive, few, config, 20 + number)
        yield f"{name} matched", in_batches(match, few, config, 30 + number, goal)
    if front:
        through = attacks.bpda(Encoder(model.apply, "preprocessed"))
        loss_fn = Through(through, bare.model.apply)
        args = (variables, bare_with_head(bare, variables))
        yield (
            "bpda",
            in_batches(
                lambda x, y, keys: attack(loss_fn, x, keys, args=(*args, y)), few, config, 40
            ),
        )
    sources = {"none": bare}
    if "autoencoder" in config.methods and key["method"] != "autoencoder":
        sources["autoencoder"] = build({**key, "method": "autoencoder"}, config, world, options)
    for number, (name, source) in enumerate(sources.items()):
        if name == key["method"]:
            continue
        loss_fn = jr.evaluation.LossOfModel(source.model.apply)
        yield f"transfer from {name}", in_batches(
            lambda x, y, keys, loss_fn=loss_fn, source=source: attack(
                loss_fn, x, keys, args=(source.variables, y)
            ),
            few, config, 50 + number,
        )  # fmt: skip


def bare_with_head(bare: Built, variables: dict) -> dict:
    """The bare model's variables with the head that the defended model has."""
    return models.join(
        foundation=models.part(bare.variables, "foundation"), head=models.part(variables, "head")
    )


def other_class(labels: np.ndarray) -> np.ndarray:
    """For each example the next one of another class."""
    count = len(labels)
    return np.array(
        [next((i + k) % count for k in range(1, count) if labels[(i + k) % count] != labels[i])
         for i in range(count)]
    )  # fmt: skip


class Encoder(NamedTuple):
    """One activation of a model, as attacks on it call it."""

    apply: Any
    tap: str

    def __call__(self, x, variables):
        """The activation, [b, ...]."""
        return self.apply(variables, x, taps=(self.tap,))[1][self.tap]


class Through(NamedTuple):
    """Cross entropy of the bare model behind a pre-processor with another gradient."""

    through: Any
    apply: Any

    def __call__(self, x, variables, bare, labels):
        """One number per example."""
        return jr.losses.cross_entropy(self.apply(bare, self.through(x, variables)), labels)


def in_batches(run, examples, config: Config, number: int, *columns) -> np.ndarray:
    """run(x, labels, keys, *columns) over a set, in batches of one shape."""
    keys = jax.random.split(jax.random.key(number), len(examples.labels))
    parts = []
    for start in range(0, len(keys), config.batch):
        rows = np.minimum(np.arange(start, start + config.batch), len(keys) - 1)
        batch = (column[rows] for column in (examples.images, examples.labels, keys, *columns))
        parts.append(np.asarray(run(*map(jnp.asarray, batch))))
    return np.concatenate(parts)[: len(keys)]


def latency(model, variables, images, config: Config) -> dict[str, float]:
    """Milliseconds of one forward pass at batch 1 and 64, median of repeats."""
    run = jax.jit(model.apply)
    found = {}
    for size in (1, 64):
        x = jnp.asarray(images[np.arange(size) % len(images)])
        run(variables, x).block_until_ready()
        times = []
        for _ in range(config.latency_repeats):
            begun = time.perf_counter()
            run(variables, x).block_until_ready()
            times.append(time.perf_counter() - begun)
        found[f"milliseconds_batch_{size}"] = round(1e3 * float(np.median(times)), 3)
    return found


# ---- the table ----------------------------------------------------------------------------------


def world_of(problem: Problem, config: Config) -> World:
    """Data and foundation model of a problem."""
    train, test = (jr.data.load(problem.dataset, split) for split in ("train", "test"))
    if problem.classes is not None:
        train, test = (subset(part, problem.classes) for part in (train, test))
    foundation, published = models.load_efficientnet_lite0()
    return World(
        problem, train.take(slice(problem.train_images)), test.take(slice(config.test_images)),
        foundation, published, (config.side, config.side, 3),
    )  # fmt: skip


def subset(examples: jr.data.Dataset, classes: tuple[int, ...]) -> jr.data.Dataset:
    """The examples of some classes, renumbered in their order."""
    kept = examples.take(np.flatnonzero(np.isin(examples.labels, classes)))
    places = {label: place for place, label in enumerate(classes)}
    return kept._replace(
        labels=np.array([places[label] for label in kept.labels], np.int32),
        class_names=tuple(examples.class_names[label] for label in classes),
    )


def keys(config: Config) -> list[dict]:
    """All cells, seed by seed; rows that others are attacked from come first."""
    return [
        {"dataset": dataset, "method": method, "seed": seed, "eps": problem.eps}
        for seed in config.seeds
        for dataset, problem in config.problems.items()
        for method in config.methods
    ]


def main(config: Config, options) -> None:
    """Runs what is missing, then draws the plots and prints the table."""
    path = options.out / f"{NAME}-{options.preset}.json"
    results = common.Results(path, NAME, options.preset, config)
    if not options.plot_only:
        worlds = {}
        for key in tqdm(keys(config), desc=NAME, unit="cell"):
            if results.find(key) is not None:
                continue
            begun, name = time.monotonic(), key["dataset"]
            if name not in worlds:
                worlds[name] = world_of(config.problems[name], config)
            built = build(key, config, worlds[name], options)
            metrics = evaluate(key, config, worlds[name], options, built)
            results.add(key, {**metrics, **built.costs}, time.monotonic() - begun)
    plots_cropd.frontier(path)
    print(plots_cropd.table(path))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS)
    main(PRESETS[chosen.preset], chosen)
