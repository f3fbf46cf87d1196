"""Checks and randomness that every attack shares."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrobust.attacks.loop import FORMS

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


def check_number(name: str, value: Any, *, low: int | float, strict: bool = False) -> None:
    """Refuses a concrete number, or array of numbers, below `low` (or at it, if `strict`).

    Raises:
        ValueError: names the argument and its value. Traced values pass: they have none yet.
    """
    if value is None or any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(value)):
        return
    if not isinstance(value, int | float):
        with jax.ensure_compile_time_eval():  # a constant inside jit has its value already
            value = float(jnp.min(jnp.asarray(value))) if jnp.size(value) else low
    bad = value <= low if strict else value < low
    if math.isnan(value) or bad:
        raise ValueError(f"{name} must be {'>' if strict else '>='} {low:g}, got {value:g}")


def check_steps(steps: int, name: str = "steps", *, low: int = 1) -> None:
    """Refuses a count, of steps or of what `name` says, that is no whole number >= `low`."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < low:
        raise ValueError(f"{name} must be a whole number >= {low}, got {steps!r}")


def check_loop(form: str) -> None:
    """Refuses a form of the loop that there is not (`attacks.loop`)."""
    if form not in FORMS:
        raise ValueError(f"loop must be one of {FORMS}, got {form!r}")


def check_bounds(bounds: tuple[float, float] | None) -> tuple[float, float]:
    """(low, high) as floats; None, for latents and embeddings, stands for no bounds."""
    if bounds is None:
        return (-math.inf, math.inf)
    low, high = (float(b) for b in bounds)
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
    return (low, high)


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
            raise ValueError(f"{name} must lie in {bounds}, got values in [{low:g}, {high:g}]")
    return x


def _range(x):
    with jax.ensure_compile_time_eval():
        return tuple(v.item() for v in _extremes(x))


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


def check_labels(labels: Any, batch: int, classes: int) -> Array:
    """The labels as an array, after checks of shape, type and range.

    Args:
        labels: [b] whole numbers in [0, classes).
        batch: b.
        classes: how many logits there are.

    Raises:
        TypeError: labels are not integers.
        ValueError: another shape, or a label out of range.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(f"labels must have shape ({batch},), got {labels.shape}")
    if not isinstance(labels, jax.core.Tracer) and labels.size:
        low, high = _range(labels)
        if low < 0 or high >= classes:
            raise ValueError(f"labels must lie in [0, {classes}), got values in [{low}, {high}]")
    return labels


def example_keys(key: Array | None, batch: int) -> Array:
    """One key per example, so that a row does not depend on its neighbours.

    Args:
        key: one typed key, folded with each row's number, or [b] keys of one's own.
        batch: b.

    Returns:
        [b] typed keys.

    Raises:
        TypeError: not a typed key (`jax.random.key`).
        ValueError: keys of another shape.
    """
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key must be typed, as jax.random.key(0) makes it, got {key!r}")
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key must be one key or one per example ({batch},), got {key.shape}")
    return key


@jax.jit
def fold(keys: Array, number: Array | int) -> Array:
    """The keys [b] of one of several draws, each from its example's own key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
