"""Salience from hiding parts of the image: RISE and occlusion. They need no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrobust.attacks.inputs import check_steps
from jaxrobust.keys import example_keys, fold
from jaxrobust.salience.gradients import Apply, Images, Keys, Labels, Scores, label_logit


def rise(
    apply: Apply,
    x: Images,
    labels: Labels,
    keys: Keys,
    *,
    samples: int = 256,
    cells: int = 7,
    keep: float = 0.5,
) -> Scores:
    """RISE: the mean of random masks, weighted by how probable the label stays under each.

    1 / (m keep) sum_j p_y(x * M_j) M_j

    Args:
        apply: x -> [b, classes] logits.
        x: [b, h, w, c] images in [0, 1].
        labels: [b] the classes that are explained.
        keys: [b] typed keys, one per image.
        samples: m, masks per image, >= 1; 4,000 to 8,000 in the source.
        cells: side of the coarse random grid that a mask is drawn on, >= 1.
        keep: probability that a cell is shown, in (0, 1].

    Returns:
        [b, h, w, 1] scores >= 0.

    Raises:
        TypeError: there are no keys.
        ValueError: a number out of its range.

    Source: Petsiuk et al. 2018, eq. 6 and section 3.2.
    """
    check_steps(samples, "samples")
    check_steps(cells, "cells")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    keys = example_keys(keys, len(x))

    def add(total, number):
        own = fold(keys, number)
        draw = lambda key: rise_mask(key, x.shape[1:3], cells, keep)  # noqa: E731
        shown = jax.vmap(draw)(own).astype(x.dtype)
        return total + shown * _probability(apply, x * shown, labels), None

    # From x, so that the carry varies over the devices of a mesh as the images do.
    total, _ = jax.lax.scan(add, 0 * x[..., :1], jnp.arange(samples))
    return total / (samples * keep)


def rise_mask(key: Array, size: tuple[int, int], cells: int, keep: float) -> Float[Array, "h w 1"]:
    """One mask in [0, 1]: a coarse random grid, enlarged bilinearly and cut out at random.

    Args:
        key: one typed key.
        size: (h, w) of the image.
        cells: side of the grid.
        keep: probability of a 1 in it.
    """
    grid_key, shift_key = jax.random.split(key)
    cell = np.array([-(-side // cells) for side in size])
    grid = jax.random.bernoulli(grid_key, keep, (cells, cells)).astype(jnp.float32)
    large = jax.image.resize(grid, tuple((cells + 1) * cell), "bilinear")
    shift = jax.random.randint(shift_key, (2,), 0, jnp.asarray(cell))
    return jax.lax.dynamic_slice(large, shift, size)[..., None]


def occlusion(
    apply: Apply,
    x: Images,
    labels: Labels,
    keys: Keys = None,
    *,
    size: int = 4,
    stride: int = 2,
    fill: float = 0.5,
) -> Scores:
    """Occlusion: how much the label's probability falls when a square is covered.

    A pixel's score is the mean fall over the squares that cover it.

    Args:
        apply: x -> [b, classes] logits.
        x: [b, h, w, c] images in [0, 1].
        labels: [b] the classes that are explained.
        keys: unused; all methods are called alike.
        size: side of the square in pixels, at least 1 and at most the image's sides.
        stride: pixels between squares, in [1, size]; a last one ends at the border.
        fill: grey value of the square.

    Returns:
        [b, h, w, 1] scores, negative where covering helps the label.

    Raises:
        ValueError: a number out of its range.

    Source: Zeiler and Fergus 2014, section 4.2.
    """
    check_steps(stride, "stride")
    check_steps(size, "size")
    height, width = x.shape[1:3]
    if size > min(height, width):
        raise ValueError(f"size must be at most the image's {height}x{width} pixels, got {size}")
    if stride > size:
        raise ValueError(f"stride must be at most size = {size}, got {stride}")
    tops, lefts = _starts(height, size, stride), _starts(width, size, stride)
    squares = jnp.asarray([(top, left) for top in tops for left in lefts])
    clear = _probability(apply, x, labels)
    rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]

    def add(carry, corner):
        total, count = carry
        top, left = corner
        inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
        fall = clear - _probability(apply, jnp.where(inside, fill, x), labels)
        return (total + inside * fall, count + inside), None

    carry = (0 * x[..., :1], jnp.zeros((height, width, 1), x.dtype))
    (total, count), _ = jax.lax.scan(add, carry, squares)
    return total / count


def _starts(side, size, stride):
    starts = list(range(0, side - size + 1, stride))
    # A stride that does not divide the rest would leave the border uncovered.
    return starts if starts[-1] == side - size else [*starts, side - size]


def _probability(apply, x, labels):
    """The label's probability, [b, 1, 1, 1]."""
    return jnp.exp(label_logit(jax.nn.log_softmax(apply(x)), labels))[:, None, None, None]
