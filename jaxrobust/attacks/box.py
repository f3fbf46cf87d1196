"""Between an image, its perturbation and the box."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def room(x: Array, bounds: tuple[float, float]) -> tuple[Array, Array]:
    """How far each pixel may go down and up; 0 on a side where it lies outside already."""
    return jnp.minimum(bounds[0] - x, 0), jnp.maximum(bounds[1] - x, 0)


def rounded(values: Array, dtype: DTypeLike) -> Array:
    """Values of another type, rounded even where a compiler would leave the detour out.

    Float32 that goes through half precision and back inside one program may keep all its bits.
    """
    if values.dtype == dtype:
        return values
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(values, kept.nexp, kept.nmant).astype(dtype)


@jax.jit(static_argnums=3)
def finish(x: Array, delta: Array, eps: Array, bounds: tuple[float, float]) -> Array:
    """The image x + delta in x's precision, never further from x than delta and the box say."""
    base = x.astype(delta.dtype)
    x_adv = rounded(base + delta, x.dtype)
    if x.dtype != delta.dtype:
        # Rounding to fewer bits may leave ball or box: then go one number back towards x.
        too_far = jnp.abs(x_adv.astype(delta.dtype) - base) > jnp.abs(delta)
        x_adv = jnp.where(too_far, jnp.nextafter(x_adv, x), x_adv)
    # x + (bound - x) need not round to the bound.
    x_adv = jnp.clip(x_adv, jnp.minimum(x, bounds[0]), jnp.maximum(x, bounds[1]))
    return jax.lax.stop_gradient(jnp.where((eps > 0) & (delta != 0), x_adv, x))
