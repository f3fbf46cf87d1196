"""Maps that protect as much as a salience map and know nothing: the controls.

If training with them does as well, it is the protected area that matters and not the salience.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust.keys import example_keys
from jaxrobust.salience.maps import Maps, top_fraction


def shuffled(key: Array, maps: ArrayLike) -> Maps:
    """The same values on random pixels: equal area, exactly, with nothing left of the shape.

    Args:
        key: one typed key, or [b].
        maps: [b, h, w, 1]; only the values count.

    Returns:
        [b, h, w, 1], every map a permutation of its pixels.
    """
    maps = jnp.asarray(maps)

    def shuffle(key, one):
        return jax.random.permutation(key, one.reshape(-1)).reshape(one.shape)

    return jax.vmap(shuffle)(example_keys(key, len(maps)), maps)


def displaced(key: Array, maps: ArrayLike) -> Maps:
    """The same shape at a random place, what leaves on one side coming back on the other.

    Keeps area and shape, so that it differs from the map in its place alone.

    Args:
        key: one typed key, or [b].
        maps: [b, h, w, 1].
    """
    maps = jnp.asarray(maps)

    def move(key, one):
        shift = jax.random.randint(key, (2,), 0, jnp.asarray(one.shape[:2]))
        return jnp.roll(one, (shift[0], shift[1]), (0, 1))

    return jax.vmap(move)(example_keys(key, len(maps)), maps)


def least_salient(scores: ArrayLike, area: ArrayLike) -> Maps:
    """Marks the k lowest scores; arguments, result and errors as `top_fraction`."""
    return top_fraction(-jnp.asarray(scores), area)
