"""CRoPD: what a trained pre-processor in front of a frozen foundation model is worth, and costs.

    python -m experiments.cropd                    # quick: emoji, one seed, PGD; minutes
    python -m experiments.cropd --preset laptop    # three sets and seeds, AutoAttack on two; hours
    python -m experiments.cropd --preset confirm   # the lead alone, by what chose nothing; hours
    python -m experiments.cropd --preset paper     # CIFAR, SVHN, ImageNette, on accelerators
    python -m experiments.cropd --preset smoke     # seconds

EfficientNet-lite0 stays as published. Each row puts something in front of it and fits a linear head
on clean features; "alf" trains the head adversarially, "aff" the whole model, which is what the
pre-processor is meant to save. All are attacked white-box, through everything: PGD over a grid, and
for the final rows AutoAttack's standard suite together with attacks on the code and the features,
BPDA and transfer, per-example worst case (cut-outs by PGD alone). "Non-adaptive" is an attack on
the bare model, shown to say how little it says. A run that is stopped goes on.

To expect of the laptop preset, on an EPYC's core: 1 to 25 minutes a row, fine-tuning 8 to 27; worst
case on the emoji 0 % bare, 47 behind the denoiser, 54 behind ours, 66 fine-tuned; on MNIST-5k
0, 48, 59 and 83.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrobust as jr
from experiments import common, cropd_evaluation, plots_cropd, records
from experiments.cropd_settings import (
    PRESETS,
    Built,
    Config,
    Method,
    Problem,
    World,
    applies,
)
from jaxrobust import cropd, models, training

NAME = "cropd"
FILTERS = ("jpeg", "total_variation")
FRONTS = ("autoencoder", "denoiser", *FILTERS)


# ---- training -----------------------------------------------------------------------------------


def build(key: dict, config: Config, world: World, options) -> Built:
    """The cell's defended model, trained if it is not there."""
    method, folder = config.methods[key["method"]], records.run_folder(options, config, key)
    if method.kind in ("alf", "aff"):
        return rival(key, config, world, options)
    front, ours, costs = None, None, {}
    if method.kind in FRONTS:
        # Nothing that is trained here may look at the model that it will protect.
        blind = world._replace(foundation=None, published=None)
        front, ours, costs = preprocessor(key, config, blind, options)
    model = models.defend(front, world.size, world.foundation, world.classes)
    variables = models.join(preprocessor=ours, foundation=world.published)

    def make():
        begun = time.perf_counter()
        head = fit_head(model, variables, config, world, common.local_mesh(options))
        return head, {"head_seconds": round(time.perf_counter() - begun, 2)}

    head, taken = records.kept(folder, "head", make)
    whole = models.join(preprocessor=ours, foundation=world.published, head=head)
    return Built(model, whole, {**costs, **taken})


def fit_head(model, variables, config: Config, world: World, mesh) -> dict:
    """A linear head on clean features, as the user of a foundation model would fit it."""
    found = cropd.features(model, variables, world.train.images, batch_size=config.batch, mesh=mesh)
    return cropd.fit_head(found, world.train.labels, world.classes, decay=config.decay)


def preprocessor(key, config: Config, world: World, options) -> tuple[models.Model, dict, dict]:
    """(model, variables, costs) of what stands in front; it sees no foundation model."""
    method, problem = config.methods[key["method"]], world.problem
    shape = world.train.images.shape[1:]
    if method.kind in FILTERS:
        return models.build(method.kind, **method.options), {"params": {}}, {}
    model = autoencoder_of(method, problem, shape)
    objective = objective_of(method, problem, config, shape)
    epochs = epochs_of(model, objective, problem, config, shape)
    fitted = trained(key, config, world, options, model, objective, epochs, config.rate)
    return model, fitted[0], fitted[1]


def autoencoder_of(method: Method, problem: Problem, shape: tuple[int, ...]):
    """The auto-encoder that a method trains for images [h, w, c]."""
    widths, channels = problem.wide if method.wide else (problem.widths, problem.latent_channels)
    return models.autoencoder(
        shape, widths=widths, patch=problem.patch, latent_norm=True,
        latent_channels=method.latent_channels or channels,
    )  # fmt: skip


def objective_of(
    method: Method, problem: Problem, config: Config, shape: tuple[int, ...]
) -> training.Objective:
    """What a pre-processor of images [h, w, c] is trained for."""
    if method.kind == "denoiser":
        # Summed over an image as in the other rows: gradients are clipped, so the scale matters.
        sigma = method.sigma or method.noise * problem.noise * problem.eps
        return training.denoising(sigma, mse=float(np.prod(shape)))
    weights = cropd.Weights(method.clean, method.contrast, method.denoising, method.displacement)
    radius = (problem.radius if method.radius is None else method.radius) * problem.eps
    if method.attack == "n_fgsm":
        attack = jr.n_fgsm(radius, noise=problem.spread, start=problem.start)
    else:
        attack = jr.linf_pgd(radius, steps=config.attack_steps)
    aim = method.aim or problem.aim
    if aim == "other":
        aim = next(one for one in cropd.AIMS if one != problem.aim)
    return cropd.robust_autoencoder(
        attack, weights=weights, form=method.form, temperature=method.temperature, aim=aim
    )


def epochs_of(model, objective, problem: Problem, config: Config, shape: tuple[int, ...]) -> int:
    """The epochs that cost as many FLOPs as the preset's of the reference."""
    reference = objective_of(config.methods[config.reference], problem, config, shape)
    ratio = flops(model, reference, config, shape) / flops(model, objective, config, shape)
    return round(config.epochs * ratio)


def rival(key, config: Config, world: World, options) -> Built:
    """Adversarial training of the head alone, or of all of the foundation model.

    A tenth of the training images chooses the epoch, and what is counted ends with that epoch.
    """
    frozen = ("foundation",) if config.methods[key["method"]].kind == "alf" else ()
    model = models.defend(None, world.size, world.foundation, world.classes, frozen=frozen)
    world, held_out = without_a_tenth(world)
    start = models.join(foundation=world.published)
    mesh = common.local_mesh(options)
    head = fit_head(model, start, config, world, mesh)
    start = models.join(foundation=world.published, head=head)
    attack = jr.linf_pgd(world.problem.eps, steps=config.rival_steps)
    per_epoch = jr.data.steps_per_epoch(world.train, config.batch_size)
    ramp = optax.linear_schedule(0.0, 1.0, config.ramp_epochs * per_epoch)
    objective = training.adversarial(attack, eps_schedule=ramp)

    def validate(variables):
        variables = jr.parallel.replicate(jax.tree.map(np.asarray, variables), mesh)
        right = jr.evaluation.correct(
            model.apply, variables, held_out.images, held_out.labels, attack=attack,
            key=jax.random.key(0), batch_size=config.batch, mesh=mesh,
        )  # fmt: skip
        return {"score": right.mean()}

    variables, costs = trained(
        key, config, world, options, model, objective, config.rival_epochs, config.rival_rate,
        start, validate=validate, patience=config.patience,
    )  # fmt: skip
    return Built(model, variables, costs)


def without_a_tenth(world: World) -> tuple[World, jr.data.Dataset]:
    """The world of a rival, and the training images that choose its epoch."""
    kept = len(world.train.labels) - len(world.train.labels) // 10
    held_out = world.train.take(slice(kept, len(world.train.labels)))
    return world._replace(train=world.train.take(slice(kept))), held_out


def trained(
    key, config, world, options, model, objective, epochs, rate, start=None, **choosing
) -> tuple[dict, dict]:
    """(variables, costs) after training; `start` is what it begins from, `choosing` for `fit`."""
    folder, shape = records.run_folder(options, config, key), world.train.images.shape[1:]
    per_epoch = jr.data.steps_per_epoch(world.train, config.batch_size)
    step, optimizer = step_of(model, objective, epochs * per_epoch, rate, config, world.problem)

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

    def make():
        mesh = common.mesh_for(options, config.batch_size)
        state = jr.parallel.create(create, mesh, jax.random.key(key["seed"]))
        fitted = training.fit(
            step, state, world.train, batch_size=config.batch_size, epochs=epochs,
            seed=key["seed"], mesh=mesh, mapping=options.mapping, averaged=True,
            directory=folder, save_every=config.save_every, label=" ".join(map(str, key.values())),
            **choosing,
        )  # fmt: skip
        share = fitted.best_epoch / fitted.epochs
        costs = {
            "train_epochs": fitted.best_epoch,
            "train_flops": flops(model, objective, config, shape) * per_epoch * fitted.best_epoch,
            "train_seconds": round((fitted.seconds - fitted.validation_seconds) * share, 2),
            "parameters": trained_parameters(model, fitted.variables["params"]),
        }
        return fitted.variables, costs

    return records.kept(folder, "weights", make)


def trained_parameters(model, params: dict) -> int:
    """How many numbers training may change."""
    still = model.config.get("frozen", ())
    moving = {name: leaves for name, leaves in params.items() if name not in still}
    return sum(leaf.size for leaf in jax.tree.leaves(moving))


def step_of(model, objective, steps: int, rate: float, config: Config, problem: Problem):
    """(training step, its optimizer) of a run of so many steps."""
    schedule = training.learning_rate("cosine", rate, steps, warmup=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    parts = [partial(jr.data.pad_crop, pad=problem.shift)] + [jr.data.flip] * problem.flip
    step = training.train_step(
        model, optimizer, objective, augment=jr.data.compose(*parts), ema_decay=config.ema_decay
    )
    return step, optimizer


def flops(model, objective: training.Objective, config: Config, shape) -> float:
    """Matrix products and convolutions of one training step."""
    optimizer = optax.sgd(0.0)

    def create(seed):
        return training.create_state(model, optimizer, seed, shape, extra=objective.extra)

    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    step = training.train_step(model, optimizer, objective)
    return jr.flops.count_flops(step, jax.eval_shape(create, jax.random.key(0)), batch).matmul


# ---- the table ----------------------------------------------------------------------------------


def world_of(problem: Problem, config: Config) -> World:
    """Data and foundation model of a problem."""
    splits = problem.train_split, problem.test_split
    train, test = (jr.data.load(problem.dataset, split) for split in splits)
    if problem.classes is not None:
        train, test = (subset(part, problem.classes) for part in (train, test))
    foundation, published = models.load_efficientnet_lite0()
    return World(
        problem, train.take(slice(problem.train_images)), test.take(slice(config.test_images)),
        foundation, published, (problem.side, problem.side, 3),
    )  # fmt: skip


def subset(examples: jr.data.Dataset, classes: tuple[int, ...]) -> jr.data.Dataset:
    """The examples of some classes, renumbered in their order."""
    kept = examples.take(np.flatnonzero(np.isin(examples.labels, classes)))
    places = {label: place for place, label in enumerate(classes)}
    return kept.replace(
        labels=np.array([places[label] for label in kept.labels], np.int32),
        class_names=tuple(examples.class_names[label] for label in classes),
    )


def neighbours(key, config: Config, world: World, options) -> dict[str, Built]:
    """The models whose adversarial images a row must withstand too."""
    return {
        name: build({**key, "method": name}, config, world, options)
        for name in ("none", "autoencoder")
        if name in config.methods and name != key["method"]
    }


def keys(config: Config) -> list[dict]:
    """All cells, seed by seed, sweeps for the first; what others are attacked from comes first."""
    return [
        {"dataset": dataset, "method": method, "seed": seed, "eps": problem.eps}
        for seed in config.seeds
        for dataset, problem in config.problems.items()
        for method in config.methods
        if applies(problem, config.methods[method])
        if seed == config.seeds[0] or not {dataset, method} & set(config.single)
    ]


def main(config: Config, options) -> None:
    """Runs what is missing, then draws the plots and prints the table."""
    path = options.out / f"{NAME}-{options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    if not options.plot_only:
        worlds = {}
        for key in results.missing(keys(config), partial(records.run_folder, options, config)):
            begun, name = time.monotonic(), key["dataset"]
            if name not in worlds:
                worlds[name] = world_of(config.problems[name], config)
            built = build(key, config, worlds[name], options)
            near = neighbours(key, config, worlds[name], options)
            metrics = cropd_evaluation.evaluate(
                key, config, worlds[name], built, near, records.run_folder(options, config, key),
                common.local_mesh(options),
            )  # fmt: skip
            results.add(key, {**metrics, **built.costs}, time.monotonic() - begun)
    plots_cropd.frontier(path)
    plots_cropd.bound(path)
    print(plots_cropd.table(path))
    print(plots_cropd.verdict(path))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS)
    main(PRESETS[chosen.preset], chosen)
