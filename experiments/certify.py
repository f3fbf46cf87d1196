"""Certified accuracy by randomized smoothing: how to train for it, and what it costs.

    python -m experiments.certify                    # quick: one sigma, one seed, minutes
    python -m experiments.certify --preset laptop    # three sigmas, three seeds, hours; resumes
    python -m experiments.certify --preset paper     # CIFAR-10, on accelerators
    python -m experiments.certify --preset smoke     # seconds

One network is trained plainly, with Gaussian noise (Cohen et al. 2019), with noise and consistency
(Jeong and Shin 2020) and by SmoothAdv (Salman et al. 2019), for equally many passes over the data,
and certified in l2. "gaussian" makes two noisy copies of an image per step, as the two methods
after it do, so that it costs what "consistency" costs. A run that is stopped goes on where it was.
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
from experiments import common, plots_certify, records
from experiments.adversarial_training import augmentation, load, optimizer_of
from jaxrobust import smoothing, training

NAME = "certify"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One preset; a cell is one (method, sigma, seed)."""

    dataset: str = "mnist5k"
    train_split: str = "train+validation"
    train_images: int | None = None
    validation_split: str | None = None
    model: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "small_cnn"})
    methods: tuple[str, ...] = ("standard", "gaussian", "consistency", "smooth_adv")
    sigmas: tuple[float, ...] = (0.25, 0.5, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    # Training
    epochs: int = 20
    batch_size: int = 50
    optimizer: str = "adam"
    peak_rate: float = 2e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    shift: int = 1
    flip: bool = False
    ema_decay: float | None = 0.99
    noise_samples: int = 2
    consistency: float = 10.0
    entropy: float = 0.5
    attack_eps: float = 1.0
    attack_steps: int = 2
    eps_warmup: float = 0.3
    save_every: float = 30.0  # seconds between checkpoints
    # Certification
    test_images: int = 500  # as many as Cohen et al. certify
    samples0: int = 100
    samples: int = 10_000
    alpha: float = 0.001
    block: int = 250  # images between two saved states
    radii: tuple[float, ...] = tuple(np.arange(0, 3.51, 0.125).tolist())
    table_radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5)


PRESETS = {
    "smoke": Config(
        train_images=200,
        sigmas=(0.5,),
        seeds=(0,),
        epochs=2,
        attack_steps=1,
        save_every=0.5,
        test_images=20,
        samples=200,
        block=10,
        radii=(0.0, 0.25, 0.5, 0.75, 1.0),
        table_radii=(0.0, 0.5, 1.0),
    ),
    "quick": Config(sigmas=(0.5,), seeds=(0,), samples=5_000, block=125),
    "laptop": Config(),
    # Networks, schedules and numbers of the papers: ResNet-110 is a PreActResNet-18 here.
    "paper": Config(
        dataset="cifar10",
        train_split="train",
        model={"name": "preact_resnet18", "norm": "batch"},
        epochs=150,
        batch_size=256,
        optimizer="sgd",
        peak_rate=0.1,
        schedule="piecewise",
        warmup=0.0,
        weight_decay=1e-4,
        shift=4,
        flip=True,
        ema_decay=None,
        consistency=20.0,
        attack_eps=0.5,
        attack_steps=10,
        eps_warmup=10 / 150,
        test_images=10_000,
        samples=100_000,
        block=500,
    ),
}


@dataclasses.dataclass(frozen=True)
class LogitsOf:
    """A model as (x, variables) -> logits; equal for equal models, so that it compiles once."""

    apply: Any

    def __call__(self, x, variables):
        """[b, classes] logits."""
        return self.apply(variables, x)


def objective_of(method: str, sigma: float, config: Config, steps: int):
    """The training objective of a method; `steps` is the length of the run."""
    samples = config.noise_samples
    if method == "standard":
        return training.standard()
    if method == "gaussian":
        return training.gaussian(sigma, samples=samples)
    if method == "consistency":
        return training.consistency(
            sigma, samples=samples, weight=config.consistency, entropy=config.entropy
        )
    if method == "smooth_adv":
        rising = round(config.eps_warmup * steps)
        ramp = optax.linear_schedule(0.0, 1.0, rising) if rising else None
        eps, count = config.attack_eps, config.attack_steps
        attack = jr.l2_pgd(eps, steps=count, step_size=2 * eps / count)
        return training.smooth_adv(attack, sigma, samples=samples, eps_schedule=ramp)
    raise ValueError(f"method must be one of {tuple(plots_certify.NAMES)}, got {method!r}")


def parts_of(key: dict, config: Config, train_set, model):
    """(optimizer, objective, step, state maker) of one cell's training."""
    steps = config.epochs * jr.data.steps_per_epoch(train_set, config.batch_size)
    objective = objective_of(key["method"], key["sigma"], config, steps)
    optimizer = optimizer_of(config, steps)
    step = training.train_step(
        model, optimizer, objective, augment=augmentation(config), ema_decay=config.ema_decay
    )
    make = partial(
        training.create_state,
        model,
        optimizer,
        shape=train_set.images.shape[1:],
        ema=config.ema_decay is not None,
    )
    return step, make, steps


def trained_as(key: dict) -> dict:
    """What of a cell its training depends on: plain training knows no sigma."""
    sigma = 0.0 if key["method"] == "standard" else key["sigma"]
    return {"method": key["method"], "sigma": sigma, "seed": key["seed"]}


def train(key: dict, config: Config, train_set, options, model) -> training.Fitted:
    """Trains one cell's network, or goes on where an earlier run was stopped."""
    mesh = common.mesh_for(options, config.batch_size)
    step, make, _ = parts_of(key, config, train_set, model)
    return training.fit(
        step,
        jr.parallel.create(make, mesh, jax.random.key(key["seed"])),
        train_set,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=key["seed"],
        mesh=mesh,
        mapping=options.mapping,
        averaged=config.ema_decay is not None,
        directory=records.run_folder(options, config, trained_as(key)),
        save_every=config.save_every,
        label=f"{key['method']} {key['sigma']} seed {key['seed']}",
    )


def certificates(key: dict, config: Config, images, folder, logits_fn, variables):
    """The certificates of all images, and the seconds that they took; block by block on disk."""
    mesh = jr.parallel.data_mesh(jax.local_devices())
    keys = jr.attacks.example_keys(jax.random.key(23), len(images))
    blocks = []
    starts = range(0, len(images), config.block)
    for start in tqdm(starts, desc="certify", unit="block", leave=False):
        path = folder / f"certificates-{start}.npz"
        if not path.exists():
            part = slice(start, start + config.block)
            begun = time.monotonic()
            got = smoothing.certify(
                logits_fn,
                images[part],
                keys[part],
                sigma=key["sigma"],
                samples0=config.samples0,
                samples=config.samples,
                alpha=config.alpha,
                args=(variables,),
                mesh=mesh,
                batch_size=config.block,
            )
            save(path, **got._asdict(), seconds=time.monotonic() - begun)
        with np.load(path) as saved:
            blocks.append({name: saved[name] for name in saved.files})
    join = lambda name: np.concatenate([block[name] for block in blocks])  # noqa: E731
    whole = smoothing.Certificate(*(join(name) for name in smoothing.Certificate._fields))
    return whole, float(sum(block["seconds"] for block in blocks))


def save(path, **arrays) -> None:
    """Writes an .npz whole or not at all."""

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    records.once(path, write)


def cell(key: dict, config: Config, sets: dict, options, model) -> dict[str, Any]:
    """Everything that one row's entry needs."""
    with records.alone(records.run_folder(options, config, trained_as(key))):
        fitted = train(key, config, sets["train"], options, model)
    variables = jax.tree.map(np.asarray, fitted.variables)
    test = sets["test"]
    folder = records.run_folder(options, config, key)
    certificate, seconds = certificates(
        key, config, test.images, folder, LogitsOf(model.apply), variables
    )
    right = jr.evaluation.correct(model.apply, variables, test.images, test.labels)
    accuracy = smoothing.certified_accuracy(certificate, test.labels, config.radii)
    return {
        "clean_accuracy": float(right.mean()),
        "smoothed_accuracy": float(accuracy[0]),
        "abstained": float((certificate.label == smoothing.ABSTAIN).mean()),
        "average_radius": smoothing.average_radius(certificate, test.labels),
        "radii": list(config.radii),
        "certified_accuracy": [float(value) for value in accuracy],
        "table_accuracy": [
            float(value)
            for value in smoothing.certified_accuracy(certificate, test.labels, config.table_radii)
        ],
        "train_seconds": round(fitted.seconds, 2),
        "train_flops": training_flops(key, config, sets["train"], model),
        "certify_seconds": round(seconds, 2),
    }


def training_flops(key: dict, config: Config, train_set, model) -> float:
    """Floating-point operations of the whole training, counted over the step's jaxpr."""
    step, make, steps = parts_of(key, config, train_set, model)
    state = jax.eval_shape(make, jax.random.key(0))
    size, shape = config.batch_size, train_set.images.shape[1:]
    batch = {
        "image": jax.ShapeDtypeStruct((size, *shape), np.float32),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
        "index": jax.ShapeDtypeStruct((size,), np.int32),
    }
    return jr.flops.count_flops(step, state, batch).matmul * steps


def keys(config: Config) -> list[dict]:
    """All cells, seed by seed, so that a stopped run has whole seeds first."""
    return [
        {
            "model": config.model["name"],
            "method": method,
            "dataset": config.dataset,
            "threat": "l2",
            "sigma": sigma,
            "seed": seed,
            "suite": f"certify{config.samples}",
            "images": config.test_images,
        }
        for seed in config.seeds
        for sigma in config.sigmas
        for method in config.methods
    ]


def main(config: Config, options) -> None:
    """Runs what is missing, then draws the plot and prints the table."""
    path = options.out / f"{NAME}-{options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    if not options.plot_only:
        sets = load(config)
        model = jr.models.build(**config.model)
        for key in results.missing(keys(config), partial(records.run_folder, options, config)):
            begun = time.monotonic()
            metrics = cell(key, config, sets, options, model)
            results.add(key, metrics, time.monotonic() - begun)
    if jax.process_index() == 0:
        plots_certify.certified_curves(path)
        print(plots_certify.certified_table(path))
        print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS)
    main(PRESETS[chosen.preset], chosen)
