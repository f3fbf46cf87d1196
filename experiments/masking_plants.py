"""Every check of the gradient-masking report card on planted defences and on honest networks.

    python -m experiments.masking_plants                   # 12 networks, 64 plants
    python -m experiments.masking_plants --preset quick    # 4 networks, 32 plants
    python -m experiments.masking_plants --preset smoke    # 1 network, 3 plants

The limits in `jaxrobust/evaluation/checks.py` are set on what this prints. The tests plant others:
other strengths, other forms, another network. Beside the flags stands what white-box attacks leave:
a plant without a flag that leaves what they leave of the bare network masks nothing.
"""

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import stop_gradient
from tqdm import tqdm

import jaxrobust as jr
from experiments import common, records
from jaxrobust import evaluation, training

NAME = "masking_plants"

# ---- networks -----------------------------------------------------------------------------------

CNN = {"name": "small_cnn", "channels": (8, 16), "strides": (1, 2), "kernel": 3, "dense": (32,)}
DENSE = {"name": "small_cnn", "channels": (), "strides": (), "dense": (128, 128)}
MODELS = {
    "cnn": CNN,
    "tanh": {**CNN, "activation": "tanh"},
    "batchnorm": {**CNN, "norm": "batch"},
    "dense": DENSE,
    "linear": {**DENSE, "dense": ()},
}
# name: architecture, norm of the training's attack or None, its eps, seed
NETWORKS = {
    "plain cnn": ("cnn", None, 0.0, 1),
    "plain cnn, seed 2": ("cnn", None, 0.0, 2),
    "robust cnn": ("cnn", "linf", 0.15, 1),
    "robust cnn, seed 2": ("cnn", "linf", 0.1, 2),
    "robust cnn, l2": ("cnn", "l2", 0.8, 1),
    "plain tanh": ("tanh", None, 0.0, 1),
    "robust tanh": ("tanh", "linf", 0.1, 1),
    "plain batchnorm": ("batchnorm", None, 0.0, 1),
    "robust batchnorm": ("batchnorm", "linf", 0.1, 1),
    "plain dense": ("dense", None, 0.0, 1),
    "robust dense": ("dense", "linf", 0.1, 1),
    "linear": ("linear", None, 0.0, 1),
}


def trained(config: dict, norm: str | None, eps: float, seed: int, epochs: int = 25):
    """(model, variables) of a small network on the digits, trained in seconds."""
    model, examples = jr.models.build(**config), jr.data.load("digits", "train+validation")
    steps = epochs * jr.data.steps_per_epoch(examples, 64)
    optimizer = optax.adam(training.learning_rate("cosine", 5e-3, steps, warmup=0.1))
    objective = training.standard()
    if norm:
        ramp = optax.linear_schedule(0.0, 1.0, round(0.3 * steps))
        objective = training.adversarial(jr.pgd(norm, eps, steps=5), eps_schedule=ramp)
    mesh = jr.parallel.data_mesh(1)
    key, shape = jax.random.key(seed), examples.images.shape[1:]
    make = lambda key: training.create_state(model, optimizer, key, shape)  # noqa: E731
    state = jr.parallel.create(make, mesh, key)
    step = training.train_step(model, optimizer, objective)
    options = {"batch_size": 64, "epochs": epochs, "seed": seed, "mesh": mesh, "progress": False}
    return model, training.fit(step, state, examples, **options).variables


# ---- plants: (x, strength) before the network, (logits, strength) after it -----------------------


def quantised(x, levels):
    """Rounded to so many levels."""
    return jnp.round(x * (levels - 1)) / (levels - 1)


def stopped(x, share):
    """No gradient through a share of the columns."""
    columns = jnp.arange(x.shape[2])[:, None] < share * x.shape[2]
    return jnp.where(columns, stop_gradient(x), x)


def steep(x, slope):
    """Pixels through a steep sigmoid."""
    return jax.nn.sigmoid(slope * (x - 0.5))


def hashed(x):
    """[b, h, w, c] numbers in [0, 1) that depend on every bit of an image, and nothing else."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(len(x), -1)
    odd = (2 * jnp.arange(bits.shape[1], dtype=jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
    mixed = (bits * odd).sum(1, dtype=jnp.uint32)[:, None] * jnp.uint32(0x85EBCA6B) + odd
    for shift in (15, 13, 16):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(0xC2B2AE35)
    return ((mixed >> 8) / jnp.float32(2**24)).reshape(x.shape)


def noisy(chance, x, width):
    """Uniform noise."""
    return x + width * (2 * chance - 1)


def rescaled(chance, x, share):
    """A random zoom of each image by up to a share, at a random place."""

    def one(chance, image):
        scale = 1 - share * chance[:2]
        shift = chance[2:4] * (1 - scale) * jnp.asarray(image.shape[:2])
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, shift, "linear")

    return jax.vmap(one)(chance.reshape(len(x), -1), x)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _filtered(x, factor):
    """The median over a cross of five pixels; its backward pass is the identity times a factor."""
    ways = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    return jnp.median(jnp.stack([jnp.roll(x, way, (1, 2)) for way in ways]), axis=0)


_filtered.defvjp(lambda x, f: (_filtered(x, f), None), lambda f, _, g: (f * g,))

BEFORE = {
    "none": lambda x, s: x,
    "quantised": quantised,
    "stop_gradient": stopped,
    "steep pixels": steep,
    "noise from the image": lambda x, s: noisy(hashed(x), x, s),
    "zoom from the image": lambda x, s: rescaled(hashed(x), x, s),
    "median, no gradient": lambda x, s: _filtered(x, 0.0),
    "median, wrong sign": lambda x, s: _filtered(x, -1.0),
    "median, identity gradient": lambda x, s: _filtered(x, 1.0),
}
AFTER = {
    "none": lambda z, s: z,
    "scaled": lambda z, s: z * s,
    "sigmoid": lambda z, s: jax.nn.sigmoid(z * s),
    "softmax": lambda z, s: jax.nn.softmax(z * s),
}
# name of the plant: strengths
PLANTS = {
    "quantised": (2.0, 4.0, 9.0, 33.0),
    "stop_gradient": (1.0, 0.5, 0.25),
    "steep pixels": (20.0, 100.0, 400.0),
    "noise from the image": (0.02, 0.2),
    "zoom from the image": (0.3, 0.6),
    "median, no gradient": (1.0,),
    "median, wrong sign": (1.0,),
    "median, identity gradient": (1.0,),
    "scaled": (0.01, 10.0, 100.0, 1e5),
    "sigmoid": (0.1, 3.0, 30.0),
    "softmax": (0.2, 1.0, 5.0),
}
RANDOM = {"noise": (noisy, (0.01, 0.1, 0.4)), "zoom": (rescaled, (0.1, 0.4))}


def defended(model):
    """The network between two functions chosen by number: all plants share what is compiled."""

    def logits_fn(x, variables, before, after, strength):
        x = jax.lax.switch(before, list(BEFORE.values()), x, strength)
        return jax.lax.switch(after, list(AFTER.values()), model.apply(variables, x), strength)

    return logits_fn


def randomised(model):
    """The network behind a random change, chosen by number."""

    def logits_fn(x, keys, variables, number, strength):
        changes = [change for change, _ in RANDOM.values()]
        chance = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))(keys)
        return model.apply(variables, jax.lax.switch(number, changes, chance, x, strength))

    return logits_fn


# ---- the table ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is run."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    hosts: tuple[str, ...] = ("plain cnn", "robust cnn")
    plants: tuple[str, ...] = tuple(PLANTS)
    random: tuple[str, ...] = tuple(RANDOM)
    images: int = 150
    steps: int = 40
    targets: int = 4
    queries: int = 500
    eps: float = 0.1
    epochs: int = 25


PRESETS = {
    "full": Config(),
    "quick": Config(
        networks=("plain cnn", "plain cnn, seed 2", "robust cnn", "robust cnn, seed 2"),
        hosts=("plain cnn",), images=100, steps=20, targets=2, queries=200,
    ),
    "smoke": Config(
        networks=("plain cnn",), hosts=("plain cnn",), plants=("sigmoid",), random=(), images=24,
        steps=5, targets=2, queries=50, epochs=3,
    ),
}  # fmt: skip


def jobs(config: Config):
    """(key of a cell, whether it is random, numbers of the functions) for every cell."""
    for name in config.networks:
        norm = NETWORKS[name][1] or "linf"
        yield {"network": name, "plant": "none", "strength": 0.0, "norm": norm}, False, (0, 0)
    for host in config.hosts:
        for plant in config.plants:
            place = tuple(list(t).index(plant) if plant in t else 0 for t in (BEFORE, AFTER))
            for strength in PLANTS[plant]:
                key = {"network": host, "plant": plant, "strength": strength, "norm": "linf"}
                yield key, False, place
        for plant in config.random:
            for strength in RANDOM[plant][1]:
                key = {"network": host, "plant": f"random {plant}", "strength": strength}
                yield {**key, "norm": "linf"}, True, (list(RANDOM).index(plant),)


def cell(key, random, place, logits_fn, variables, config: Config) -> dict:
    """Robust accuracy under white-box attacks, and figures of all checks, of one plant."""
    test, norm = jr.data.load("digits", "test"), key["norm"]
    steps, targets, draws = config.steps, config.targets, 0
    if random:
        steps, targets, draws = steps // 4, 2, 10
    count = config.images // 3 if random else config.images
    images, labels = test.images[:count], test.labels[:count]
    eps = config.eps if norm == "linf" else 0.5
    shared = {
        "eps": eps, "norm": norm, "key": jax.random.key(7), "batch_size": count,
        "args": (variables, *place, key["strength"]),
    }  # fmt: skip
    options = {"steps": steps, "draws": draws}
    attacks = {
        "apgd-ce": jr.apgd_ce(norm, eps, **options),
        "apgd-t": jr.apgd_t(norm, eps, targets=targets, **options),
    }
    white = jr.auto_attack(
        logits_fn, images, labels, version="custom", attacks=attacks, progress=False, **shared
    )
    card = evaluation.report_card(
        logits_fn, images, labels, white_box=white.robust, random=random, draws=draws,
        queries=config.queries, **shared,
    )  # fmt: skip
    figures = {check.name: check.figure for check in card}
    flags = [check.name for check in card if check.verdict == "flag"]
    limits = {check.name: check.limit for check in card}
    robust = float(white.robust.mean())
    return {"robust": robust, "figures": figures, "limits": limits, "flags": flags}


def table(cells: list[dict]) -> str:
    """All figures, flags marked, as Markdown."""
    names = list(cells[0]["metrics"]["figures"])
    rows = []
    for found in cells:
        key, metrics = found["key"], found["metrics"]
        shown = [
            "" if figure is None else f"{figure:.3g}" + "!" * (name in metrics["flags"])
            for name, figure in metrics["figures"].items()
        ]
        where = [key["network"], key["plant"], f"{key['strength']:g}"]
        rows.append([*where, f"{metrics['robust']:.3g}", *shown])
    return common.markdown(["network", "plant", "strength", "robust", *names], rows)


def main(config: Config, options) -> None:
    """Runs every cell that the results file does not hold yet."""
    path = options.out / f"{NAME}-{options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    weights, functions = {}, {}
    for key, random, place in tqdm(list(jobs(config)), desc=NAME, unit="cell"):
        if results.find(key) is not None:
            continue
        begun = time.perf_counter()
        shape, *how = NETWORKS[key["network"]]
        if key["network"] not in weights:
            model, variables = trained(MODELS[shape], *how, epochs=config.epochs)
            weights[key["network"]] = jax.tree.map(np.asarray, variables)
            # One function per architecture serves all its networks.
            functions.setdefault(shape, (defended(model), randomised(model)))
        logits_fn = functions[shape][random]
        found = cell(key, random, place, logits_fn, weights[key["network"]], config)
        results.add(key, found, time.perf_counter() - begun)
    print(table(results.cells))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS, default="full")
    main(PRESETS[chosen.preset], chosen)
