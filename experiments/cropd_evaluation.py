"""How the CRoPD experiment judges a defended model: as a whole, by attacks that know it."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import jaxrobust as jr
from experiments import common, records
from experiments.cropd_settings import Built, Config, World
from jaxrobust import attacks, cropd, inference, models, smoothing

RADII = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)


class Attack(NamedTuple):
    """One attack beside the suite.

    Attributes:
        name: of the ledger's entry.
        run: (x, labels, keys, *columns) -> x_adv, of one batch.
        columns: [n, ...] each, what else belongs to the examples.
    """

    name: str
    run: Callable[..., jax.Array]
    columns: tuple[np.ndarray, ...] = ()


def evaluate(
    key: dict,
    config: Config,
    world: World,
    built: Built,
    near: dict[str, Built],
    folder: Path,
    mesh: Mesh,
) -> dict[str, Any]:
    """Accuracies of a defended model, each under the name of what attacked it.

    Args:
        key: of the cell.
        config: of the experiment.
        world: data and foundation model.
        built: the model.
        near: other models, by name, whose adversarial images are tried on it.
        folder: where the suite keeps its state.
        mesh: this process's devices, which share the batches.
    """

    def placed(one: Built) -> Built:
        # What came from a file lies on the host, and would be sent again with every call.
        return one._replace(variables=jr.parallel.replicate(one.variables, mesh))

    built, near = placed(built), {name: placed(one) for name, one in near.items()}
    model, variables, _ = built
    few, eps = world.test.take(slice(config.attacked_images)), world.problem.eps
    correct = partial(
        jr.evaluation.correct, model.apply, variables, batch_size=config.batch, mesh=mesh
    )
    attack, grid = jr.linf_pgd(eps, steps=config.pgd_steps), (0.0, eps / 2, eps, 2 * eps)
    curve = jr.evaluation.accuracy_curve(
        model.apply, variables, few.images, few.labels, attack, grid, key=jax.random.key(17),
        batch_size=config.batch, mesh=mesh, progress=True,
    )  # fmt: skip
    bare = near.get("none", built)
    blind = in_batches(against(bare, attack), few, np.arange(len(few.labels)), config, mesh, 18)
    blinded = correct(blind, few.labels)
    found = {
        "clean_accuracy": float(correct(world.test.images, world.test.labels).mean()),
        "grid": list(grid[1:]),
        f"pgd{config.pgd_steps}_accuracy": [float(part) for part in curve[1:].mean(1)],
        "nonadaptive_accuracy": float(blinded.mean()),
        "images": len(few.labels),
        "outcomes": records.packed(curve),  # clean, then over the grid
    }
    sigma = config.methods[key["method"]].sigma
    if sigma:
        found |= certified(model, variables, few, sigma, config, mesh)
    if model.config["preprocessor"] and "none" in near:
        found["swap_in_accuracy"] = swapped_in(
            model, variables, bare, few, world, attack, config, mesh
        )
    if has_code(model):
        report = cropd.bound_report(
            model, variables, few.images, few.labels, attack=attack, key=jax.random.key(21),
            batch_size=config.batch, mesh=mesh,
        )  # fmt: skip
        found["bound"] = report.means
    if world.problem.judged and key["method"] in config.final:
        tried = {"pgd": curve[grid.index(eps)], "non-adaptive": blinded}
        found |= worst_case(config, world, built, near, attack, tried, folder, mesh)
    return found


def swapped_in(model, variables, bare, few, world, attack, config, mesh) -> list[float]:
    """Clean and PGD accuracy with the head that was fitted to the bare model's features."""
    parts = {name: models.part(variables, name) for name in ("preprocessor", "foundation")}
    whole = models.join(**parts, head=models.part(bare.variables, "head"))
    correct = partial(jr.evaluation.correct, model.apply, whole, batch_size=config.batch, mesh=mesh)
    attacked = correct(few.images, few.labels, attack=attack, key=jax.random.key(23))
    return [float(correct(world.test.images, world.test.labels).mean()), float(attacked.mean())]


def worst_case(config, world, built, near, attack, tried, folder, mesh) -> dict[str, Any]:
    """The standard suite, what was `tried` before, and then what knows the defence.

    Each on whatever still stands; `tried` holds the outcomes [n] of earlier attacks, by name.
    """
    model, variables, _ = built
    few, eps = world.test.take(slice(config.attacked_images)), world.problem.eps
    suite = common.suite_of(config.queries, config.suite_steps, config.suite_targets)
    report = jr.evaluate(
        common.LogitsOf(model.apply), few.images, few.labels, threats={"linf": eps},
        key=jax.random.key(19), suite=suite, args=(variables,), batch_size=config.batch,
        card_images=config.batch, curve_images=config.batch, out=folder, mesh=mesh,
    )  # fmt: skip
    threat = report.threats["linf"]
    standing = np.array(threat.robust, bool)
    after = {**threat.stages}
    for name, stood in tried.items():
        standing &= stood
        after[name] = float(standing.mean())
    for number, found in enumerate(adaptive(world, built, near, attack, few), 20):
        rows = np.flatnonzero(standing)
        if len(rows):
            x_adv = in_batches(found.run, few, rows, config, mesh, number, *found.columns)
            right = jr.evaluation.correct(
                model.apply, variables, x_adv, few.labels[rows], batch_size=config.batch, mesh=mesh
            )
            standing[rows[~right]] = False
        after[found.name] = float(standing.mean())
    return {
        "robust_accuracy": float(standing.mean()),
        "accuracy_after": after,
        "robust_outcomes": records.packed(standing[None]),
        "card_flags": [check.name for check in threat.checks if check.verdict == "flag"],
        "suite_seconds": round(sum(threat.seconds.values()), 1),
    }


def adaptive(world, built, near, attack, few) -> Iterator[Attack]:
    """Attacks on code and features, around the pre-processor's gradient, and from other models."""
    model, variables, _ = built
    front = model.config["preprocessor"]
    encoders = {"features": Encoder(model.apply, f"foundation.{model.config['tap']}")}
    if has_code(model):
        encoders["latent"] = Encoder(model.apply, "preprocessor.latent")
    goal = few.images[other_class(few.labels)]
    for name, encode in encoders.items():
        away, towards = attacks.latent_distance(encode), attacks.feature_match(encode)

        def drive(x, y, keys, loss_fn=away, encode=encode):
            return attack(loss_fn, x, keys, args=(encode(x, variables), variables))

        def match(x, y, keys, goal, loss_fn=towards, encode=encode):
            return attack(loss_fn, x, keys, args=(encode(goal, variables), variables))

        yield Attack(f"{name} away", drive)
        yield Attack(f"{name} matched", match, (goal,))
    if front:
        bare = near["none"]
        loss_fn = Through(attacks.bpda(Encoder(model.apply, "preprocessed")), bare.model.apply)
        # The bare model with the head that the defended one has.
        parts = {"foundation": bare.variables, "head": variables}
        own = models.join(**{name: models.part(of, name) for name, of in parts.items()})
        yield Attack("bpda", lambda x, y, keys: attack(loss_fn, x, keys, args=(variables, own, y)))
    for name, source in near.items():
        yield Attack(f"transfer from {name}", against(source, attack))


def has_code(model) -> bool:
    """Whether an auto-encoder stands in front."""
    return (model.config["preprocessor"] or {}).get("name") == "autoencoder"


def against(source: Built, attack) -> Callable[..., jax.Array]:
    """The attack on another model, as `Attack.run`."""
    loss_fn = jr.evaluation.LossOfModel(source.model.apply)
    return lambda x, y, keys: attack(loss_fn, x, keys, args=(source.variables, y))


def certified(model, variables, few, sigma: float, config: Config, mesh) -> dict[str, Any]:
    """Denoised smoothing (Salman et al. 2020): accuracy that holds for sure within l2 radii."""
    certificate = smoothing.certify(
        common.LogitsOf(model.apply), few.images, jax.random.key(22), sigma=sigma,
        samples=config.certify_samples, args=(variables,), batch_size=config.batch,
        mesh=mesh, progress=True,
    )  # fmt: skip
    accuracy = smoothing.certified_accuracy(certificate, few.labels, RADII)
    return {"radii": list(RADII), "certified_accuracy": [float(value) for value in accuracy]}


def other_class(labels: np.ndarray) -> np.ndarray:
    """For each example the next one of another class."""
    rows = np.arange(len(labels))
    turned = [np.roll(rows, -k) for k in range(1, len(labels))]
    differs = np.array([labels[other] != labels for other in turned])
    return np.array(turned)[differs.argmax(0), rows]


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


def in_batches(
    run, examples, rows, config: Config, mesh: Mesh, number: int, *columns
) -> np.ndarray:
    """run(x, labels, keys, *columns) on some rows of a set, in batches of one shape.

    An example's key is its own, whichever others are attacked with it.
    """
    keys = attacks.example_keys(jax.random.key(number), len(examples.labels))
    parts, size = [], -(-config.batch // mesh.size) * mesh.size
    for chosen in inference.filled(rows, size):
        batch = tuple(
            column[chosen] for column in (examples.images, examples.labels, keys, *columns)
        )
        parts.append(np.asarray(run(*jr.parallel.shard_batch(batch, mesh))))
    return np.concatenate(parts)[: len(rows)]
