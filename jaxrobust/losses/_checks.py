"""Argument checks shared by the losses: shapes always, values where they are already known."""

import jax
import jax.numpy as jnp
import numpy as np


def at_least_float32(x):
    """Return `x` in float32, or in float64 if it came so: half precision is for networks."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def known(value) -> np.ndarray | None:
    """Return the value as numpy, or None while it is traced or lies on another process."""
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)


def check_logits(logits, *, least: int, name: str = "logits") -> None:
    """Raise ValueError unless `logits` is [b, k] with k >= `least`."""
    shape = jnp.shape(logits)
    if len(shape) != 2:
        raise ValueError(f"{name} must have shape [batch, classes], got {shape}")
    if shape[1] < least:
        raise ValueError(f"{name} must have at least {least} classes, got {shape[1]}")


def check_labels(labels, batch: int, *, classes: int | None = None, name: str = "labels") -> None:
    """Raise unless `labels` are [batch] integers, in [0, classes) if that is given."""
    shape, dtype = jnp.shape(labels), jnp.result_type(labels)
    if shape != (batch,):
        raise ValueError(f"{name} must have shape {(batch,)}, got {shape}")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {dtype}")
    values = known(labels) if classes is not None else None
    if values is not None and values.size and (values.min() < 0 or values.max() >= classes):
        raise ValueError(
            f"{name} must lie in [0, {classes}), got values from {values.min()} to {values.max()}"
        )


def check_same_shape(first, second, names: tuple[str, str]) -> None:
    """Raise ValueError unless the two arrays have one shape."""
    if jnp.shape(first) != jnp.shape(second):
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, "
            f"got {jnp.shape(first)} and {jnp.shape(second)}"
        )


def check_embeddings(first, second, names: tuple[str, str]) -> None:
    """Raise ValueError unless both arrays are [b, d] of one shape."""
    if jnp.ndim(first) != 2:
        raise ValueError(f"{names[0]} must have shape [batch, d], got {jnp.shape(first)}")
    check_same_shape(first, second, names)


def check_positive(value, name: str) -> None:
    """Raise ValueError if a value that is already known is not > 0."""
    concrete = known(value)
    if concrete is not None and not concrete > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
