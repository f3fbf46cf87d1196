"""What the report card measures on a model: slopes, kinks, repeatability, and a plain ascent."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrobust import balls, losses
from jaxrobust.attacks import box, classifier, scheduler
from jaxrobust.attacks.adaptive import bpda
from jaxrobust.keys import fold

# Half of a finite difference, in units of the box: far above float32's rounding of a logit, far
# below an eps. Larger steps meet more kinks of honest ReLU networks.
SLOPE_STEP = 1e-3
DIRECTIONS = 8
# A few float32 steps of a pixel: no smooth model can tell the two images apart.
JUMP_STEP = 1e-6
_TINY = np.finfo(np.float32).tiny

LogitsFn = Callable[..., Array]


class Probe(NamedTuple):
    """One row per example.

    Attributes:
        logits: [n, classes] of the image; of the mean over draws where the model is random.
        slope: [n] largest entry of the cross entropy's input gradient; NaN if any is not finite.
        jump: [n] largest change of a logit under a change of `JUMP_STEP` per pixel.
        cosine: [n] between finite differences and autodiff, over random directions; 0 if flat.
        agreement: [n] cosine between the gradient of one draw and the mean of others; 1 if the
            model is not random.
    """

    logits: Array
    slope: Array
    jump: Array
    cosine: Array
    agreement: Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def probe(
    logits_fn: LogitsFn,
    bounds: tuple[float, float],
    draws: int,
    x: Array,
    labels: Array,
    keys: Array,
    args: tuple,
    ways: Array,
) -> Probe:
    """Measures a batch; a random model is held to one draw but for `slope` and `agreement`.

    Args:
        logits_fn: (x, *args) -> [b, classes], or (x, keys, *args) with draws > 0.
        bounds: the box.
        draws: 0, or how many draws an expected gradient takes.
        x: [b, h, w, c] images.
        labels: [b].
        keys: [b] typed keys.
        args: what `logits_fn` takes besides.
        ways: [1 + directions, h, w, c] signs, of `jump` first.
    """
    width = bounds[1] - bounds[0]
    # Clipping at the box's border is no kink of the model's.
    inside = jnp.clip(
        x, *(b + s * 2 * width * SLOPE_STEP for b, s in zip(bounds, (1, -1), strict=True))
    )

    def forward(x, draw):
        return logits_fn(x, *((fold(keys, draw),) if draws else ()), *args)

    # Each of the two loops holds one copy of the model, which is what keeps compilation short.
    logits, first, mean, margin = _gradients(forward, draws, x, inside, labels)
    signs = lambda number: width * ways[number].astype(x.dtype)  # noqa: E731
    moved = jnp.clip(x + JUMP_STEP * signs(0), *bounds)

    # Point 0 is x, point 1 the one that was jumped to, and 2 k and 2 k + 1 are the two ends along
    # way k; way 0 is the jump's.
    def ask(number):
        way = SLOPE_STEP * jnp.where(number % 2, 1, -1) * signs(number // 2)
        return forward(jnp.where(number == 1, moved, jnp.where(number == 0, x, inside + way)), 0)

    asked = jax.lax.map(ask, jnp.arange(2 * len(ways)))
    margins = jax.vmap(losses.margin, (0, None))(asked[2:], labels).reshape(len(ways) - 1, 2, -1)
    along = lambda number: (margin * signs(number)).reshape(len(x), -1).sum(1)  # noqa: E731
    auto = jax.lax.map(along, jnp.arange(1, len(ways))) * 2 * SLOPE_STEP
    largest = jnp.abs(mean).max(tuple(range(1, x.ndim)))
    return Probe(
        logits=logits,
        slope=jnp.where(jnp.isfinite(largest), largest, jnp.nan),
        jump=jnp.abs(asked[1] - asked[0]).max(1),
        cosine=_cosine((margins[:, 1] - margins[:, 0]).T, auto.T),
        agreement=_cosine(first, mean) if draws else jnp.ones(x.shape[0]),
    )


def _gradients(forward, draws, x, inside, labels):
    """Mean logits and, of the cross entropy, one draw's and the others' mean gradient at x.

    And the margin's gradient at `inside`: it neither saturates nor underflows before the logits do.
    """

    def look(task, found):
        # Task 0 is x, task 1 `inside`, and the rest are x with other draws.
        logits, first, total, margin = found
        at = lambda x: forward(x, jnp.maximum(task - 1, 0))  # noqa: E731
        z, pull = jax.vjp(at, jnp.where(task == 1, inside, x))
        losses_of = (losses.cross_entropy, losses.margin)
        slopes = [jax.grad(lambda z, f=f: f(z, labels).sum())(z) for f in losses_of]
        (ce, mg) = jax.vmap(lambda slope: pull(slope)[0])(jnp.stack(slopes))
        counted = task > 1 if draws else task == 0
        add = lambda total, new: total + jnp.where(counted, new, 0)  # noqa: E731
        return (
            add(logits, z),
            jnp.where(task == 0, ce, first),
            add(total, ce),
            jnp.where(task == 1, mg, margin),
        )

    none = jnp.zeros_like(x)
    classes = jax.eval_shape(lambda x: forward(x, 0), x)
    start = jnp.zeros(classes.shape, classes.dtype), none, none, none
    logits, first, total, margin = jax.lax.fori_loop(0, 2 + draws, look, start)
    return logits / max(draws, 1), first, total / max(draws, 1), margin


def random_ways(key: Array, shape: tuple[int, ...]) -> np.ndarray:
    """[1 + DIRECTIONS, h, w, c] random signs, the same for all examples; drawn on the host."""
    seed = np.asarray(jax.random.key_data(key)).ravel()
    draw = np.random.default_rng(seed).integers(0, 2, (1 + DIRECTIONS, *shape))
    return (2 * draw - 1).astype(np.int8)


def flat(slope: np.ndarray) -> np.ndarray:
    """Which gradients are zero, below the smallest normal float32, or not finite."""
    return ~((np.asarray(slope) >= _TINY) & np.isfinite(slope))


def _cosine(a, b):
    """Per example; 0 where either vanishes or is not finite."""
    a, b = (v.reshape(len(v), -1) for v in (a, b))
    a, b = (v / jnp.maximum(jnp.abs(v).max(1, keepdims=True), _TINY) for v in (a, b))
    length = jnp.sqrt((a**2).sum(1) * (b**2).sum(1))
    cosine = (a * b).sum(1) / jnp.where(length > 0, length, 1)
    return jnp.where(jnp.isfinite(cosine), cosine, 0.0)


class Glance(NamedTuple):
    """What `glance` sees.

    Attributes:
        slope: [b] largest entry of the cross entropy's input gradient; 0 if any is not finite.
        spread: largest difference of a logit between two identical calls, in units of the logits'
            range.
    """

    slope: Array
    spread: Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def glance(
    logits_fn: LogitsFn, draws: int, x: Array, labels: Array, keys: Array, args: tuple
) -> Glance:
    """The cheapest look at a batch: is there a gradient, and are two calls alike?

    Both calls are in one program, compiled once per model: XLA computes them as one if they are
    alike, and randomness that is drawn while tracing still shows.

    Args:
        logits_fn: as in `probe`.
        draws: as in `probe`.
        x: [b, h, w, c] images.
        labels: [b].
        keys: [b] typed keys.
        args: what `logits_fn` takes besides.
    """
    rows = _rows(x, labels, keys)
    grad = classifier.evaluate(logits_fn, _cross_entropy, x, rows, args, draws)[2]
    own = (keys,) if draws else ()
    first, second = (logits_fn(x, *own, *args) for _ in range(2))
    size = jnp.maximum(first.max() - first.min(), _TINY)
    return Glance(
        slope=jnp.abs(grad).max(tuple(range(1, x.ndim))),
        spread=jnp.abs(first - second).max() / size,
    )


class Ascent(NamedTuple):
    """What an ascent found: [n] whether any point of it is misclassified, and where it ended."""

    broken: Array
    x_adv: Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def ascend(
    logits_fn: LogitsFn,
    norm: str,
    bounds: tuple[float, float],
    draws: int,
    x: Array,
    labels: Array,
    keys: Array,
    args: tuple,
    eps: Any,
    step_size: Any,
    steps: Any,
    random_start: Any,
) -> Ascent:
    """PGD on the cross entropy whose radius, step, length and start are no part of the program.

    So one compilation serves the one-step attack, the long one, restarts and every radius.

    Args:
        logits_fn: as in `probe`.
        norm: "linf", "l2" or "l1".
        bounds: the box.
        draws: as in `probe`.
        x: [b, h, w, c] images.
        labels: [b].
        keys: [b] typed keys.
        args: what `logits_fn` takes besides.
        eps: radius.
        step_size: as `eps`.
        steps: how many.
        random_start: whether it begins at a random point of the ball, or at x.
    """
    ball, room = balls.ball(norm), box.room(x, bounds)
    eps, step_size = jnp.asarray(eps, x.dtype), jnp.asarray(step_size, x.dtype)
    delta = jnp.where(random_start, ball.sample(keys, eps, x.shape), 0)
    delta = ball.project(delta, eps, *room)

    def step(i, state):
        delta, broken = state
        rows = _rows(x, labels, fold(keys, i) if draws else keys)
        loss = _cross_entropy
        _, wrong, grad = classifier.evaluate(logits_fn, loss, x + delta, rows, args, draws)
        moved = ball.project(delta + ball.ascend(grad, step_size, eps, *room), eps, *room)
        return jnp.where(i < steps, moved, delta), broken | wrong

    broken = jnp.zeros(x.shape[0], bool)
    delta, broken = jax.lax.fori_loop(0, steps + 1, step, (delta, broken))
    return Ascent(broken, x + delta)


@functools.partial(jax.jit, static_argnums=(0, 1))
def wrong(
    logits_fn: LogitsFn, draws: int, x: Array, labels: Array, keys: Array, args: tuple
) -> Array:
    """Misclassification [b]; of most draws where the model is random."""
    return classifier.predict(logits_fn, x, labels, keys, args, draws)[0]


def repeat_difference(logits_fn: LogitsFn, x: Array, args: tuple) -> float:
    """Largest difference of a logit between two identical calls, in units of the logits' range.

    Each call is traced and compiled anew: randomness that is drawn while tracing shows as well.
    """
    first, second = (np.asarray(jax.jit(lambda *a: logits_fn(*a))(x, *args)) for _ in range(2))
    size = max(float(np.ptp(first)), float(_TINY))
    return float(np.abs(first - second).max()) / size


@dataclasses.dataclass(frozen=True)
class FixedDraw:
    """A random model held to one draw, (x, key, *args) -> logits: what a query attack asks."""

    logits_fn: LogitsFn

    def __call__(self, x: Array, key: Array, *args: Any) -> Array:
        """Every row draws alike."""
        return self.logits_fn(x, jnp.broadcast_to(key, x.shape[:1]), *args)


@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """classify(preprocess(x)) whose backward pass takes the pre-processor for the identity.

    A pre-processor that changes the image's size is taken for a linear resize.
    """

    preprocess: LogitsFn
    classify: LogitsFn

    def __call__(self, x: Array, *args: Any) -> Array:
        """Logits, exactly those of the forward pass up to rounding."""
        shape = jax.eval_shape(self.preprocess, x, *args).shape
        resized = lambda x, *_: jax.image.resize(x, shape, "linear")  # noqa: E731
        seen = bpda(self.preprocess, None if shape == x.shape else resized)(x, *args)
        return self.classify(seen, *args)


def _rows(x, labels, keys):
    """The cross entropy looks at labels and keys alone."""
    return scheduler.Rows(x, labels, labels, jnp.zeros(()), keys, labels)


def _cross_entropy(logits, labels, targets):
    return losses.cross_entropy(logits, labels)
