"""Near copies of one image: who they are, and a training set that holds few of each.

    groups = near_copies(thumbnails(pairs.images))
    pairs = pairs.take(thin(groups, 5))

A targeted poison is one image many times over, and so are the backdoors that nobody planted: one
picture with one caption, hundreds of times on the web. Without its copies a poison is too weak.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrobust.attacks.inputs import check_steps
from jaxrobust.data import stored_images

# Contrast that counts as none, as a root mean square in [0, 1]: blank images are copies.
_BLANK = 0.01
# Similarities that are held at a time: 1 GiB.
_AT_ONCE = 2**28


def thumbnails(images: Any, *, side: int = 16, batch_size: int = 250) -> Float[np.ndarray, "n d"]:
    """What `near_copies` tells images apart by: small pictures without brightness and contrast.

    Args:
        images: [n, h, w, c] in [0, 1], an array or `data.StoredImages`.
        side: of the small pictures, in pixels.
        batch_size: images at a time.

    Returns:
        [n, side * side * c + 1] unit rows; their products are correlations of pictures.

    Raises:
        TypeError: images are not floating point.
        ValueError: side or batch_size < 1, or images are none or not in [0, 1].
    """
    check_steps(side, "side")
    check_steps(batch_size, "batch_size")
    images = stored_images.checked(images)
    count = len(images)
    found = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        found.append(np.asarray(_thumbnails(np.asarray(images[rows]), side)))
    return np.concatenate(found)[:count]


@partial(jax.jit, static_argnums=1)
def _thumbnails(images: Array, side: int) -> Array:
    count, _, _, channels = images.shape
    small = jax.image.resize(images, (count, side, side, channels), "linear", antialias=True)
    flat = (small - small.mean((1, 2), keepdims=True)).reshape(count, -1)
    floor = jnp.full((count, 1), _BLANK * flat.shape[1] ** 0.5)
    flat = jnp.concatenate([flat, floor], 1)
    return flat / jnp.linalg.norm(flat, axis=1, keepdims=True)


def near_copies(rows: Any, *, cosine: float = 0.95) -> Int[np.ndarray, "n"]:
    """Groups of rows that are alike, directly or by way of others: connected components.

    Every pair is compared, in blocks on the device; nothing is approximate. Look at the size of the
    largest group: pictures that differ little (blank ones, text on white) can form chains, and so
    can an attacker's who wants a class thinned out. A higher cosine breaks them.

    Args:
        rows: [n, d] unit rows: of `thumbnails`, or embeddings of a network.
        cosine: similarity in (0, 1] from which two are alike.

    Returns:
        [n], for each row the first one of its group.

    Raises:
        ValueError: rows that are not [n, d], or a cosine outside (0, 1].
    """
    rows = np.asarray(rows, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"rows must be [n, d], got shape {rows.shape}")
    if not 0 < cosine <= 1:
        raise ValueError(f"cosine must be in (0, 1], got {cosine}")
    count = len(rows)
    size = max(1, min(count, _AT_ONCE // max(count, 1)))
    on_device = jnp.asarray(rows)
    groups = np.arange(count)
    while True:
        found = [
            np.asarray(_first_alike(on_device[start : start + size], on_device, groups, cosine))
            for start in range(0, count, size)
        ]
        # What stands for a row is stood for itself: chains end in few rounds.
        linked = np.minimum(groups, np.concatenate([*found, groups[:0]]))
        linked = linked[linked]
        if (linked == groups).all():
            return groups
        groups = linked


@jax.jit
def _first_alike(some: Array, rows: Array, groups: Array, cosine: Array) -> Array:
    """[b] the smallest group among all rows that are alike."""
    # A copy's similarity is 1 only up to rounding.
    products = jnp.matmul(some, rows.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(products >= cosine - 1e-6, groups, len(rows)).min(1)


def thin(groups: Int[np.ndarray, "n"], most: int, *, seed: int = 0) -> Int[np.ndarray, "m"]:
    """Rows to keep so that no group has more than `most`, drawn at random, in their order.

    Raises:
        ValueError: most < 1.
    """
    check_steps(most, "most")
    order = np.random.RandomState(seed).permutation(len(groups))
    order = order[np.argsort(np.asarray(groups)[order], kind="stable")]
    ordered = np.asarray(groups)[order]
    # A row's place within its group.
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered, side="left")
    return np.sort(order[place < most])
