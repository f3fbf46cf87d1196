"""Thresholds without sorting: the smallest number at which a condition of each row turns true.

A sort costs XLA's CPU backend thirty times what these sweeps do, and everything that the attacks
sort for ends in one threshold per example: a k-th largest entry, the shift of a projection, the
last pixel that a budget pays for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Real


def smallest(
    holds: Callable[[Float[Array, " b"]], Bool[Array, " b"]], count: int, dtype: DTypeLike
) -> Float[Array, " b"]:
    """Exactly the smallest number >= 0 at which `holds` is true, for each row.

    The bits of floats >= 0 are ordered as the floats are, so that bisecting them visits every
    number there is in one sweep per bit.

    Args:
        holds: numbers -> flags, both [count]; a flag that is true stays true for larger numbers.
        count: how many rows.
        dtype: a floating-point type.

    Returns:
        [count] numbers; inf where `holds` never is true.
    """
    bits = jnp.finfo(dtype).bits
    whole = jnp.dtype(f"int{bits}")
    as_float = lambda n: jax.lax.bitcast_convert_type(n, dtype)  # noqa: E731

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        true = holds(as_float(middle))
        return jnp.where(true, low, middle + 1), jnp.where(true, middle, high)

    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, dtype), whole)
    # The first sweep stands outside: under shard_map the ends vary over devices from then on.
    ends = halve(0, (jnp.zeros(count, whole), jnp.full(count, infinity)))
    return as_float(jax.lax.fori_loop(1, bits - 1, halve, ends)[1])


@jax.jit
def kth_largest(values: Float[Array, "b n"], k: Real[Array, " b"]) -> Float[Array, " b"]:
    """The k-th largest number of each row, 1 <= k <= n; inf for k = 0. Values are >= 0."""
    fewer = lambda t: (values > t[:, None]).sum(1) < k  # noqa: E731
    return smallest(fewer, values.shape[0], values.dtype)


@jax.jit
def fill(
    order: Float[Array, "b n"], room: Float[Array, "b n"], budget: Float[Array, " b"]
) -> Float[Array, "b n"]:
    """Spends each row's budget on the entries of largest `order` first, each up to its room.

    Args:
        order: [b, n] numbers >= 0; entries of 0 get nothing, equal ones their turn by place.
        room: [b, n] numbers >= 0.
        budget: [b] numbers >= 0.

    Returns:
        [b, n] what each entry gets, at most `room`, in all at most `budget`.
    """
    before = lambda t: jnp.where(order > t[:, None], room, 0)  # noqa: E731
    last = smallest(lambda t: before(t).sum(1) < budget, *order.shape[:1], order.dtype)
    full = before(last)
    tied = jnp.where((order == last[:, None]) & (order > 0), room, 0)
    left = budget[:, None] - full.sum(1, keepdims=True) - (jnp.cumsum(tied, 1) - tied)
    return full + jnp.clip(left, 0, tied)
