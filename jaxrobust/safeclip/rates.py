"""Learning rates of the two kinds of passes, as numbers in the training state.

How many steps a pass will have depends on the split, which is made while training runs. So a rate
is not a function fixed in the step but five numbers beside it: a new total costs no compilation,
and a checkpoint has them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

SCHEDULES = ("fixed", "official")


class Rate(NamedTuple):
    """A learning rate that rises in a line, then falls along half a cosine.

    Attributes:
        position: steps so far, counted as the schedule counts them.
        warmup: steps of the rise.
        total: where the cosine reaches 0; beyond it the cosine goes on, as in the authors' code.
        peak: at the end of the rise.
        constant: 1 for a rate that stays at `peak`.
    """

    position: Float[Array, ""]
    warmup: Float[Array, ""]
    total: Float[Array, ""]
    peak: Float[Array, ""]
    constant: Float[Array, ""]

    def value(self) -> Float[Array, ""]:
        """The rate of the step at `position`."""
        rising = self.peak * (self.position + 1) / jnp.maximum(self.warmup, 1)
        rest = jnp.maximum(self.total - self.warmup, 1)
        falling = self.peak * 0.5 * (1 + jnp.cos(jnp.pi * (self.position - self.warmup) / rest))
        value = jnp.where(self.position < self.warmup, rising, falling)
        return jnp.where(self.constant > 0, self.peak, value)

    def advanced(self) -> "Rate":
        """The rate after one more step."""
        return self._replace(position=self.position + 1)


def rate(
    peak: float,
    *,
    warmup: float | int = 0,
    total: float | int = 0,
    position: float | int = 0,
    constant: bool = False,
) -> Rate:
    """A rate from plain numbers.

    Args:
        peak: largest value, >= 0.
        warmup: steps of the rise.
        total: step at which the cosine reaches 0.
        position: where to begin.
        constant: stay at `peak`.
    """
    if peak < 0:
        raise ValueError(f"peak must be >= 0, got {peak}")
    numbers = (position, warmup, total, peak, constant)
    return Rate(*(jnp.asarray(number, jnp.float32) for number in numbers))


def safe_count(fraction: float, pairs: int) -> int:
    """How many pairs a share is, rounded down; k / n of n is k even where rounding misses it."""
    return int(fraction * pairs + 1e-6)


class Plan(NamedTuple):
    """What the schedules of the mixed phase are computed from.

    Attributes:
        steps: of one pass over all pairs.
        batch_size: pairs in a step.
        pairs: how many there are.
        first: epoch of the split, counted from 1: 7 in the authors' runs.
        epochs: last epoch, counted from 1.
        fractions: of the pairs that are safe, epoch by epoch from `first` on.
        peak: largest rate.
        warmup: steps of the rise; the fixed schedule takes a tenth of its total at most.
    """

    steps: int
    batch_size: int
    pairs: int
    first: int
    epochs: int
    fractions: Sequence[float]
    peak: float
    warmup: float | int

    @property
    def safe_steps(self) -> list[int]:
        """Full batches of the safe set, epoch by epoch."""
        return [safe_count(f, self.pairs) // self.batch_size for f in self.fractions]

    @property
    def risky_steps(self) -> list[int]:
        """Full batches of the rest, epoch by epoch."""
        counts = [self.pairs - safe_count(f, self.pairs) for f in self.fractions]
        return [count // self.batch_size for count in counts]


def mixed_rates(plan: Plan, epoch: int, schedule: str) -> tuple[Rate, Rate]:
    """(rate of the safe pass, rate of the risky pass) at the start of an epoch.

    "fixed" counts the steps that each pass really takes, so that both end at 0 with the training.
    "official" is the authors' code: positions go by the epoch's number from the start of all
    training, and both passes share a total, so that the rate of the safe pass can end at its peak.

    Args:
        plan: of the mixed phase.
        epoch: counted from 1, >= plan.first.
        schedule: "fixed" or "official".
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    done = epoch - plan.first
    safe, risky = plan.safe_steps, plan.risky_steps
    if schedule == "fixed":
        return tuple(
            rate(
                plan.peak,
                warmup=min(plan.warmup, 0.1 * sum(steps)),
                total=sum(steps),
                position=sum(steps[:done]),
            )
            for steps in (safe, risky)
        )
    # As the authors compute it: the safe set is taken to grow by 0.01 an epoch, whatever it does;
    # a pass is taken for as long as the average one, or as this epoch's is; and both begin as if
    # every epoch since the first of all training had been like it.
    count = plan.epochs - plan.first + 1
    total = sum((plan.fractions[0] + 0.01 * k) * plan.steps for k in range(count))
    average = int(total // count)
    starts = (average * epoch, risky[done] * epoch)
    both = {"warmup": plan.warmup, "total": total}
    return tuple(rate(plan.peak, position=start, **both) for start in starts)
