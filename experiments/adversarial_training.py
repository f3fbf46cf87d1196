"""Adversarial training against ordinary training: clean and robust accuracy, and its price.

    python -m experiments.adversarial_training                   # quick: linf, one seed, minutes
    python -m experiments.adversarial_training --preset laptop   # the README's table, three seeds
    python -m experiments.adversarial_training --preset paper    # CIFAR-10, on accelerators
    python -m experiments.adversarial_training --preset smoke    # seconds

Standard training, N-FGSM (also guarded), PGD-AT, TRADES and MART train one network, equally long.
Each is then attacked with the margin-selected worst of PGD-100 from 5 starts, and along a range of
eps by PGD-20. On two cores quick takes about five minutes and laptop about half an hour; what to
expect of them is the README's table. A run that is stopped goes on where it was.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrobust as jr
from experiments import common, plots, records
from jaxrobust import training

NAME = "adversarial_training"


# At the rate of the others N-FGSM collapses (0 % under PGD): it gets a lower one and a longer
# warm-up of eps. With the guard it bears more; its control has the same settings without it.
GUARDED = {"peak_rate": 5e-3, "eps_warmup": 0.5}
MNIST = {
    "standard": {"peak_rate": 2e-3},
    "n_fgsm": {"peak_rate": 2e-3, "eps_warmup": 0.7, "shift": 0},
    "n_fgsm_guarded": GUARDED,
    "n_fgsm_unguarded": GUARDED,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One preset; a cell is one (model, method, threat, seed)."""

    dataset: str = "mnist5k"
    train_split: str = "train+validation"
    train_images: int | None = None
    validation_split: str | None = None
    models: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {"small_cnn": {}}
    )
    methods: tuple[str, ...] = (
        "standard",
        "n_fgsm",
        "n_fgsm_guarded",
        "n_fgsm_unguarded",
        "pgd_at",
        "trades",
        "mart",
    )
    threats: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"linf": 0.3, "l2": 2.0}
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    # Training
    epochs: int = 20
    batch_size: int = 50
    optimizer: str = "adam"
    peak_rate: float = 1e-2
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    eps_warmup: float = 0.3
    attack_steps: int = 5
    beta_trades: float = 6.0
    beta_mart: float = 5.0
    shift: int = 1
    flip: bool = False
    ema_decay: float | None = 0.99
    bfloat16: bool = False
    save_every: float = 30.0  # seconds between checkpoints
    # What a method has of its own, by its name: any of the training fields above.
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: MNIST)
    # Evaluation
    test_images: int = 1000
    pgd_steps: int = 100
    pgd_restarts: int = 5
    curve: Mapping[str, tuple[float, ...]] = dataclasses.field(
        default_factory=lambda: {
            "linf": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4),
            "l2": (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0),
        }
    )
    curve_steps: int = 20

    def of(self, method: str) -> "Config":
        """The configuration with the method's own settings."""
        return dataclasses.replace(self, **self.overrides.get(method, {}))


CIFAR = {
    "dataset": "cifar10",
    "train_split": "train[:49000]",
    "validation_split": "train[49000:]",
    "threats": {"linf": 8 / 255},
    "models": {
        "preact_resnet18": {"norm": "batch"},
        "wide_resnet": {"depth": 34, "width": 10, "norm": "batch"},
    },
    "epochs": 200,
    "batch_size": 128,
    "optimizer": "sgd",
    "peak_rate": 0.1,
    "schedule": "piecewise",
    "warmup": 0.0,
    "weight_decay": 5e-4,
    "eps_warmup": 0.0,
    "attack_steps": 10,
    "shift": 4,
    "flip": True,
    "ema_decay": None,
    # Rice et al. 2020 for PGD-AT; the others as their papers and official code have them.
    "overrides": {
        **{
            name: {"epochs": 30, "peak_rate": 0.2, "schedule": "one_cycle"}
            for name in ("n_fgsm", "n_fgsm_guarded", "n_fgsm_unguarded")
        },
        "trades": {"epochs": 76, "weight_decay": 2e-4},
        "mart": {"epochs": 120, "peak_rate": 0.01, "weight_decay": 3.5e-3},
    },
    "test_images": 10000,
    "curve": {"linf": tuple(k / 255 for k in (0, 1, 2, 4, 6, 8, 12, 16))},
}

# Where the rate of a piecewise schedule drops, in shares of the run; half and three quarters of it
# are Rice et al.'s. TRADES' and MART's code drops it at epochs 75, 90 and 100 however long it runs.
BOUNDARIES = {"trades": (75 / 76,), "mart": (75 / 120, 90 / 120, 100 / 120)}

PRESETS = {
    "smoke": Config(
        train_images=200,
        seeds=(0,),
        epochs=2,
        attack_steps=2,
        save_every=0.5,
        test_images=50,
        pgd_steps=3,
        pgd_restarts=2,
        curve={"linf": (0.0, 0.1, 0.3), "l2": (0.0, 1.0, 2.0)},
        curve_steps=2,
    ),
    "quick": Config(
        methods=("standard", "n_fgsm", "pgd_at"),
        threats={"linf": 0.3},
        seeds=(0,),
        curve={"linf": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)},
    ),
    "laptop": Config(),
    "paper": Config(**CIFAR),
}


def objective_of(method: str, threat: str, eps: float, config: Config, steps: int):
    """The training objective of a method; `steps` is the length of the run."""
    rising = round(config.eps_warmup * steps)
    ramp = optax.linear_schedule(0.0, 1.0, rising) if rising else None
    attack = partial(jr.pgd, threat, eps, steps=config.attack_steps)
    if method == "standard":
        return training.standard()
    # In l2 the one-step recipe is a step of the ball's radius from a start in the ball.
    one_step = jr.n_fgsm(eps) if threat == "linf" else jr.l2_pgd(eps, steps=1, step_size=eps)
    if method in ("n_fgsm", "n_fgsm_unguarded"):
        return training.adversarial(one_step, eps_schedule=ramp)
    if method == "n_fgsm_guarded":
        return training.guarded_n_fgsm(
            one_step, attack(), check_every=10, gap=0.1, rescue_steps=10, eps_schedule=ramp
        )
    if method == "pgd_at":
        return training.adversarial(attack(), eps_schedule=ramp)
    if method == "trades":
        return training.trades(attack(start="gaussian"), config.beta_trades, eps_schedule=ramp)
    if method == "mart":
        return training.mart(attack(), config.beta_mart, eps_schedule=ramp)
    raise ValueError(f"method must be one of {tuple(plots.NAMES)}, got {method!r}")


def optimizer_of(config: Config, steps: int, method: str = "") -> optax.GradientTransformation:
    """Adam or SGD with the configuration's schedule."""
    rate = training.learning_rate(
        config.schedule, config.peak_rate, steps, warmup=config.warmup,
        boundaries=BOUNDARIES.get(method, (0.5, 0.75)),
    )  # fmt: skip
    if config.optimizer == "sgd":
        return training.sgd(rate, weight_decay=config.weight_decay)
    return optax.adamw(rate, weight_decay=config.weight_decay)


def augmentation(config: Config):
    """Random shifts and flips, or None."""
    parts = [partial(jr.data.pad_crop, pad=config.shift)] if config.shift else []
    parts += [jr.data.flip] if config.flip else []
    return jr.data.compose(*parts) if parts else None


def train(key: dict, whole: Config, sets: dict, options, model) -> training.Fitted:
    """Trains one cell's network, or goes on where an earlier run was stopped."""
    config = whole.of(key["method"])
    mesh = common.mesh_for(options, config.batch_size)
    train_set = sets["train"]
    steps = config.epochs * jr.data.steps_per_epoch(train_set, config.batch_size)
    objective = objective_of(key["method"], key["threat"], key["eps"], config, steps)
    optimizer = optimizer_of(config, steps, key["method"])
    averaged = config.ema_decay is not None
    state = jr.parallel.create(
        lambda seed: training.create_state(
            model,
            optimizer,
            seed,
            train_set.images.shape[1:],
            ema=averaged,
            extra=objective.extra,
        ),
        mesh,
        jax.random.key(key["seed"]),
    )
    step = training.train_step(
        model,
        optimizer,
        objective,
        augment=augmentation(config),
        dtype=jnp.bfloat16 if config.bfloat16 else None,
        attack_dtype=jnp.bfloat16 if config.bfloat16 else None,
        ema_decay=config.ema_decay,
    )
    return training.fit(
        step,
        state,
        train_set,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=key["seed"],
        mesh=mesh,
        mapping=options.mapping,
        validate=validation(model, key, config, sets),
        averaged=averaged,
        directory=records.run_folder(options, whole, key),
        save_every=config.save_every,
        label=f"{key['method']} {key['threat']} seed {key['seed']}",
    )


def validation(model, key, config, sets):
    """Robust accuracy under PGD-10 on the validation split, for the choice of the best epoch."""
    if "validation" not in sets:
        return None
    held_out = sets["validation"]
    attack = jr.pgd(key["threat"], key["eps"], steps=10)
    mesh = jr.parallel.data_mesh(jax.local_devices())

    def validate(variables):
        right = jr.evaluation.correct(
            model.apply,
            jr.parallel.replicate(variables, mesh),
            held_out.images,
            held_out.labels,
            attack=attack,
            key=jax.random.key(0),
            mesh=mesh,
        )
        return {"score": right.mean()}

    return validate


def evaluate(key: dict, config: Config, test, model, variables) -> dict[str, Any]:
    """Clean accuracy, worst of PGD restarts, and the curve over eps."""
    apply, images, labels = model.apply, test.images, test.labels
    mesh = jr.parallel.data_mesh(jax.local_devices())
    batch_size = 250 - 250 % mesh.size
    correct = partial(
        jr.evaluation.correct, apply, variables, images, labels, batch_size=batch_size, mesh=mesh
    )
    strong = jr.restarts(
        jr.pgd(key["threat"], key["eps"], steps=config.pgd_steps),
        config.pgd_restarts,
        select=MarginOf(apply),
    )
    begun = time.monotonic()
    robust = correct(attack=strong, key=jax.random.key(17), progress=True)
    seconds = time.monotonic() - begun
    curve = jr.evaluation.accuracy_curve(
        apply,
        variables,
        images,
        labels,
        jr.pgd(key["threat"], key["eps"], steps=config.curve_steps),
        config.curve[key["threat"]],
        key=jax.random.key(18),
        batch_size=batch_size,
        mesh=mesh,
        progress=True,
    )
    return {
        "clean_accuracy": float(correct().mean()),
        f"pgd{config.pgd_steps}x{config.pgd_restarts}_accuracy": float(robust.mean()),
        "curve_eps": list(config.curve[key["threat"]]),
        f"curve_pgd{config.curve_steps}_accuracy": [float(part) for part in curve.mean(1)],
        "attack_seconds": round(seconds, 2),
    }


@dataclasses.dataclass(frozen=True)
class MarginOf:
    """By this, the restarts are compared: it is positive just where the network is wrong."""

    apply: Any

    def __call__(self, x, variables, labels):
        """The margin of each example, [b]."""
        return jr.losses.margin(self.apply(variables, x), labels)


def training_flops(key: dict, config: Config, train_set, model) -> float:
    """Floating-point operations of the whole training, counted over the step's jaxpr."""
    config = config.of(key["method"])
    steps = config.epochs * jr.data.steps_per_epoch(train_set, config.batch_size)
    objective = objective_of(key["method"], key["threat"], key["eps"], config, steps)
    optimizer = optimizer_of(config, steps, key["method"])
    shape = train_set.images.shape[1:]
    state = jax.eval_shape(
        lambda: training.create_state(
            model,
            optimizer,
            jax.random.key(0),
            shape,
            ema=config.ema_decay is not None,
            extra=objective.extra,
        )
    )
    step = training.train_step(
        model,
        optimizer,
        objective,
        augment=augmentation(config),
        ema_decay=config.ema_decay,
    )
    size = config.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    return jr.flops.count_flops(step, state, batch).matmul * steps


def cell(key: dict, config: Config, sets: dict, options, model) -> dict[str, Any]:
    """Everything that one row's entry needs."""
    folder = records.run_folder(options, config, key)
    with records.alone(folder):
        fitted = train(key, config, sets, options, model)
        variables = jax.tree.map(np.asarray, fitted.variables)
        if jax.process_index() == 0:
            jr.checkpoint.save_weights(
                folder / "weights.safetensors",
                variables,
                metadata={name: str(value) for name, value in key.items()},
            )
    return {
        **evaluate(key, config, sets["test"], model, variables),
        "train_seconds": round(fitted.seconds, 2),
        "train_flops": training_flops(key, config, sets["train"], model),
        "epochs": fitted.epochs,
        "best_epoch": fitted.best_epoch,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
    }


def keys(config: Config) -> list[dict]:
    """All cells, seed by seed, so that a stopped run has whole seeds first."""
    return [
        {
            "model": model,
            "method": method,
            "dataset": config.dataset,
            "threat": threat,
            "eps": eps,
            "seed": seed,
            "suite": f"pgd{config.pgd_steps}x{config.pgd_restarts}",
            "images": config.test_images,
        }
        for seed in config.seeds
        for model in config.models
        for threat, eps in config.threats.items()
        for method in config.methods
    ]


def load(config: Config) -> dict[str, Any]:
    """The splits that the configuration names."""
    sets = {
        "train": jr.data.load(config.dataset, config.train_split).take(slice(config.train_images)),
        "test": jr.data.load(config.dataset, "test").take(slice(config.test_images)),
    }
    if config.validation_split:
        sets["validation"] = jr.data.load(config.dataset, config.validation_split)
    return sets


def main(config: Config, options) -> None:
    """Runs what is missing, then draws the plots and prints the table."""
    path = options.out / f"{NAME}-{options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    if not options.plot_only:
        sets = load(config)
        # Built once: equal models of different cells then share what is compiled.
        models = {name: jr.models.build(name, **config.models[name]) for name in config.models}
        for key in results.missing(keys(config), partial(records.run_folder, options, config)):
            begun = time.monotonic()
            metrics = cell(key, config, sets, options, models[key["model"]])
            results.add(key, metrics, time.monotonic() - begun)
        if jax.process_index() == 0:
            plots.adversarial_examples(config, options, keys(config), sets["test"])
    if jax.process_index() == 0:
        plots.accuracy_curves(path)
        print(plots.training_table(path))
        print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS)
    main(PRESETS[chosen.preset], chosen)
