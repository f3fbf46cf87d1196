"""What minimum-norm attacks share: checks, what counts as success, and the nearest one found.

They are called as `attack(logits_fn, x, labels, key=None, mask=None, args=(), targets=None)` and
return, per example, the adversarial closest to x that they met; x itself, bit for bit, where they
met none or where nothing had to be done. `metrics.perturbation_norms` tells the two apart.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from jaxrobust import balls, losses, parallel
from jaxrobust.attacks import box, inputs
from jaxrobust.attacks.classifier import class_count
from jaxrobust.attacks.pgd import finite_gradient

LogitsFn = Callable[..., Array]

# A margin below this share of the largest logit is rounding: another compilation of the same
# network may see it on the other side of the boundary. First for float32, then for what GPUs and
# TPUs make of it.
SLACK = {True: 1e-6, False: 1e-3}
# If the last look at a result disagrees, it is pushed outwards by these shares of itself. A result
# that was judged by its class alone lies on the boundary, and is pushed first.
PUSHES = (0.0, 1e-4, 1e-3, 1e-2)
HARD_PUSHES = (1e-4, 0.0, 1e-3, 1e-2)
_TINY = 1e-30


class Frame(NamedTuple):
    """One batch to attack.

    Attributes:
        x: [b, ...] images, at least float32.
        low: [b, ...] how far down each pixel may go; x itself where it is masked.
        high: [b, ...] how far up, likewise.
        classes: [b] the labels, or the targets of a targeted attack.
    """

    x: Array
    low: Array
    high: Array
    classes: Array


class Best(NamedTuple):
    """The nearest success so far: [b, ...] images and their [b] norms, inf where there is none.

    A norm of 0 says that x itself is what the attack wants.
    """

    x_adv: Array
    norm: Array


def checked(
    logits_fn: LogitsFn,
    x: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike | None,
    args: Any,
    targets: ArrayLike | None,
    bounds: tuple[float, float],
) -> tuple[Array, Array, ArrayLike | None, tuple, bool]:
    """The arguments of a call, checked before anything is compiled.

    Returns:
        x, classes (the targets if there are some, else the labels), mask, args, and whether the
        attack is targeted.

    Raises:
        TypeError, ValueError: names the argument, its value and what was expected.
    """
    x, mask, args = inputs.check_call(x, mask, args, bounds)
    classes = class_count(logits_fn, x, args)
    labels = inputs.check_labels(labels, x.shape[0], classes)
    if targets is None:
        return x, labels, mask, args, False
    targets = inputs.check_labels(targets, x.shape[0], classes, "targets")
    if not any(isinstance(v, jax.core.Tracer) for v in (labels, targets)):
        same = np.flatnonzero(np.asarray(labels) == np.asarray(targets))
        if same.size:
            raise ValueError(
                f"targets must differ from labels, got class {int(targets[same[0]])} as both in "
                f"row {same[0]}"
            )
    return x, targets, mask, args, True


class MinimumNorm:
    """An attack that looks for the nearest success; `_nearest` of a subclass does."""

    bounds: tuple[float, float]

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: ArrayLike,
        labels: ArrayLike,
        key: Array | None = None,
        mask: ArrayLike | None = None,
        args: tuple = (),
        targets: ArrayLike | None = None,
    ) -> Array:
        """Attacks a batch.

        Args:
            logits_fn: (x, *args) -> [b, classes]. Pass the same function object every time, and
                what changes through `args`: then an eager call compiles once.
            x: [b, ...] float in `bounds`.
            labels: [b] the true classes.
            key: not used, nothing is drawn; here so that all attacks are called alike.
            mask: broadcasts to x; a pixel may change where it is > 0.
            args: arrays (or trees of them) that `logits_fn` takes besides x.
            targets: None, or [b] classes, none equal to its label: success is to be taken for it.

        Returns:
            x_adv, of x's shape and type, in the box: the nearest success that was met; x bit for
            bit where there was none, or where x itself is one.

        Raises:
            TypeError, ValueError: names the argument, its value and what was expected.
        """
        call = checked(logits_fn, x, labels, mask, args, targets, self.bounds)
        return call[0] if call[0].shape[0] == 0 else self._nearest(logits_fn, *call)


def frame(x: Array, classes: Array, mask: ArrayLike | None, bounds: tuple[float, float]) -> Frame:
    """The box of each pixel; a masked pixel's holds nothing but itself."""
    base = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    low, high = jnp.minimum(base, bounds[0]), jnp.maximum(base, bounds[1])
    if mask is not None:
        free = balls.broadcast_radius(mask, base, "mask") > 0
        low, high = jnp.where(free, low, base), jnp.where(free, high, base)
    return Frame(base, low, high, classes)


def nothing_yet(frame: Frame) -> Best:
    """No success so far."""
    # A copy, for the loop gives its buffer away.
    return Best(jnp.copy(frame.x), inputs.per_example(frame.x, jnp.inf))


def widths(bounds: tuple[float, float]) -> float:
    """The box's width, the unit of step sizes; 1 where there is no box."""
    width = bounds[1] - bounds[0]
    return width if np.isfinite(width) else 1.0


def total(x: Array) -> Array:
    """[b] sums over everything but the batch."""
    return x.sum(tuple(range(1, x.ndim)))


def norms(delta: Float[Array, "b ..."], norm: str) -> Float[Array, " b"]:
    """`balls.norms`, and "l0": how many numbers of the image were changed."""
    if norm == "l0":
        return total((delta != 0).astype(delta.dtype))
    return balls.norms(delta, norm)


def unit(grad: Array) -> Array:
    """Each example's direction of l2 length 1; zero where it is zero."""
    # Divided by the largest entry first: squares of gradients of 1e-20 would underflow.
    size = jnp.abs(grad).max(tuple(range(1, grad.ndim)), keepdims=True)
    grad = grad / jnp.where(size > 0, size, 1)
    return grad / inputs.wide(jnp.sqrt(jnp.maximum(total(grad * grad), _TINY)), grad)


def margin(
    logits: Float[Array, "b k"], classes: Integer[Array, " b"], targeted: bool
) -> Float[Array, " b"]:
    """By how much the attack has succeeded, in the unit of the logits: > 0 means success."""
    value = losses.margin(logits, classes)
    return -value if targeted else value


def succeeded(
    logits: Float[Array, "b k"],
    classes: Integer[Array, " b"],
    targeted: bool,
    moved: Bool[Array, " b"],
) -> Bool[Array, " b"]:
    """Whether images are what the attack wants, beyond doubt where they were moved.

    Args:
        logits: [b, k].
        classes: [b] labels or targets.
        targeted: which of the two.
        moved: [b] False for the image itself, of which the prediction alone is asked.
    """
    hit = (logits.argmax(1) == classes) == targeted
    slack = SLACK[parallel.exact_products()]
    sure = margin(logits, classes, targeted) > slack * jnp.abs(logits).max(1)
    return jnp.where(moved, sure, hit)


def nearer(best: Best, x_adv: Array, norm: Array, success: Array) -> Best:
    """The nearer of two, if the new one is a success."""
    better = success & (norm < best.norm)
    return Best(
        jnp.where(inputs.wide(better, x_adv), x_adv, best.x_adv), jnp.where(better, norm, best.norm)
    )


def look(
    frame: Frame, best: Best, x_adv: Array, logits: Array, targeted: bool, norm: str
) -> tuple[Best, Array, Array]:
    """The best so far with a point just classified, whether that succeeded, and its norm."""
    size = norms(x_adv - frame.x, norm)
    success = succeeded(logits, frame.classes, targeted, size > 0)
    return nearer(best, x_adv, size, success), success, size


class Ending(NamedTuple):
    """How an attack's results are looked at once more; compiled for.

    Attributes:
        logits_fn: (x, *args) -> [b, classes].
        targeted: whether the classes of the frame are wanted.
        norm: of the attack.
        pushes: shares of itself by which a result is moved outwards, tried in turn until it holds.
        by_class: whether the class alone decides, as in attacks that see nothing else; otherwise
            its margin must be beyond rounding.
    """

    logits_fn: LogitsFn
    targeted: bool
    norm: str
    pushes: tuple[float, ...] = PUSHES
    by_class: bool = False


@functools.partial(jax.jit, static_argnums=0)
def finish(
    ending: Ending,
    x: Array,
    frame: Frame,
    args: tuple,
    best: Best,
    last: Array | None = None,
) -> Array:
    """The answer in x's own precision, looked at once more.

    Args:
        ending: how.
        x: the images as they came.
        frame: the batch.
        args: what `logits_fn` takes besides x.
        best: the nearest success of the loop.
        last: [b, ...] where the loop ended, if that point was not looked at yet.

    Returns:
        x_adv, of x's shape and type; x itself where nothing was found or needed.
    """
    pushes, targeted, norm = ending.pushes, ending.targeted, ending.norm

    def holds(x_adv, moved):
        logits = ending.logits_fn(box.rounded(x_adv, x.dtype), *args)
        if ending.by_class:
            return (logits.argmax(1) == frame.classes) == targeted
        return succeeded(logits, frame.classes, targeted, moved)

    if last is not None:
        size = norms(last - frame.x, norm)
        best = nearer(best, last, size, holds(last, size > 0))
    wanted = (best.norm > 0) & jnp.isfinite(best.norm)
    least = max(1.0, float(jnp.finfo(x.dtype).eps) / 1e-4)  # one ulp of half precision is more

    def push(state):
        i, x_adv, good = state
        share = least * jnp.asarray(pushes, frame.x.dtype)[i]
        moved = frame.x + (best.x_adv - frame.x) * (1 + share)
        moved = jnp.where(share > 0, jnp.clip(moved, frame.low, frame.high), best.x_adv)
        x_adv = jnp.where(inputs.wide(good, x), x_adv, moved)
        return i + 1, x_adv, good | holds(x_adv, wanted)

    more = lambda state: (state[0] < len(pushes)) & ~state[2].all()  # noqa: E731
    _, x_adv, good = jax.lax.while_loop(more, push, (0, best.x_adv, ~wanted))
    x_adv = jnp.where(inputs.wide(good & wanted, x), box.rounded(x_adv, x.dtype), x)
    return jax.lax.stop_gradient(jnp.where(x_adv == x, x, x_adv))


def gradient(
    loss_of_logits: Callable[[Array], Array], logits_fn: LogitsFn, x: Array, args: tuple
) -> tuple[Array, Any]:
    """The gradient d loss_i / d x_i, made finite, and the logits, from one forward pass."""

    def summed(x):
        logits = logits_fn(x, *args)
        return loss_of_logits(logits).sum(), logits

    (_, logits), grad = jax.value_and_grad(summed, has_aux=True)(x)
    return finite_gradient(grad), logits
