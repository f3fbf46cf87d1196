"""Checks that every attack shares."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrobust import balls
from jaxrobust.attacks.loop import FORMS
from jaxrobust.keys import check_key

# An image decoded elsewhere may lie a rounding error outside its box; more is a mistake of unit.
_ULP = 1e-6
# The box of attacks that leave it to others.
ANYWHERE = (-math.inf, math.inf)


def per_example(x: Array, value: float | int | bool, dtype: Any = None) -> Array:
    """[b] equal values for the images x [b, ...].

    Made of the images, not of their number: inside `shard_map` they vary over the devices alike, as
    what a loop carries must.
    """
    return jnp.full_like(x.reshape(len(x), -1)[:, 0], value, dtype)


def wide(values: Array, like: Array) -> Array:
    """[b] shaped to broadcast against a batch [b, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def check_number(
    name: str,
    value: Any,
    *,
    low: int | float,
    high: int | float = math.inf,
    strict: bool = False,
) -> None:
    """Refuses a concrete number, or array of numbers, outside [low, high] or, if `strict`, at it.

    Raises:
        TypeError: not numbers.
        ValueError: names the argument and its value. Traced values pass: they have none yet.
    """
    ends = _ends(name, value)
    if ends is None:
        return
    least, most = ends
    above = least > low if strict else least >= low  # False for NaN
    below = high == math.inf or (most < high if strict else most <= high)
    if high == math.inf and not above:
        raise ValueError(f"{name} must be {'>' if strict else '>='} {low:g}, got {least:g}")
    if not (above and below):
        interval = f"({low:g}, {high:g})" if strict else f"[{low:g}, {high:g}]"
        raise ValueError(f"{name} must lie in {interval}, got {most if above else least:g}")


def check_eps(eps: Any, norm: str, bounds: tuple[float, float]) -> None:
    """Refuses a concrete radius below 0 or, in linf, beyond the box: it is of another unit.

    Raises:
        TypeError, ValueError: as `check_number`.
    """
    check_number("eps", eps, low=0)
    ends = _ends("eps", eps)
    if norm == "linf" and ends and ends[1] > (bounds[1] - bounds[0]) * (1 + _ULP):
        raise ValueError(
            f"eps must be in the unit of the images, which lie in {bounds}, got {ends[1]:g}: "
            "8 / 255, not 8"
        )


def check_steps(steps: Any, name: str = "steps", *, low: int = 1) -> int:
    """A count, of steps or of what `name` says, as a Python integer.

    Raises:
        ValueError: no whole number >= `low`.
    """
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or steps < low:
        raise ValueError(f"{name} must be a whole number >= {low}, got {steps!r}")
    return int(steps)


def check_loop(form: str) -> None:
    """Refuses a form of the loop that there is not (`attacks.loop`)."""
    if form not in FORMS:
        raise ValueError(f"loop must be one of {FORMS}, got {form!r}")


def check_bounds(
    bounds: tuple[float, float] | None, *, finite: bool = False
) -> tuple[float, float]:
    """(low, high) as floats; None, for latents and embeddings, stands for no bounds.

    Raises:
        ValueError: the wrong way round or, for attacks that need them `finite`, infinite.
    """
    low, high = ANYWHERE if bounds is None else (float(b) for b in bounds)
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
    if finite and not math.isfinite(high - low):
        raise ValueError(f"bounds must be finite for this attack, got {bounds}")
    return (low, high)


def check_call(
    x: Any, mask: Any, args: Any, bounds: tuple[float, float], key: Any = None
) -> tuple[Array, Any, tuple]:
    """What all attacks are called with, checked, and with no gradient flowing into it.

    Raises:
        TypeError: `args` are no tuple, or a key is no key; or as `check_images`.
        ValueError: as `check_images` and `check_mask`.
    """
    if key is not None:  # before the mask: labels in a key's place push the key into the mask's
        check_key(key)
    x, mask, args = constant((x, mask, check_args(args)))
    x = check_images(x, bounds)
    check_mask(mask, x)
    return x, mask, args


def check_args(args: Any) -> tuple:
    """What a loss takes besides x, as a tuple; of an array the rows would be taken one by one."""
    if not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple, such as (labels,), got {type(args).__name__}")
    return tuple(args)


def check_mask(mask: Any, x: Array) -> None:
    """Refuses a mask that does not fit x, or whose known values are no shares in [0, 1].

    An image's mask, 0 or 255, would multiply the radius by 255.

    Raises:
        TypeError: not numbers.
        ValueError: names the shape, and the values where they are the reason.
    """
    if mask is None:
        return
    balls.broadcast_radius(mask, x, "mask")
    ends = _ends("mask", mask)
    if ends and not (ends[0] >= 0 and ends[1] <= 1):
        raise ValueError(
            "mask must lie in [0, 1], 1 where a pixel may change, "
            f"got values in [{ends[0]:g}, {ends[1]:g}] in shape {jnp.shape(mask)}"
        )


def check_images(x: Any, bounds: tuple[float, float], name: str = "x") -> Array:
    """The batch as an array, after checks of rank, type and range.

    Args:
        x: [b, ...] float, inside `bounds` up to 1e-6. The range of a traced x is not looked at.
        bounds: the box.
        name: what to call x in an error.

    Raises:
        TypeError: x is not floating point.
        ValueError: x has no batch axis, or leaves the box, or is not finite.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point in {bounds}, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{name} must be a batch [b, ...] of rank >= 2, got shape {x.shape}")
    if not isinstance(x, jax.core.Tracer) and x.size:
        low, high = _range(x)
        if not (low >= bounds[0] - _ULP and high <= bounds[1] + _ULP and math.isfinite(low + high)):
            nan = ": some are NaN" if math.isnan(low) else ""
            raise ValueError(f"{name} must lie in {bounds}, got values in [{low:g}, {high:g}]{nan}")
    return x


def check_pictures(x: Array) -> None:
    """Refuses a batch that has no height, width and channels, for attacks that look at them."""
    if x.ndim != 4:
        raise ValueError(
            f"x must be pictures [b, h, w, c] for this attack, got images of shape {x.shape[1:]}"
        )


def _ends(name, value):
    """The least and the largest of numbers; None where there are none, or none known yet."""
    if value is None or any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(value)):
        return None
    if isinstance(value, int | float):
        return value, value
    try:
        with jax.ensure_compile_time_eval():  # a constant inside jit has its value already
            value = jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or an array of them, got {value!r}") from None
    return _range(value) if value.size else None


def _range(x):
    with jax.ensure_compile_time_eval():
        return tuple(v.item() for v in jax.device_get(_extremes(x)))


@jax.jit
def _extremes(x):
    return x.min(), x.max()


def constant(tree: Any) -> Any:
    """The same arrays with no gradient flowing into them.

    Stopped on the way in, and not only on x_adv, or an outer `jax.grad` without jit would
    differentiate every step of the attack before it finds that nobody asks.
    """

    def stop(leaf):
        return jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.core.Tracer) else leaf

    return jax.tree.map(stop, tree)


def check_labels(labels: Any, batch: int, classes: int, name: str = "labels") -> Array:
    """The labels as an array, after checks of shape, type and range.

    Args:
        labels: [b] whole numbers in [0, classes).
        batch: b.
        classes: how many logits there are.
        name: what to call them in an error.

    Raises:
        TypeError: labels are not integers.
        ValueError: another shape, or a label out of range.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), got {labels.shape}")
    if not isinstance(labels, jax.core.Tracer) and labels.size:
        low, high = _range(labels)
        if low < 0 or high >= classes:
            raise ValueError(f"{name} must lie in [0, {classes}), got values in [{low}, {high}]")
    return labels
