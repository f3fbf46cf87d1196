"""AutoAttack: a fixed suite of parameter-free attacks, and the per-example worst case over it.

    result = jr.auto_attack(logits_fn, images, labels, eps=8 / 255, key=jax.random.key(0))
    result.robust.mean()

Each attack sees only the examples that held so far. Its run is a stream of examples through a fixed
number of slots (`attacks.scheduler`), and an example's randomness is its own, so that flags do not
depend on batch size or devices, nor on the order where `indices` say which example is which.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrobust import balls, parallel
from jaxrobust.attacks import inputs
from jaxrobust.attacks.apgd import ClassifierAPGD, apgd_ce, apgd_dlr, apgd_t
from jaxrobust.attacks.fab import fab, fab_t
from jaxrobust.attacks.square import Square, square
from jaxrobust.evaluation import checks, given, probes
from jaxrobust.evaluation.ledger import CLEAN, HOLDS
from jaxrobust.evaluation.task import radii_of, run_suite, task_of

NORMS = ("linf", "l2", "l1")
# So much of a radius is rounding.
_ROUNDING = 1e-6

VERSIONS = ("standard", "plus", "rand", "custom")


class AutoAttackResult(NamedTuple):
    """What the suite found, and of which question.

    Attributes:
        x_adv: [n, h, w, c] float32; a misclassified image inside ball and box for each example that
            an attack broke, else the image itself.
        robust: [n] bool: right, and still right under every attack.
        broken_by: [n] names: of the attack that broke it, "clean" if misclassified as it is, ""
            if it holds.
        accuracy: by stage, "clean" first: the share that still holds after it.
        seconds: by attack, compilation included.
        iterations: by attack: how often an image was evaluated, idle slots included; what an
            interruption lost is not counted.
        notes: what a reader of the figure must know; among it AutoAttack's own flags, in the words
            of the report card (`report_card`): zero gradients, outputs that differ between two
            calls, probabilities instead of logits, and a Square that breaks what the other attacks
            left. The first two are looked for in the first batch.
        norm: as given.
        eps: as given.
        key: the key's data, as `jax.random.key_data` has it.
        attacks: by name, in their order.
    """

    x_adv: np.ndarray
    robust: np.ndarray
    broken_by: np.ndarray
    accuracy: dict[str, float]
    seconds: dict[str, float]
    iterations: dict[str, int]
    notes: tuple[str, ...]
    norm: str
    eps: Any
    key: np.ndarray
    attacks: dict[str, Any]


def suite(version: str, norm: str, eps: Any, bounds=(0.0, 1.0)) -> dict[str, Any]:
    """The attacks of a version, by name, in their order.

    Args:
        version: "standard", "plus", or "rand" for classifiers that are random.
        norm: "linf", "l2" or "l1".
        eps: radius: a number or [n].
        bounds: the box.

    Raises:
        ValueError: another version or norm, or what the attacks refuse.

    Source: Croce and Hein 2020; l1: Croce and Hein 2021 (Mind the box).
    """
    box = {"bounds": bounds}
    if version == "rand":
        return {
            "apgd-ce": apgd_ce(norm, eps, draws=20, **box),
            "apgd-dlr": apgd_dlr(norm, eps, draws=20, **box),
        }
    random_search = square(norm, eps, queries=5000, rescale=False, edges=False, **box)
    if version == "plus":
        return {
            "apgd-ce": apgd_ce(norm, eps, restarts=5, **box),
            "apgd-dlr": apgd_dlr(norm, eps, restarts=5, **box),
            "fab": fab(norm, eps, restarts=5, **box),
            "square": random_search,
            "apgd-t": apgd_t(norm, eps, targets=9, **box),
            "fab-t": fab_t(norm, eps, targets=9, **box),
        }
    if version != "standard":
        raise ValueError(f"version must be one of {VERSIONS}, got {version!r}")
    sparse = norm == "l1"
    return {
        "apgd-ce": apgd_ce(norm, eps, restarts=5 if sparse else 1, **box),
        "apgd-t": apgd_t(norm, eps, targets=5 if sparse else 9, **box),
        "fab-t": fab_t(norm, eps, targets=9, **box),
        "square": random_search,
    }


def auto_attack(
    logits_fn: Callable[..., jax.Array],
    images: Any,
    labels: Any,
    *,
    eps: Any,
    norm: str = "linf",
    version: str = "standard",
    attacks: Mapping[str, Any] | None = None,
    key: jax.Array,
    args: tuple = (),
    bounds: tuple[float, float] = (0.0, 1.0),
    indices: Any = None,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    state: str | Path | None = None,
    save_every: float = 10.0,
    progress: bool = True,
) -> AutoAttackResult:
    """Robust accuracy by AutoAttack.

    Args:
        logits_fn: (x, *args) -> [b, classes], the whole defended model; for version "rand"
            (x, keys, *args) with a typed key per example. Pass the same function object every time.
        images: [n, h, w, c] float in `bounds`.
        labels: [n] whole numbers.
        eps: radius: a number, or [n] one per example.
        norm: "linf", "l2" or "l1"; of attacks that stay in no ball, such as `jr.spatial`, a name of
            the threat's own.
        version: "standard", "plus", "rand", or "custom" with `attacks`.
        attacks: for "custom": attack values by name, as `suite` makes them, of this norm. Their own
            eps counts, which may not be above `eps` for any example.
        key: one typed key; example i draws from fold_in(key, indices[i]).
        args: arrays that `logits_fn` takes besides x, such as its variables.
        bounds: the box.
        indices: [n] numbers of the examples in their data set; 0 .. n - 1 by default.
        batch_size: examples at a time; rounded down to a power of two, so that most sizes share
            what is compiled, and up to a multiple of the devices.
        mesh: spreads each batch over devices; one device by default.
        state: a file to go on from. It is written every `save_every` seconds and after each attack.
        save_every: seconds.
        progress: show a progress bar.

    Returns:
        An `AutoAttackResult`; flags, images and names are equal after any interruption.

    Raises:
        TypeError, ValueError: images, labels, key, eps, version or logits_fn are not of the form
            above, an attack is of another threat, or logits are not finite.
        CheckpointError: `state` holds another evaluation. Both before any attack is run.
    """
    images, labels, keys = given.check_examples(images, labels, indices, key, bounds)
    if version == "custom" and not attacks:
        raise ValueError("version 'custom' needs attacks, got none")
    if version != "custom" and attacks is not None:
        raise ValueError(f"attacks are for version 'custom', got version {version!r}")
    inputs.check_eps(eps, norm, given.check_bounds(bounds))
    if version == "custom":
        _check_attacks(attacks, norm, eps, bounds, images)
    chosen = dict(attacks) if version == "custom" else suite(version, norm, eps, bounds)
    task = task_of(logits_fn, images, labels, keys, chosen, args, batch_size, mesh)
    ledger, logits = run_suite(task, chosen, state=state, save_every=save_every, progress=progress)
    broken_by = np.asarray(ledger.names)[ledger.broken_by]
    return AutoAttackResult(
        x_adv=ledger.x_adv,
        robust=ledger.robust,
        broken_by=broken_by,
        accuracy=ledger.accuracy,
        seconds=ledger.seconds,
        iterations=ledger.iterations,
        notes=(*_notes(chosen, task.classes, task.draws), *_flags(task, chosen, logits, broken_by)),
        norm=norm,
        eps=eps,
        key=np.asarray(jax.random.key_data(key)),
        attacks=chosen,
    )


def by_queries(chosen: Mapping[str, Any], broken_by: np.ndarray) -> np.ndarray | None:
    """Which examples fell to Square after all other attacks had left them: [n] bool.

    None if Square was not last, or alone: what it breaks before a white-box attack comes to it says
    nothing of white-box attacks.
    """
    squares = [name for name, attack in chosen.items() if isinstance(attack, Square)]
    others = len(chosen) - len(squares)
    last = list(chosen)[others:] == squares
    return np.isin(broken_by, squares) if others and last else None


def norm_of(attack: Any) -> str | None:
    """The norm whose ball an attack stays in, or None of one that has none, such as a rotation."""
    inner = attack.attack if isinstance(attack, ClassifierAPGD) else attack
    return getattr(inner, "norm", None)


def _check_attacks(attacks, norm, eps, bounds, images):
    """Refuses what is no attack on a classifier, or attacks beyond the threat that is named."""
    radii = radii_of(eps, images)
    for name, attack in attacks.items():
        if name in (HOLDS, CLEAN):
            raise ValueError(f"attacks must have names of their own, got {name!r}")
        if not hasattr(attack, "search"):
            raise ValueError(
                "attacks must be attacks on a classifier that end at a misclassification, such as "
                f"jr.apgd_ce, got {type(attack).__name__} for {name!r}"
            )
        if tuple(attack.bounds) != tuple(bounds):
            raise ValueError(f"attacks must have bounds {bounds}, got {attack.bounds} for {name!r}")
        own = norm_of(attack)
        if own is not None:
            balls.ball(norm)
        if own != (norm if norm in NORMS else None):
            kind = type(attack).__name__
            raise ValueError(
                f"attacks must be of norm {norm!r}, got {kind} of {own!r} for {name!r}"
            )
        if attack.eps is None:
            raise ValueError(f"attacks must have an eps, got None for {name!r}")
        theirs = radii_of(attack.eps, images)
        beyond = (theirs > radii * (1 + _ROUNDING)).any((1, 2, 3))
        if beyond.any():
            row = beyond.argmax()
            raise ValueError(
                f"attacks must stay within eps {radii[row].min():g}, got {theirs[row].max():g} for "
                f"{name!r} at row {row}"
            )


def _flags(task, chosen, logits, broken_by) -> Iterator[str]:
    """AutoAttack's own flags, as notes."""
    seen = probes.glance(task.logits_fn, task.draws, *task.batch(0), task.args)
    queried = by_queries(chosen, broken_by)
    judged = (
        checks.zero_gradient(np.asarray(seen.slope)),
        checks.repeatable(float(seen.spread)),
        checks.probabilities(logits),
        *(() if queried is None else (checks.black_box(queried),)),
    )
    return (f"{check.name}: {check.meaning}" for check in judged if not check.passed)


def _notes(chosen, classes, draws):
    if not parallel.exact_products():
        yield (
            "float32 products are rounded on this device: run under "
            'jax.default_matmul_precision("highest") for figures that CPUs repeat'
        )
    if draws:
        yield (
            f"random model: an image counts as right where most of {draws} draws are, before an "
            "attack as after it"
        )
    climbed = {getattr(attack, "loss", None) for attack in chosen.values()}
    if classes < 4 and "targeted_dlr" in climbed:
        used = "the margin" if classes == 2 else "the margin in units of the logits' range"
        yield f"{classes} classes: the targeted DLR needs 4, APGD-T climbs {used} instead"
    if classes < 3 and "dlr" in climbed:
        yield f"{classes} classes: the DLR needs 3, APGD-DLR climbs the margin instead"
    most = max((getattr(attack, "targets", None) or 1 for attack in chosen.values()), default=1)
    if most > classes - 1:
        yield f"{classes} classes: {classes - 1} targets per attack, not {most}"
