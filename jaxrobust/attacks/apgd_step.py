"""One iteration of Auto-PGD for a batch whose examples may stand at different iterations.

One table over the iterations holds what the algorithm does when: the phases of the l1 schedule, the
checkpoints, the momentum. Every example looks its own iteration up, so that the examples of a batch
need not begin together (`attacks.scheduler`); each gets what the reference gives it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrobust import balls, bisection
from jaxrobust.attacks import box, inputs
from jaxrobust.attacks.value import Number

# Share of the iterations: up to the first checkpoint, by how much the gaps shrink, the least gap.
_FIRST_GAP, _SHRINK, _LEAST_GAP = 0.22, 0.03, 0.06
_L1_GAP = 0.04
_MOMENTUM = 0.75
_L1_PIXELS = 0.2  # share of the pixels that the first l1 step moves
_L1_SHRINK, _L1_LEAST_STEP, _L1_SETTLED = 1.5, 10.0, 0.95


class Table(NamedTuple):
    """What happens at evaluation e = 0 .. of a run: the loss is taken e times before.

    Attributes:
        radius: [e] radius in units of eps.
        first: [e] whether a phase begins.
        gap: [e] iterations since the last checkpoint, where one is due, else 0.
        last: [e] whether a phase ends, so that no step follows.
        counts: [e] whether a misclassification counts: the radius is eps.
    """

    radius: np.ndarray
    first: np.ndarray
    gap: np.ndarray
    last: np.ndarray
    counts: np.ndarray


@functools.lru_cache(maxsize=32)
def table(norm: str, steps: int, large_radii: bool) -> Table:
    """The schedule of a run.

    Args:
        norm: "linf", "l2" or "l1".
        steps: iterations in all.
        large_radii: three phases at 3, 2 and 1 eps with 30, 30 and 40 % of the iterations.

    Source: Croce and Hein 2020, section 3; l1: Croce and Hein 2021 (Mind the box), section 4.3.
    """
    phases = [(1.0, steps)]
    if large_radii:
        early = math.ceil(0.3 * steps)
        phases = [(3.0, early), (2.0, early), (1.0, steps - 2 * early)]
    rows = []
    for radius, count in phases:
        gaps = _l1_gaps(count) if norm == "l1" else _gaps(count)
        for i in range(count + 1):
            rows.append((radius, i == 0, gaps.get(i, 0), i == count, radius == 1.0))
    return Table(*(np.asarray(column) for column in zip(*rows, strict=True)))


def _gaps(steps):
    """Checkpoints of one phase, each with the iterations since the one before."""
    gap, at, gaps = max(int(_FIRST_GAP * steps), 1), 0, {}
    while at + gap <= steps:
        at += gap
        gaps[at] = gap
        gap = max(gap - max(int(_SHRINK * steps), 1), max(int(_LEAST_GAP * steps), 1))
    return gaps


def _l1_gaps(steps):
    gap = max(int(_L1_GAP * steps), 1)
    return dict.fromkeys(range(gap, steps + 1, gap), gap)


class State(NamedTuple):
    """One run per example; `i` is the evaluation that comes next."""

    i: Array  # [b]
    delta: Array  # [b, ...] where the loss is taken next
    before: Array  # [b, ...] delta of the iteration before
    best: Array  # [b, ...] delta of the largest loss
    best_grad: Array
    best_loss: Array  # [b]
    last_loss: Array  # [b]
    rises: Array  # [b] iterations since the last checkpoint that raised the loss
    checked_loss: Array  # [b] best_loss at the last checkpoint
    halved: Array  # [b] bool: at the last checkpoint
    step: Array  # [b, 1...] in units of eps
    share: Array  # [b] share of the pixels that an l1 step moves
    support: Array  # [b] how many pixels the best l1 delta moved at the last checkpoint
    fooled: Array  # [b] bool
    found: Array  # [b, ...] delta of the firmest misclassification
    found_loss: Array  # [b] its loss


def begin(
    keys: Array, base: Array, eps: Array, bounds: tuple, norm: str, steps: int, large_radii: bool
) -> State:
    """A random start on the sphere, cut to the box: [b] runs at iteration 0."""
    shape, batch = base.shape, base.shape[0]
    radius = table(norm, steps, large_radii).radius[0]
    room = box.room(base, bounds)
    if norm == "linf":
        draw = jax.vmap(lambda k: jax.random.uniform(k, shape[1:], base.dtype, -1, 1))(keys)
        size = jnp.abs(draw).max(tuple(range(1, draw.ndim)), keepdims=True)
    else:
        draw = jax.vmap(lambda k: jax.random.normal(k, shape[1:], base.dtype))(keys)
        size = jnp.sqrt(jnp.square(draw).sum(tuple(range(1, draw.ndim)), keepdims=True))
    if norm == "l1":
        delta = balls.ball(norm).project(jnp.where(eps > 0, draw, 0), radius * eps, *room)
    else:
        delta = jnp.clip(eps * draw / (size + 1e-12), *room)
    pixels = math.prod(shape[1:])
    support = jnp.count_nonzero(delta, tuple(range(1, delta.ndim))).astype(base.dtype)
    plain = norm != "l1" or not large_radii
    rank = (1,) * (base.ndim - 1)
    each = functools.partial(inputs.per_example, base)
    zeros, numbers = jnp.zeros_like(base), each(0)
    return State(
        i=each(0, jnp.int32),
        delta=delta,
        before=delta,
        best=delta,
        best_grad=zeros,
        best_loss=numbers,
        last_loss=numbers,
        rises=numbers,
        checked_loss=numbers,
        halved=each(True, bool),
        step=each(_first_step(norm)).reshape(batch, *rank),
        share=each(_L1_PIXELS) if plain else support / pixels / _L1_SHRINK,
        support=each(pixels) if plain else support,
        fooled=each(False, bool),
        found=zeros,
        found_loss=numbers,
    )


def _first_step(norm):
    return 1.0 if norm == "l1" else 2.0


def advance(
    state: State,
    loss: Array,
    wrong: Array,
    grad: Array,
    base: Array,
    eps: Array,
    *,
    bounds: tuple,
    norm: str,
    steps: int,
    large_radii: bool,
    rho: Number,
    stop: bool = True,
) -> State:
    """One iteration, given loss [b], misclassification [b] and gradient [b, ...] at state.delta.

    Examples that have done all their iterations, or with `stop` are fooled, stay as they are.
    Without it a run goes on to its largest loss, and `found` is the fooling point of the largest.
    """
    # Nothing compares larger than NaN: a run that begins at one would never find anything better.
    loss = jnp.where(jnp.isnan(loss), -jnp.inf, loss)
    plan = table(norm, steps, large_radii)
    at = jnp.minimum(state.i, len(plan.gap) - 1)
    look = lambda column: jnp.asarray(column)[at]  # noqa: E731
    active = state.i < len(plan.gap)
    if stop:
        active &= ~state.fooled
    first, gap, last = look(plan.first), look(plan.gap), look(plan.last)
    wide = functools.partial(inputs.wide, like=base)
    choose = lambda flags, new, old: jnp.where(wide(flags), new, old)  # noqa: E731

    hit = active & wrong & look(plan.counts)
    firmest = hit & (~state.fooled | (loss > state.found_loss))
    found = choose(firmest, state.delta, state.found)
    better = first | (loss > state.best_loss)
    best = choose(better, state.delta, state.best)
    best_grad = choose(better, grad, state.best_grad)
    best_loss = jnp.where(better, loss, state.best_loss)
    # The reference compares the first iteration with an empty row of its buffer: zero.
    last_loss = jnp.where(first, 0, loss)
    rises = jnp.where(first, 0, state.rises + (loss > state.last_loss))
    checked_loss = jnp.where(first, best_loss, state.checked_loss)
    state = state._replace(
        before=choose(first, state.delta, state.before), best=best, rises=rises,
        checked_loss=checked_loss, best_loss=best_loss, halved=first | state.halved,
    )  # fmt: skip
    check = _check_l1 if norm == "l1" else functools.partial(_check, rho=rho)
    back, state = check(state, gap, base)
    delta, grad = choose(back, best, state.delta), choose(back, best_grad, grad)
    radius = wide(look(plan.radius)).astype(base.dtype) * eps
    moved = _move(delta, grad, state, radius, box.room(base, bounds), norm, first)
    following = jnp.asarray(plan.radius)[jnp.minimum(at + 1, len(plan.gap) - 1)]
    if large_radii:  # The next phase starts from this one's best, in its smaller ball.
        smaller = wide(following).astype(base.dtype) * eps
        restart = balls.ball(norm).project(best, smaller, *box.room(base, bounds))
        moved = choose(last, restart, moved)
        state = _new_phase(state, last, restart, norm)
    going = active & ~hit if stop else active
    return state._replace(
        i=state.i + going,
        delta=choose(going, moved, state.delta),
        before=choose(going, delta, state.before),
        best_grad=best_grad,
        last_loss=last_loss,
        fooled=state.fooled | hit,
        found=found,
        found_loss=jnp.where(firmest, loss, state.found_loss),
    )


def _check(state, gap, base, *, rho):
    """Linf and l2: halve the step where the loss oscillates or its best did not improve."""
    due = gap > 0
    oscillates = state.rises <= gap * rho
    stuck = ~state.halved & (state.checked_loss >= state.best_loss)
    back = due & (oscillates | stuck)
    return back, state._replace(
        step=jnp.where(inputs.wide(back, base), state.step / 2, state.step),
        halved=jnp.where(due, back, state.halved),
        checked_loss=jnp.where(due, state.best_loss, state.checked_loss),
        rises=jnp.where(due, 0, state.rises),
    )


def _check_l1(state, gap, base):
    """L1: as many pixels as the best delta needs; long steps while their number still falls."""
    due = gap > 0
    pixels = math.prod(base.shape[1:])
    support = jnp.count_nonzero(state.best, tuple(range(1, base.ndim))).astype(base.dtype)
    back = due & (support < _L1_SETTLED * state.support)
    shorter = jnp.maximum(state.step / _L1_SHRINK, 1 / _L1_LEAST_STEP)
    step = jnp.where(inputs.wide(back, base), 1.0, shorter)
    return back, state._replace(
        step=jnp.where(inputs.wide(due, base), step, state.step),
        share=jnp.where(due, support / pixels / _L1_SHRINK, state.share),
        support=jnp.where(due, support, state.support),
    )


def _new_phase(state, last, restart, norm):
    pixels = math.prod(restart.shape[1:])
    support = jnp.count_nonzero(restart, tuple(range(1, restart.ndim))).astype(restart.dtype)
    return state._replace(
        step=jnp.where(inputs.wide(last, restart), _first_step(norm), state.step),
        share=jnp.where(last, support / pixels / _L1_SHRINK, state.share),
        support=jnp.where(last, support, state.support),
    )


def _move(delta, grad, state, eps, room, norm, first):
    ball = balls.ball(norm)
    if norm == "l1":
        step = _sparse_step(grad * (eps > 0), state.share) * state.step * eps
        return ball.project(delta + step, eps, *room)
    plain = ball.project(delta + ball.ascend(grad, state.step * eps, eps, *room), eps, *room)
    momentum = _MOMENTUM * (plain - delta) + (1 - _MOMENTUM) * (delta - state.before)
    mixed = ball.project(delta + momentum, eps, *room)
    return jnp.where(inputs.wide(first, delta), plain, mixed)


def _sparse_step(grad, share):
    """Signs of the steepest pixels, `share` of all, of l1 length 1."""
    size = jnp.abs(grad).reshape(grad.shape[0], -1)
    pixels = size.shape[1]
    rank = jnp.clip((1 - share) * pixels, 0, pixels - 1).astype(jnp.int32)
    least = bisection.kth_largest(size, pixels - rank)
    sign = jnp.sign(grad) * (size >= least[:, None]).reshape(grad.shape)
    return sign / (jnp.abs(sign).sum(tuple(range(1, grad.ndim)), keepdims=True) + 1e-10)
