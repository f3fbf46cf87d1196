"""Detectors by density: a poison has fewer images like it around than its neighbours have.

    scores = detect(dao, embeddings, batch_size=2048)      # [n], the higher the more suspicious

Source: Huang et al. 2025 (arXiv:2502.01385), on batches of image embeddings.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxrobust.attacks.inputs import check_steps

# Shorter distances count as this share of the embeddings' length: copies lie at distance 0.
_TINY = 1e-6


class _Neighbours(NamedTuple):
    places: Array  # [b, k] rows of the nearest others, nearest first
    distances: Array  # [b, k]


def k_distance(embeddings: ArrayLike, k: int = 16) -> Float[Array, "b"]:
    """Distance to the k-th nearest other embedding.

    Args:
        embeddings: [b, d], as they are: unit rows from a CLIP encoder.
        k: 1 <= k < b.

    Returns:
        [b], the higher the more suspicious.

    Raises:
        ValueError: embeddings that are not [b, d] with b > k, or k < 1.
    """
    return _k_distance(_checked(embeddings, k), k)


def slof(embeddings: ArrayLike, k: int = 16) -> Float[Array, "b"]:
    """Simplified local outlier factor: sparser than the neighbours are?

    slof(x) = mean over the k nearest o of  d_k(x) / d_k(o),  d_k as in `k_distance`

    Args, result and errors as for `k_distance`; about 1 inside a cluster.

    Source: Schubert et al. 2014.
    """
    return _slof(_checked(embeddings, k), k)


def dao(embeddings: ArrayLike, k: int = 16) -> Float[Array, "b"]:
    """Dimensionality-aware outlier factor: the ratio counts the more, the higher the dimension.

    dao(x) = mean over the k nearest o of  lid(o) log(d_k(x) / d_k(o))
    lid(o) = -1 / mean_i log(d_i(o) / d_k(o)),  i = 1..k, at most the embeddings' dimension

    The mean of logarithms, as the published detector has it, in place of the mean of powers.

    Args, result and errors as for `k_distance`; about 0 inside a cluster.

    Source: Anderberg et al. 2024; lid by maximum likelihood as in Amsaleg et al. 2015.
    """
    return _dao(_checked(embeddings, k), k)


def detect(
    method: Callable[..., Array],
    embeddings: Any,
    *,
    k: int = 16,
    batch_size: int = 2048,
    seed: int = 0,
) -> Float[np.ndarray, "n"]:
    """Scores a whole set in random batches, in which a poison is as rare as it is in the set.

    Args:
        method: `k_distance`, `slof` or `dao`.
        embeddings: [n, d].
        k: neighbours.
        batch_size: embeddings that are compared with each other, > k; the larger the better.
        seed: of the batches. The last one is filled up with others, whose scores are not used.

    Returns:
        [n] float32, the higher the more suspicious.

    Raises:
        ValueError: as `k_distance`, or batch_size < 1.
    """
    check_steps(batch_size, "batch_size")
    embeddings = np.asarray(embeddings, np.float32)
    count = len(embeddings)
    size = min(batch_size, count)
    order = np.random.RandomState(seed).permutation(count)
    scores = np.empty(count, np.float32)
    for start in range(0, count, max(size, 1)):
        rows = order[start : start + size]
        # Those before it in the order: never one of its own rows twice.
        others = order[max(0, start + len(rows) - size) : start]
        batch = embeddings[np.concatenate([rows, others])]
        scores[rows] = np.asarray(method(batch, k))[: len(rows)]
    return scores


def _checked(embeddings, k):
    check_steps(k, "k")
    embeddings = jnp.asarray(embeddings, jnp.float32)
    if embeddings.ndim != 2 or len(embeddings) <= k:
        raise ValueError(f"embeddings must be [b, d] with b > k = {k}, got {embeddings.shape}")
    return embeddings


def _nearest(x, k):
    """The k nearest others of each row.

    Found by one matrix product, which cannot tell near copies apart: 1 - cosine is rounded to 1e-7,
    a distance of 3e-4. So twice as many are found, and sorted by distances from the differences.
    """
    x = x - x.mean(0)  # embeddings lie in a narrow cone, whose axis would cost the product digits
    squares = jnp.square(x).sum(1)
    products = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    closeness = products - squares / 2  # of a row's others, the largest is the nearest
    closeness = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, closeness)
    places = jax.lax.top_k(closeness, min(2 * k, len(x) - 1))[1]
    # One neighbour at a time: all at once would hold [b, k, d].
    apart = lambda column: jnp.linalg.norm(x - x[column], axis=1)  # noqa: E731
    distances = jax.lax.map(apart, places.T).T
    order = jnp.argsort(distances, axis=1)[:, :k]
    places, distances = (jnp.take_along_axis(a, order, axis=1) for a in (places, distances))
    floor = _TINY * jnp.sqrt(squares.mean()) + jnp.finfo(x.dtype).tiny
    return _Neighbours(places, jnp.maximum(distances, floor))


@partial(jax.jit, static_argnums=1)
def _k_distance(x, k):
    return _nearest(x, k).distances[:, -1]


@partial(jax.jit, static_argnums=1)
def _slof(x, k):
    places, distances = _nearest(x, k)
    furthest = distances[:, -1]
    return (furthest[:, None] / furthest[places]).mean(1)


@partial(jax.jit, static_argnums=1)
def _dao(x, k):
    places, distances = _nearest(x, k)
    furthest = distances[:, -1]
    spread = -jnp.log(distances / furthest[:, None]).mean(1)
    dimension = 1 / jnp.maximum(spread, 1 / x.shape[1])
    return (dimension[places] * jnp.log(furthest[:, None] / furthest[places])).mean(1)
