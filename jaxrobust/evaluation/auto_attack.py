"""AutoAttack: a fixed suite of parameter-free attacks, and the per-example worst case over it.

    result = jr.auto_attack(logits_fn, images, labels, eps=8 / 255, key=jax.random.key(0))
    result.robust.mean()

Each attack sees only the examples that held so far. Its run is a stream of examples through a fixed
number of slots (`attacks.scheduler`), and an example's randomness is its own, so that flags do not
depend on batch size, order or devices.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxrobust import parallel
from jaxrobust.attacks import classifier, inputs, scheduler
from jaxrobust.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from jaxrobust.attacks.fab import fab, fab_t
from jaxrobust.attacks.square import square
from jaxrobust.evaluation.ledger import CLEAN, HOLDS, Ledger

# Logits that a state keeps, to tell models apart.
_KEPT_LOGITS = 100_000

VERSIONS = ("standard", "plus", "rand", "custom")


class AutoAttackResult(NamedTuple):
    """What the suite found.

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
        notes: what a reader of the figure must know.
    """

    x_adv: np.ndarray
    robust: np.ndarray
    broken_by: np.ndarray
    accuracy: dict[str, float]
    seconds: dict[str, float]
    iterations: dict[str, int]
    notes: tuple[str, ...]


def suite(version: str, norm: str, eps: Any, bounds=(0.0, 1.0)) -> dict[str, Any]:
    """The attacks of a version, by name, in their order.

    Args:
        version: "standard", "plus", or "rand" for classifiers that are random.
        norm: "linf", "l2" or "l1".
        eps: radius: a number or [n].
        bounds: the box.

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
        norm: "linf", "l2" or "l1".
        version: "standard", "plus", "rand", or "custom" with `attacks`.
        attacks: for "custom": attack values by name, as `suite` makes them; their own eps counts.
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
        TypeError, ValueError: images, labels, key, eps or version are not of the form above, logits
            are not finite, or `state` holds another evaluation. Before any attack is run.
    """
    images, labels, keys = check_examples(images, labels, indices, key, bounds)
    if version == "custom" and not attacks:
        raise ValueError("version 'custom' needs attacks, got none")
    if version != "custom" and attacks is not None:
        raise ValueError(f"attacks are for version 'custom', got version {version!r}")
    inputs.check_number("eps", eps, low=0)
    if norm == "linf" and np.max(eps, initial=0) > bounds[1] - bounds[0]:
        raise ValueError(
            f"eps must be in the unit of the images, which lie in {bounds}, got {np.max(eps):g}: "
            "8 / 255, not 8"
        )
    if version == "custom":
        _check_attacks(attacks, eps, bounds)
    chosen = dict(attacks) if version == "custom" else suite(version, norm, eps, bounds)
    draws = {attack.draws for attack in chosen.values()}
    if len(draws) > 1:
        raise ValueError(f"attacks must agree on draws of a random model, got {sorted(draws)}")
    slots = _slots(batch_size, mesh)
    args = parallel.replicate(args, mesh) if mesh else args
    draws = draws.pop()
    correct, targets, logits = _clean_pass(
        logits_fn, images, labels, keys, args, draws, slots, mesh
    )
    classes = logits.shape[1]
    searches = {name: attack.search(classes) for name, attack in chosen.items()}
    ledger = Ledger(
        state,
        save_every,
        _fingerprint(images, labels, keys, chosen),
        images,
        correct,
        logits[: max(_KEPT_LOGITS // classes, 1)],
        tuple(chosen),
    )
    for number, (name, search) in enumerate(searches.items()):
        jobs = ledger.jobs(name, search.rounds)
        if name in ledger.finished:
            continue
        ledger.begin(name)
        problem = scheduler.Problem(
            x=images,
            labels=labels,
            targets=targets[:, : search.targets],
            eps=_radii(chosen[name].eps, images),
            keys=inputs.fold(keys, number),
        )
        with tqdm(total=len(jobs), desc=name, unit="image", disable=not progress) as bar:

            def done(example, number, broken, x_adv, rounds=search.rounds, bar=bar):
                ledger.record(example, number, x_adv if broken else None)
                bar.update(broken or number + 1 == rounds)
                bar.set_postfix_str(f"{ledger.robust.mean():.1%} hold", refresh=False)

            scheduler.run(
                search, logits_fn, problem, jobs, done, args=args, slots=slots, mesh=mesh,
                on_turn=ledger.spend,
            )  # fmt: skip
        ledger.end(name)
    return AutoAttackResult(
        x_adv=ledger.x_adv,
        robust=ledger.robust,
        broken_by=np.asarray(ledger.names)[ledger.broken_by],
        accuracy=ledger.accuracy,
        seconds=ledger.seconds,
        iterations=ledger.iterations,
        notes=tuple(_notes(chosen, classes, draws)),
    )


def check_examples(
    images: Any, labels: Any, indices: Any, key: jax.Array, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Images float32, labels int32, and a key for each example; refuses what is not of that form.

    Raises:
        TypeError, ValueError: names the argument, its value and what was expected.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be [n, h, w, c] with n >= 1, got shape {images.shape}")
    inputs.check_images(images, inputs.check_bounds(bounds), "images")
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be [{len(images)}] whole numbers, got {labels.dtype} {labels.shape}"
        )
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    if indices.shape != labels.shape:
        raise ValueError(f"indices must have shape {labels.shape}, got {indices.shape}")
    if np.ndim(key) != 0:
        raise ValueError(f"key must be one typed key, got shape {np.shape(key)}")
    inputs.example_keys(key, 1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices))
    return images.astype(np.float32), labels.astype(np.int32), keys


def _slots(batch_size, mesh):
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    devices = mesh.size if mesh else 1
    return -(-(2 ** (batch_size.bit_length() - 1)) // devices) * devices


def _radii(eps, images):
    """[n, 1, 1, 1], or [n, h, w, c] from a map."""
    return np.asarray(classifier.radii(eps, None, jnp.asarray(images)))


def _clean_pass(logits_fn, images, labels, keys, args, draws, slots, mesh):
    """Correctness [n], the likeliest wrong classes [n, t], and the logits [n, classes]."""
    slots = scheduler.fitting(slots, len(images), mesh)
    place = (lambda tree: parallel.shard_batch(tree, mesh)) if mesh else jax.device_put
    one = jax.ShapeDtypeStruct((slots, *images.shape[1:]), np.float32)
    extra = (jax.eval_shape(lambda: jax.random.split(jax.random.key(0), slots)),) if draws else ()
    classes = classifier.class_count(logits_fn, one, (*extra, *args))
    inputs.check_labels(labels, len(labels), classes)
    parts = []
    for start in range(0, len(images), slots):
        rows = np.minimum(np.arange(start, start + slots), len(images) - 1)
        x, y = place((images[rows], labels[rows]))
        parts.append(classifier.clean_pass(logits_fn, x, y, keys[rows], args, classes - 1, draws))
    correct, targets, logits = (
        np.concatenate([np.asarray(p) for p in column])[: len(images)]
        for column in zip(*parts, strict=True)
    )
    if not np.isfinite(logits).all():
        bad = np.flatnonzero(~np.isfinite(logits).all(1))
        raise ValueError(
            f"logits_fn must return finite logits, got others for {len(bad)} images, "
            f"the first at row {bad[0]}"
        )
    return correct, targets, logits


def _check_attacks(attacks, eps, bounds):
    """Refuses what is no attack on a classifier, or attacks beyond the threat that is named."""
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
        if attack.eps is None or np.max(attack.eps) > np.max(eps) * (1 + 1e-6):
            raise ValueError(
                f"attacks must stay within eps {np.max(eps):g}, got {attack.eps} for {name!r}"
            )


def _fingerprint(images, labels, keys, chosen):
    """Tells whether a state belongs to this evaluation: data, and attacks in their order."""
    digest = hashlib.sha256()
    for part in (images, labels, jax.random.key_data(keys)):
        digest.update(np.ascontiguousarray(part).tobytes())
    words = [[name, dataclasses.asdict(attack)] for name, attack in chosen.items()]
    digest.update(json.dumps(words, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value):
    """Arrays as numbers, functions by their names."""
    return value.__qualname__ if callable(value) else np.asarray(value).tolist()


def _notes(chosen, classes, draws):
    if draws:
        yield (
            f"random model: an image counts as right where most of {draws} draws are, before an "
            "attack as after it"
        )
    if classes < 4 and any("-t" in name for name in chosen):
        used = "the margin" if classes == 2 else "the margin in units of the logits' range"
        yield f"{classes} classes: the targeted DLR needs 4, APGD-T climbs {used} instead"
    if classes < 3 and "apgd-dlr" in chosen:
        yield f"{classes} classes: the DLR needs 3, APGD-DLR climbs the margin instead"
    most = max((getattr(attack, "targets", None) or 1 for attack in chosen.values()), default=1)
    if most > classes - 1:
        yield f"{classes} classes: {classes - 1} targets per attack, not {most}"
