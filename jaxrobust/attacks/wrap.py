"""Attacks made of attacks: restarts, the worst of several, targeted and multi-targeted."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust import losses
from jaxrobust.attacks import classifier, inputs
from jaxrobust.attacks.value import LossFn, attack_value
from jaxrobust.keys import example_keys, fold

Attack = Any  # anything called as attack(loss_fn, x, key, mask=None, args=())
LogitsFn = Callable[..., Array]


@attack_value(data=("attack",), meta=("count", "select"))
class Restarts:
    """The same attack from `count` starts, the best result per example; made by `restarts`."""

    attack: Attack
    count: int
    select: LossFn | None = None

    def __call__(
        self,
        loss_fn: LossFn,
        x: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
    ) -> Array:
        """Attacks a batch; arguments, result and errors as `PGD.__call__`."""
        x = inputs.check_images(x, inputs.ANYWHERE)
        keys = example_keys(key, x.shape[0])
        runs = (
            self.attack(loss_fn, x, fold(keys, i), mask=mask, args=args) for i in range(self.count)
        )
        return worst(self.select or loss_fn, runs, args)


@attack_value(data=("attacks",), meta=("select",))
class WorstOf:
    """Several attacks, the best result per example; made by `worst_of`."""

    attacks: tuple[Attack, ...]
    select: LossFn | None = None

    def __call__(
        self,
        loss_fn: LossFn,
        x: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
    ) -> Array:
        """Attacks a batch; arguments, result and errors as `PGD.__call__`."""
        x = inputs.check_images(x, inputs.ANYWHERE)
        keys = example_keys(key, x.shape[0])
        runs = (
            attack(loss_fn, x, fold(keys, i), mask=mask, args=args)
            for i, attack in enumerate(self.attacks)
        )
        return worst(self.select or loss_fn, runs, args)


@attack_value(data=("attack",), meta=())
class Targeted:
    """An attack driven towards given classes; made by `targeted`."""

    attack: Attack

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: ArrayLike,
        targets: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
    ) -> Array:
        """Attacks a batch by raising log p(target).

        Args:
            logits_fn: (x, *args) -> [b, classes].
            x: [b, ...] float in the attack's bounds.
            targets: [b] the class that each example should be taken for.
            key: one typed key, or [b].
            mask: 1 where a pixel may change.
            args: arrays that `logits_fn` takes besides x.

        Returns:
            x_adv, of x's shape and type.
        """
        x, targets, args = checked(logits_fn, x, targets, args)
        return self.attack(_TowardsTarget(logits_fn), x, key, mask=mask, args=(targets, *args))


@attack_value(data=("attack",), meta=("targets",))
class MultiTargeted:
    """An attack driven towards each of the likeliest wrong classes; made by `multi_targeted`."""

    attack: Attack
    targets: int

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: ArrayLike,
        labels: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
    ) -> Array:
        """Attacks a batch once per target and keeps the largest margin per example.

        Args:
            logits_fn: (x, *args) -> [b, classes].
            x: [b, ...] float in the attack's bounds.
            labels: [b] the true classes.
            key: one typed key, or [b].
            mask: 1 where a pixel may change.
            args: arrays that `logits_fn` takes besides x.

        Returns:
            x_adv, of x's shape and type.
        """
        x, labels, args = checked(logits_fn, x, labels, args)
        keys = example_keys(key, x.shape[0])
        others = _likeliest_others(logits_fn, x, labels, args)
        loss_fn = _TargetMargin(logits_fn)
        runs = (
            self.attack(loss_fn, x, fold(keys, i), mask=mask, args=(labels, others[:, i], *args))
            for i in range(min(self.targets, others.shape[1]))
        )
        return worst(Margin(logits_fn), runs, (labels, *args))


def restarts(attack: Attack, count: int, *, select: LossFn | None = None) -> Restarts:
    """An attack repeated from several starts.

    Args:
        attack: any gradient attack.
        count: how many starts, at least 1.
        select: (x, *args) -> [b], by which results are compared; the attacked loss by default.
            A margin counts every success: the largest cross entropy need not be one.
    """
    check_takes_loss("restarts", attack)
    return Restarts(attack=attack, count=inputs.check_steps(count, "count"), select=select)


def worst_of(*attacks: Attack, select: LossFn | None = None) -> WorstOf:
    """The per-example worst case over several attacks; `select` as in `restarts`."""
    if not attacks:
        raise ValueError("worst_of needs at least one attack, got none")
    check_takes_loss("worst_of", *attacks)
    return WorstOf(attacks=attacks, select=select)


def targeted(attack: Attack) -> Targeted:
    """Makes a gradient attack a targeted one: (logits_fn, x, targets, key) -> x_adv."""
    check_takes_loss("targeted", attack)
    return Targeted(attack=attack)


def multi_targeted(attack: Attack, targets: int = 9) -> MultiTargeted:
    """Drives a gradient attack towards the `targets` likeliest wrong classes, one by one.

    It is called as (logits_fn, x, labels, key) -> x_adv, and climbs z_target - z_label.

    Source: Gowal et al. 2019 (An alternative surrogate loss for PGD-based adversarial testing).
    """
    check_takes_loss("multi_targeted", attack)
    return MultiTargeted(attack=attack, targets=inputs.check_steps(targets, "targets"))


def check_takes_loss(name: str, *attacks: Attack) -> None:
    """Refuses attacks that are called with labels: what `name` makes would hand them a key there.

    Raises:
        TypeError: names the first of them.
    """
    for attack in attacks:
        third = list(inspect.signature(attack).parameters)[2:3]
        if third in (["labels"], ["targets"]):
            raise TypeError(
                f"{name} needs attacks called as attack(loss_fn, x, key), "
                f"got {type(attack).__name__}, which takes labels"
            )


# Losses as values: equal for equal `logits_fn`, so that the second call finds the first one's
# compiled code. A fresh lambda would compile again.


@dataclasses.dataclass(frozen=True)
class _TowardsTarget:
    logits_fn: LogitsFn

    def __call__(self, x, targets, *args):
        return -losses.cross_entropy(self.logits_fn(x, *args), targets)


@dataclasses.dataclass(frozen=True)
class _TargetMargin:
    logits_fn: LogitsFn

    def __call__(self, x, labels, targets, *args):
        logits = self.logits_fn(x, *args)
        return classifier.pick(logits, targets) - classifier.pick(logits, labels)


@dataclasses.dataclass(frozen=True)
class Margin:
    """How far the likeliest wrong class is ahead of the true one; no answer is a wrong one."""

    logits_fn: LogitsFn

    def __call__(self, x, labels, *args):
        """[b] margins."""
        logits = self.logits_fn(x, *args)
        return jnp.where(jnp.isnan(logits).any(1), jnp.inf, losses.margin(logits, labels))


def checked(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, args: Any
) -> tuple[Array, Array, tuple]:
    """What x, labels and args are, checked; bounds and mask are the wrapped attack's to check."""
    x, args = inputs.check_images(x, inputs.ANYWHERE), inputs.check_args(args)
    classes = classifier.class_count(logits_fn, x, args)
    return x, inputs.check_labels(labels, x.shape[0], classes), args


@jax.jit(static_argnums=0)
def _likeliest_others(logits_fn, x, labels, args):
    """[b, classes - 1] the wrong classes, likeliest first."""
    logits = logits_fn(x, *args)
    logits = jnp.where(jax.nn.one_hot(labels, logits.shape[1], dtype=bool), -jnp.inf, logits)
    return jnp.argsort(-logits, 1)[:, :-1]


def worst(score_fn, runs: Iterable[Array], args):
    """Per example, the run of the largest score; the earliest of equals."""
    best, best_score = None, None
    for x_adv in runs:
        best, best_score = _keep(score_fn, best, best_score, x_adv, args)
    return best


@jax.jit(static_argnums=0)
def _keep(score_fn, best, best_score, x_adv, args):
    score = score_fn(x_adv, *args)
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)  # nothing would be larger than NaN
    if best is None:
        return x_adv, score
    better = score > best_score
    kept = jnp.where(inputs.wide(better, x_adv), x_adv, best)
    return kept, jnp.where(better, score, best_score)
