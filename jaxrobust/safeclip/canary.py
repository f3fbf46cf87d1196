"""Canaries: poisons that a defender plants, to see without anyone's labels what a defence lets by.

planted, mine = canaries(train, class_names, per_target=30, rate=100)
... train on `planted`, split it, and count what of `mine` got into the safe set ...
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxrobust.data.pairs import Pairs
from jaxrobust.safeclip import triggers
from jaxrobust.safeclip.manifest import Manifest, join
from jaxrobust.safeclip.poisons import Rate, backdoor, belongs, targeted
from jaxrobust.safeclip.templates import CANARY, fill


def canaries(
    pairs: Pairs,
    classes: Sequence[str],
    *,
    per_target: Rate,
    rate: Rate,
    targets: int = 8,
    pool: Pairs | None = None,
    trigger: triggers.Trigger | None = None,
    templates: Sequence[str] | None = CANARY,
    views: Callable[..., Any] | None = None,
    avoid: Collection[Manifest] = (),
    seed: int = 0,
) -> tuple[Pairs, Manifest]:
    """Plants targeted poisons and a backdoor that share nothing with those to be avoided.

    Args:
        pairs: the training set, poisoned by others or not.
        classes: names that a poison may aim at; at least one is left for the backdoor, and one for
            the targets, which share them out when they are more.
        per_target: copies of each target image; a count, or a share of the pairs.
        rate: triggered images; a count, or a share of the pairs.
        targets: how many target images.
        pool: where target images come from, best not from training; by default the training set,
            whose own captions then speak for the images too. Triggers are put on training images.
        trigger: of the backdoor; by default one of another kind than those to be avoided.
        templates: of the captions; None draws from those of `pairs` that hold the class.
        views: of the copies of the target images, as for `targeted`.
        avoid: manifests of attacks on which the defence will be judged: their classes, images,
            triggers and templates are not used.
        seed: of everything that is drawn.

    Returns:
        The pairs with the canaries, and the manifest of the canaries alone (`join` has both).

    Raises:
        TypeError: as `targeted` and `backdoor`.
        ValueError: too few classes or images are left, or the trigger or a template is one of
            those to be avoided; and as `targeted` and `backdoor`.
    """
    known = [poison for manifest in avoid for poison in manifest.poisons]
    random = np.random.RandomState(seed)
    names = _allowed_classes(classes, known, random)
    _check_templates(templates or (), known)
    trigger = _other_trigger(known, trigger, seed)
    unused = _unused(pairs, known)
    pool = unused if pool is None else _unused(pool, known)
    *aims, last = names[: targets + 1]
    aims = [aims[number % len(aims)] for number in range(targets)]
    options = {"templates": templates, "seed": seed, "canary": True}
    chosen = pool.take(_rows(pool, aims, random))
    planted, first = targeted(pairs, chosen, aims, per_target=per_target, views=views, **options)
    rest = unused.take(np.flatnonzero(~np.isin(unused.indices, chosen.indices)))
    planted, second = backdoor(planted, trigger, last, rate=_of(rate, pairs), pool=rest, **options)
    return planted, join(first, second)


def _allowed_classes(classes, known, random):
    used = {poison.target.casefold() for poison in known}
    names = sorted(name for name in set(classes) if name.casefold() not in used)
    if len(names) < 2:
        raise ValueError(
            f"classes must leave at least two that are not to be avoided, got {names} of "
            f"{len(set(classes))}"
        )
    return [names[row] for row in random.permutation(len(names))]


def _check_templates(templates, known):
    for poison in known:
        captions = set(poison.captions)
        shared = [text for text in templates if fill(text, poison.target) in captions]
        if shared:
            raise ValueError(f"templates must not be those to be avoided, got {shared[0]!r}")


def _other_trigger(known, trigger, seed):
    """The one that is asked for, if nobody has it, or one of a kind that nobody has."""
    used = [poison.trigger for poison in known if poison.trigger is not None]
    if trigger is not None:
        if triggers.as_dict(trigger) in used:
            raise ValueError(f"trigger must not be one of those to be avoided, got {trigger}")
        return trigger
    options = (
        triggers.badnets(0.1, pattern="checker", place=(0.9, 0.1)),
        triggers.blended(0.2, seed=seed + 1000),
        triggers.sig(),
        triggers.wanet(seed=seed + 1000),
    )
    kinds = {fields["name"] for fields in used}
    free = [option for option in options if triggers.as_dict(option)["name"] not in kinds]
    if not free:
        raise ValueError(f"trigger must be given: every kind is to be avoided, {sorted(kinds)}")
    return free[0]


def _unused(pool, known):
    """The pool without the images that others have used or poisoned."""
    used = {index for poison in known for index in (*poison.indices, *poison.sources)}
    return pool.take(np.flatnonzero(~np.isin(pool.indices, list(used))))


def _rows(pool, aims, random):
    """A row for each aim, all different, none of the class that it is aimed at."""
    left, rows = random.permutation(len(pool.captions)).tolist(), []
    for name in aims:
        row = next((row for row in left if not belongs(pool, row, name)), None)
        if row is None:
            raise ValueError(
                f"pool must have {len(aims)} images of other classes than their aims, there are "
                f"{len(pool.captions)} left and none for {name!r}"
            )
        left.remove(row)
        rows.append(row)
    return np.array(rows)


def _of(rate, pairs):
    """A share of the pairs as a count: the targeted canaries are not to raise it."""
    return max(1, round(rate * len(pairs.captions))) if isinstance(rate, float) else rate
