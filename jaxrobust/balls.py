"""Norm balls: a threat model is three pure functions, project, ascend and sample.

A ball of radius `eps` around zero is the set of all `delta` with `||delta / eps||_p <= 1`.
For a plain number that is the usual ball. With one radius per example, or a map of radii per
pixel, the same formula holds element by element, and a pixel of radius 0 may not move at all:
masks and per-pixel budgets need no code of their own.

`low` and `high` bound `delta` from the image's side: `low = bounds[0] - x <= 0` and
`high = bounds[1] - x >= 0`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from jaxrobust import bisection

# Below this a gradient's norm counts as zero; it only keeps the division finite.
_TINY = 1e-30


class Ball(NamedTuple):
    """The geometry of one norm.

    Attributes:
        project: (delta, eps, low, high) -> the nearest delta inside both the ball and the box
            (exact for linf and l1; for l2 ball first, then box, which is inside both).
        ascend: (grad, step, eps, low, high) -> a move of length `step` (a radius, like `eps`)
            towards where a loss of gradient `grad` rises fastest.
        sample: (keys, eps, shape) -> a uniform draw from the ball, one key per example.
    """

    project: Callable[..., Array]
    ascend: Callable[..., Array]
    sample: Callable[..., Array]


def broadcast_radius(
    eps: ArrayLike, x: Float[Array, "b ..."], name: str = "eps"
) -> Float[Array, "..."]:
    """Shapes a radius so that it broadcasts against a batch.

    Args:
        eps: a number; [b], one per example; or a map, [h, w, c] for all or [b, h, w, c] for each
            example, where every axis may also be 1.
        x: [b, ...] the batch.
        name: what to call it in an error.

    Returns:
        eps in x's precision, of rank 0 or of x's rank.

    Raises:
        ValueError: no way to read the shape.
    """
    eps = jnp.asarray(eps, x.dtype)
    given = eps.shape
    if eps.ndim == 0:
        return eps
    if eps.ndim == 1 and eps.shape[0] == x.shape[0]:
        return eps.reshape((-1,) + (1,) * (x.ndim - 1))
    if eps.ndim == x.ndim - 1 and x.ndim > 2:
        eps = eps[None]
    fits = eps.ndim == x.ndim and all(e in (1, n) for e, n in zip(eps.shape, x.shape, strict=True))
    if not fits:
        raise ValueError(
            f"{name} must be a number, [{x.shape[0]}] or a map that broadcasts to {x.shape}, "
            f"got shape {given}"
        )
    return eps


def ball(norm: str) -> Ball:
    """The ball of a norm by its name.

    Args:
        norm: "linf", "l2" or "l1".

    Raises:
        ValueError: another name.
    """
    if norm not in _BALLS:
        raise ValueError(f"norm must be one of {sorted(_BALLS)}, got {norm!r}")
    return _BALLS[norm]


def norms(delta: Float[Array, "b ..."], norm: str) -> Float[Array, " b"]:
    """The size of each example's perturbation: [b], in the unit of `delta`."""
    flat = jnp.abs(delta.reshape(delta.shape[0], -1))
    ball(norm)
    if norm == "linf":
        return flat.max(1)
    return flat.sum(1) if norm == "l1" else jnp.sqrt(jnp.square(flat).sum(1))


def _sum(x):
    """Sums over everything but the batch, and keeps the rank."""
    return x.sum(tuple(range(1, x.ndim)), keepdims=True)


def _length(x):
    """l2 length per example, finite in value and gradient at zero."""
    return jnp.sqrt(jnp.maximum(_sum(jnp.square(x)), _TINY))


def _divide(x, eps):
    """Quotient x / eps, and 0 where the radius is 0."""
    return jnp.where(eps > 0, x / jnp.where(eps > 0, eps, 1), 0)


def _per_example(draw, keys, shape, dtype):
    return jax.vmap(lambda key: draw(key, shape[1:], dtype))(keys)


# linf


def _project_linf(delta, eps, low, high):
    return jnp.clip(delta, jnp.maximum(-eps, low), jnp.minimum(eps, high))


def _ascend_linf(grad, step, eps, low, high):
    return step * jnp.sign(grad)


def _sample_linf(keys: Key[Array, " b"], eps, shape):
    draw = _per_example(jax.random.uniform, keys, shape, eps.dtype)
    return eps * (2 * draw - 1)


# l2


def _project_l2(delta, eps, low, high):
    length = _length(_divide(delta, eps))
    inside = jnp.where(eps > 0, delta, 0) / jnp.maximum(length, 1)
    return jnp.clip(inside, low, high)


def _ascend_l2(grad, step, eps, low, high):
    # Divided by the largest entry first: squares of gradients of 1e-20 would underflow.
    grad = grad * (step > 0)
    scale = jnp.abs(grad).max(tuple(range(1, grad.ndim)), keepdims=True)
    grad = grad / jnp.where(scale > 0, scale, 1) * step
    return step * grad / _length(grad)


def _sample_l2(keys, eps, shape):
    """Uniform in the ball: a Gaussian direction, and a radius of u^(1/n).

    With a map, n counts the pixels of positive radius.
    """
    directions, radii = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
    free = jnp.broadcast_to(eps > 0, shape)
    normal = _per_example(jax.random.normal, directions, shape, eps.dtype) * free
    u = _per_example(jax.random.uniform, radii, (shape[0], *(1,) * (len(shape) - 1)), eps.dtype)
    count = jnp.maximum(_sum(free.astype(eps.dtype)), 1)
    return eps * normal / _length(normal) * u ** (1 / count)


# l1


@jax.jit
def _project_l1(delta, eps, low, high):
    """Nearest point of the l1 ball cut with the box, exactly.

    The answer is sign(u) clip(|u| - t, 0, room) for the smallest t >= 0 at which it is inside.

    Source: Croce and Hein 2021 (Mind the box), proposition 2.1; Duchi et al. 2008 without a box.
    """
    batch = delta.shape[0]
    u = _divide(delta, eps)
    size = jnp.abs(u).reshape(batch, -1)
    room = _divide(jnp.where(u > 0, high, -low), eps).reshape(batch, -1)
    left = lambda t: jnp.clip(size - t[:, None], 0, room)  # noqa: E731
    shift = bisection.smallest(lambda t: left(t).sum(1) <= 1, batch, size.dtype)
    kept = left(shift).reshape(delta.shape)
    # The division and the clip take back what rounding left outside of ball and box.
    return jnp.clip(eps * jnp.sign(u) * kept / jnp.maximum(_sum(kept), 1), low, high)


@jax.jit
def _ascend_l1(grad, step, eps, low, high):
    """Moves the steepest pixels towards their box, as many as the radius can pay for.

    Those are the pixels that a linear loss of this gradient would spend the radius on: a sparse
    step whose sparsity needs no tuning, and that reaches the optimum of a linear loss, where
    equal steps on the k steepest pixels (Tramer and Boneh 2019) stay short of it.
    """
    batch = grad.shape[0]
    room = _divide(jnp.where(grad > 0, high, -low) * (grad != 0), eps)
    room = jnp.minimum(jnp.broadcast_to(room, grad.shape).reshape(batch, -1), 1)
    slope = jnp.abs(grad * eps).reshape(batch, -1)
    move = bisection.fill(slope, room, jnp.ones(batch, slope.dtype))
    # A full pixel moves no less than one that got a part: the projection takes the same from all,
    # and would otherwise pull pixels of little room back out of their box.
    moves = move > 0
    part = jnp.where(moves & (move < room), move, 0).max(1, keepdims=True)
    flattest = jnp.where(moves, slope, jnp.inf).min(1, keepdims=True)
    move = jnp.where(moves | (slope > flattest), jnp.maximum(move, part), 0)
    return step * jnp.sign(grad) * move.reshape(grad.shape)


def _sample_l1(keys, eps, shape):
    """Uniform in the ball: n + 1 exponentials with random signs, normalised, one left out."""
    signs, sizes, rest = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    free = jnp.broadcast_to(eps > 0, shape)
    size = _per_example(jax.random.exponential, sizes, shape, eps.dtype) * free
    spare = _per_example(
        jax.random.exponential, rest, (shape[0], *(1,) * (len(shape) - 1)), eps.dtype
    )
    sign = _per_example(jax.random.rademacher, signs, shape, eps.dtype)
    return eps * sign * size / (_sum(size) + spare)


_BALLS = {
    "linf": Ball(_project_linf, _ascend_linf, _sample_linf),
    "l2": Ball(_project_l2, _ascend_l2, _sample_l2),
    "l1": Ball(_project_l1, _ascend_l1, _sample_l1),
}
