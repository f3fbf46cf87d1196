"""A first-in-first-out pool of past embeddings, and the nearest one of them to each query."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrobust.attacks.inputs import check_steps


class Pool(NamedTuple):
    """The last embeddings of one modality; arrays alone, so that it is checkpointed as it is.

    Attributes:
        rows: [k, d] unit rows; those not yet written are zero.
        pointer: where the next row is written.
        filled: how many rows have been written, k at most.
    """

    rows: Float[Array, "k d"]
    pointer: Int[Array, ""]
    filled: Int[Array, ""]


def empty_pool(size: int, width: int) -> Pool:
    """A pool without any rows.

    Args:
        size: k >= 1. The authors use about 2 % of the examples, 2,048 at least.
        width: d, of the embeddings.
    """
    check_steps(size, "size")
    check_steps(width, "width")
    zero = jnp.zeros((), jnp.int32)
    # Two arrays, for a donated state must not hold one buffer twice.
    return Pool(jnp.zeros((size, width)), zero, jnp.copy(zero))


def nearest(
    pool: Pool, queries: Float[Array, "b d"]
) -> tuple[Float[Array, "b d"], Bool[Array, ""]]:
    """The row of the pool that is most similar to each query.

    Args:
        pool: rows that were never written are not looked at.
        queries: [b, d] unit rows.

    Returns:
        [b, d] neighbours, with no gradient to the queries, and whether the pool has any row. As
        long as it has none the neighbours are the queries themselves.

    Source: Dwibedi et al. 2021 (NNCLR), eq. 2.
    """
    queries = jax.lax.stop_gradient(queries)
    # One pass in the backend's fast precision: a wrong one of two rows that are equally near to
    # three digits is as good.
    similarity = queries @ pool.rows.T
    written = jnp.arange(pool.rows.shape[0]) < pool.filled
    found = pool.rows[jnp.where(written, similarity, -jnp.inf).argmax(1)]
    some = pool.filled > 0
    return jnp.where(some, found, queries), some


def push(pool: Pool, rows: Float[Array, "n d"]) -> Pool:
    """Writes rows over the oldest ones.

    Args:
        pool: of k rows.
        rows: [n, d] unit rows, n <= k, the same on all devices.

    Raises:
        ValueError: n > k.
    """
    size, count = pool.rows.shape[0], rows.shape[0]
    if count > size:
        raise ValueError(f"rows must be at most {size}, the pool's size, got {count}")
    places = (pool.pointer + jnp.arange(count)) % size
    return Pool(
        pool.rows.at[places].set(jax.lax.stop_gradient(rows)),
        (pool.pointer + count) % size,
        jnp.minimum(pool.filled + count, size),
    )
