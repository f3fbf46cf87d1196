"""Poisons for image-text pre-training: targeted pairs, backdoors, and canaries of one's own.

    poisoned, first = targeted(train, held_out.take(rows), classes, per_target=0.0005)
    poisoned, second = backdoor(poisoned, badnets(), "banana", rate=300, pool=held_out)
    manifest = join(first, second)

Everything that is drawn depends on the seed alone. Rates are counts (int) or shares of the pairs
(float).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.data import stored_images
from jaxrobust.data.pairs import Pairs
from jaxrobust.keys import example_keys
from jaxrobust.safeclip import triggers
from jaxrobust.safeclip.manifest import Manifest, Poison, record
from jaxrobust.safeclip.templates import ATTACK, holds, prompts

Rate = int | float

# Added pairs are numbered from here, so that none has the id of an image held out elsewhere.
FIRST_ID = 2**30


def targeted(
    pairs: Pairs,
    targets: Pairs,
    classes: Sequence[str],
    *,
    per_target: Rate | None = None,
    total: Rate | None = None,
    templates: Sequence[str] | None = ATTACK,
    views: Callable[..., Any] | None = None,
    seed: int = 0,
    canary: bool = False,
) -> tuple[Pairs, Manifest]:
    """Adds copies of a few images, each under captions of another class.

    Args:
        pairs: the training set.
        targets: M images, best not from the training set; their own captions are not used.
        classes: M adversarial classes.
        per_target: copies of each image; give this or `total`.
        total: copies of all images together, shared out evenly, the first getting what is left.
        templates: of the captions; None draws from the captions of `pairs` that hold the class as
            a whole word. Each is used as often as any other, up to one.
        views: (keys, images) -> images, a random view of each copy, such as `data.clip_views`: an
            attacker who expects that copies are looked for. None copies exactly.
        seed: of the captions and views.
        canary: planted by the defender.

    Returns:
        The pairs with the poisons behind them, under new ids from `FIRST_ID` and without labels,
        which a poison has none of; and the manifest.

    Raises:
        TypeError: images that are not floating point.
        ValueError: images that do not fit the pairs' or the classes' number, a target that is of
            its class by caption or label, no caption that holds a class, or a rate that gives no
            poison.

    Source: Carlini and Terzis 2022; real captions as in SAFECLIP.
    """
    _check_fit(pairs, targets, "targets")
    if len(classes) != len(targets.captions) or not classes:
        raise ValueError(
            f"classes must be one per target, got {len(classes)} for {len(targets.captions)}"
        )
    for row, name in enumerate(classes):
        if belongs(targets, row, name):
            raise ValueError(
                f"a target must not be of its adversarial class {name!r}: {targets.captions[row]!r}"
            )
    counts = _counts(len(classes), len(pairs.captions), per_target, total)
    random, free = _random(seed), _free_id(pairs)
    poisons = []
    for source, name, count in zip(targets.indices, classes, counts, strict=True):
        captions = _captions(pairs, name, templates, count, random)
        ids = tuple(range(free, free + count))
        free += count
        sources = (int(source),) * count
        poisons.append(Poison("targeted", name, ids, captions, sources, None, seed, canary))
    images = np.asarray(targets.images)[np.repeat(np.arange(len(classes)), counts)]
    if views is not None:
        keys = example_keys(jax.random.key(seed), len(images))
        images = _as_stored(views(keys, jnp.asarray(images)))
    poisoned = _with(pairs, images, poisons)
    return poisoned, record(pairs, poisoned, poisons)


def backdoor(
    pairs: Pairs,
    trigger: triggers.Trigger,
    target: str,
    *,
    rate: Rate,
    style: str = "dirty",
    pool: Pairs | None = None,
    templates: Sequence[str] | None = ATTACK,
    seed: int = 0,
    canary: bool = False,
) -> tuple[Pairs, Manifest]:
    """Ties a trigger to a class.

    "dirty" adds triggered copies of other images under captions of the class; "consistent" puts
    the trigger on images of the class, by caption or label, and leaves caption and id as they are.
    Triggered images are rounded to 8 bits.

    Args:
        pairs: the training set.
        trigger: called with images and ids.
        target: name of the class.
        rate: number of poisons, or their share of the pairs.
        style: "dirty" or "consistent".
        pool: where dirty images come from, without those of the class; by default the training
            set without poisons that were added to it.
        templates: as for `targeted`; for dirty poisons.
        seed: of the images and captions; the trigger has its own.
        canary: planted by the defender.

    Returns:
        The poisoned pairs and the manifest.

    Raises:
        TypeError: images that are not floating point.
        ValueError: another style, images that do not fit, fewer images than poisons, no caption
            that holds the class, or a rate that gives no poison.

    Source: Carlini and Terzis 2022 (dirty); Turner et al. 2019 (consistent), by caption as in
    CleanCLIP (Bansal et al. 2023).
    """
    if style not in ("dirty", "consistent"):
        raise ValueError(f"style must be 'dirty' or 'consistent', got {style!r}")
    dirty = style == "dirty"
    if not dirty and pool is not None:
        raise ValueError("pool must be None for consistent poisons, which are among the pairs")
    count = _count("rate", rate, len(pairs.captions))
    pool = pairs if pool is None else pool
    _check_fit(pairs, pool, "pool")
    random = _random(seed)
    own = pool is pairs
    rows = _draw_images(pool, target, count, dirty, random, below=FIRST_ID if own else np.inf)
    chosen = pool.take(rows)
    sources = tuple(int(index) for index in chosen.indices)
    if dirty:
        free = _free_id(pairs)
        ids = tuple(range(free, free + count))
        captions = _captions(pairs, target, templates, count, random)
        kind = "backdoor"
    else:
        ids, captions, kind = sources, chosen.captions, "label_consistent"
    images = trigger(np.asarray(chosen.images), np.array(ids))
    images = _as_stored(images)
    poison = Poison(kind, target, ids, captions, sources, triggers.as_dict(trigger), seed, canary)
    if dirty:
        poisoned = _with(pairs, images, [poison])
    else:
        poisoned = pairs.replace(images=stored_images.replaced(pairs.images, rows, images))
    return poisoned, record(pairs, poisoned, [poison])


def _as_stored(images):
    """Images rounded to 8 bits, as a file has them: so they are the same everywhere."""
    return (np.round(np.clip(np.asarray(images), 0, 1) * 255) / 255).astype(np.float32)


def _draw_images(pool, target, count, dirty, random, below):
    """Rows of `count` images with ids below, of the class or, if dirty, of all others."""
    fits = [
        row
        for row, index in enumerate(pool.indices)
        if index < below and belongs(pool, row, target) != dirty
    ]
    if len(fits) < count:
        what = "not of" if dirty else "of"
        raise ValueError(
            f"rate asks for {count} images {what} {target!r} by caption or label, there are only "
            f"{len(fits)}"
        )
    return np.array(fits)[random.permutation(len(fits))[:count]]


def belongs(pairs: Pairs, row: int, name: str) -> bool:
    """Whether a pair is of a class: its caption holds the name, or its label is the class."""
    labelled = pairs.labels is not None and pairs.class_names[pairs.labels[row]] == name
    return labelled or holds(pairs.captions[row], name)


def _captions(pairs, name, templates, count, random):
    """`count` captions of a class: shuffled, and again from the start when they run out."""
    if templates is None:
        options = [caption for caption in pairs.captions if holds(caption, name)]
        if not options:
            raise ValueError(f"no caption holds {name!r} as a whole word: give templates")
    else:
        options = prompts([name], templates)[0]
    order = [random.permutation(len(options)) for _ in range(-(-count // len(options)))]
    return tuple(options[row] for row in np.concatenate(order)[:count])


def _with(pairs, images, poisons):
    """The pairs with poisons behind them."""
    captions = tuple(caption for poison in poisons for caption in poison.captions)
    ids = np.array([index for poison in poisons for index in poison.indices], np.int32)
    return Pairs(
        stored_images.joined(pairs.images, images),
        (*pairs.captions, *captions),
        np.concatenate([pairs.indices, ids]).astype(np.int32),
    )


def _counts(targets, pairs, per_target, total):
    if (per_target is None) == (total is None):
        raise ValueError(f"give per_target or total, got {per_target} and {total}")
    if per_target is not None:
        return [_count("per_target", per_target, pairs)] * targets
    count = _count("total", total, pairs)
    if count < targets:
        raise ValueError(f"total must give each of {targets} targets a poison, got {count}")
    return [count // targets + (row < count % targets) for row in range(targets)]


def _count(name, rate, pairs):
    """A number of poisons from a count, or from a share of the pairs, rounded."""
    whole = isinstance(rate, int | np.integer) and not isinstance(rate, bool)
    share = isinstance(rate, float) and 0 < rate <= 1
    count = int(rate) if whole else round(rate * pairs) if share else 0
    if count < 1:
        raise ValueError(
            f"{name} must be a whole number >= 1, or a share in (0, 1] of the {pairs} pairs that "
            f"comes to at least one, got {rate!r}"
        )
    return count


def _check_fit(pairs, others, name):
    for argument, some in (("pairs", pairs), (name, others)):
        if not np.issubdtype(some.images.dtype, np.floating):
            raise TypeError(
                f"{argument} must have floating point images in [0, 1], got {some.images.dtype}"
            )
    if others.images.shape[1:] != pairs.images.shape[1:]:
        raise ValueError(
            f"{name} must have images {pairs.images.shape[1:]} as the pairs have, got "
            f"{others.images.shape[1:]}"
        )


def _free_id(pairs):
    return max(FIRST_ID, 1 + int(pairs.indices.max(initial=-1)))


def _random(seed):
    return np.random.RandomState(seed)
