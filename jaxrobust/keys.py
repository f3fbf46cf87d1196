"""Randomness by example: what a row draws depends neither on its batch nor on the devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array


def check_key(key: Any) -> None:
    """Refuses what is no typed key (`jax.random.key`)."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return
    hint = ""
    if dtype is not None and jnp.issubdtype(dtype, jnp.signedinteger):
        hint = (
            ". An attack that takes a loss takes no labels: attack(loss_fn, x, key, "
            "args=(labels,)); one that takes labels has the key after them"
        )
    raise TypeError(f"key must be typed, as jax.random.key(0) makes it, got {key!r}{hint}")


def example_keys(key: Array | None, batch: int) -> Array:
    """One key per example, so that a row does not depend on its neighbours.

    Args:
        key: one typed key, folded with each row's number, or [b] keys of one's own.
        batch: b.

    Returns:
        [b] typed keys (`threefry`).

    Raises:
        TypeError: not a typed key (`jax.random.key`).
        ValueError: keys of another shape.
    """
    check_key(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one per example ({batch},), got {key.shape}")
    return threefry(key) if key.ndim else numbered_keys(key, jnp.arange(batch))


def numbered_keys(key: Array, numbers: ArrayLike) -> Array:
    """One key per example, one typed key folded with the number that the example has everywhere.

    Args:
        key: one typed key.
        numbers: [b] whole numbers.

    Returns:
        [b] typed keys (`threefry`).
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(threefry(key), jnp.asarray(numbers))


def threefry(key: Array) -> Array:
    """One key, or [b], of JAX's default generator, made of the words of any other's.

    Under `vmap` the compiler's own generators (rbg, unsafe_rbg) draw for the batch as a whole: an
    example would draw otherwise with other neighbours.
    """
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    words = jax.random.key_data(key)
    key = jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")
    fold_in = jax.vmap(jax.random.fold_in) if key.ndim else jax.random.fold_in
    for i in range(2, words.shape[-1]):
        key = fold_in(key, words[..., i])
    return key


@jax.jit
def fold(keys: Array, number: Array | int) -> Array:
    """The keys [b] of one of several draws, each from its example's own key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
