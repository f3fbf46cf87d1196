"""Random crops and blurs on the device: two small matrix products per image, rows then columns.

On a CPU gathers of single pixels are several times slower. Keys and masks are as in `augment`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrobust.data.augment import Images, Keys, Mask, moved_together, recoloured

_CROP_TRIES = 10  # as torchvision's RandomResizedCrop


def check_interval(name: str, interval: tuple[float, float], least: float, most: float) -> None:
    """Refuses an interval that is not within [least, most]."""
    low, high = interval
    if not least <= low <= high <= most:
        raise ValueError(
            f"{name} must be (low, high) with {least} <= low <= high <= {most}, got {interval}"
        )


def separable(
    rows: Float[Array, "p h"], columns: Float[Array, "q w"], image: Float[Array, "h w c"]
) -> Float[Array, "p q c"]:
    """Filters an image along its rows and columns: out_pqc = sum_hw rows_ph columns_qw image_hwc.

    Args:
        rows: weights of the source rows in each new row.
        columns: weights of the source columns in each new column.
        image: what is filtered; computed in float32.
    """
    product = partial(jnp.einsum, precision="highest")  # not TF32, not bfloat16 on accelerators
    filtered = product("ph,hwc->pwc", rows, image.astype(jnp.float32))
    return product("qw,pwc->pqc", columns, filtered).astype(image.dtype)


def bilinear_weights(
    start: Float[Array, ""], extent: Float[Array, ""], source: int, target: int
) -> Float[Array, "target source"]:
    """Weights that resample [start, start + extent) of `source` pixels to `target` pixels.

    The triangle is widened when pixels are merged (antialiasing); at the border the last pixel is
    continued.

    Args:
        start: left edge in pixels, >= 0.
        extent: length in pixels, > 0.
        source: number of pixels.
        target: number of new pixels.
    """
    width = jnp.maximum(1.0, extent / target)
    centres = start + (jnp.arange(target) + 0.5) * (extent / target) - 0.5
    weights = jnp.maximum(0.0, 1 - jnp.abs(jnp.arange(source) - centres[:, None]) / width)
    return weights / weights.sum(1, keepdims=True)


def crop_box(
    key: Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Float[Array, "4"]:
    """A random box (top, left, height, width) in pixels, not rounded.

    Area and aspect ratio are drawn up to ten times until the box fits; failing that, the largest
    central box of an allowed ratio.

    Args:
        key: of this box.
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: interval of the box's share of the area.
        ratio: interval of its width / height, drawn uniformly in the logarithm.
    """
    # One draw for all, since each draw costs a second of compilation.
    draws = jax.random.uniform(key, (2 * _CROP_TRIES + 2,))
    area = scale[0] + draws[:_CROP_TRIES] * (scale[1] - scale[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(low + draws[_CROP_TRIES:-2] * (high - low))
    area *= height * width
    tall, wide = jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)
    fits = (tall <= height) & (wide <= width)
    first = jnp.argmax(fits)
    allowed = min(max(width / height, ratio[0]), ratio[1])
    whole = (min(height, width / allowed), min(width, height * allowed))
    found = fits.any()
    tall = jnp.where(found, tall[first], whole[0])
    wide = jnp.where(found, wide[first], whole[1])
    place = jnp.where(found, draws[-2:], 0.5)
    return jnp.stack([place[0] * (height - tall), place[1] * (width - wide), tall, wide])


@partial(jax.jit, static_argnames=("scale", "ratio"))
def random_resized_crop(
    key: Keys,
    images: Images,
    mask: Mask | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Images | tuple[Images, Mask]:
    """Crops a random box of each image and enlarges it, bilinearly, to the old size.

    Args:
        key: one typed key, or [b], one per example.
        images: [b, h, w, c].
        mask: [b, h, w, 1] or [b, h, w, c] to move along; values in between appear at its edges.
        scale: interval of the box's share of the area, in (0, 1].
        ratio: interval of its width / height, > 0.

    Returns:
        The images; or (images, mask) when a mask is given.

    Raises:
        ValueError: an interval is out of its range, or the number of keys is not that of images.

    Source: torchvision's RandomResizedCrop (Szegedy et al. 2014, section 6), with boxes that are
        not rounded to pixels.
    """
    check_interval("scale", scale, 1e-6, 1.0)
    check_interval("ratio", ratio, 1e-6, math.inf)
    height, width = images.shape[1:3]

    def move(key: Array, image: Array) -> Array:
        top, left, tall, wide = crop_box(key, height, width, scale, ratio)
        rows = bilinear_weights(top, tall, height, height)
        return separable(rows, bilinear_weights(left, wide, width, width), image)

    return moved_together(move, key, images, mask)


def blur_weights(sigma: Float[Array, ""], radius: int, size: int) -> Float[Array, "size size"]:
    """Gaussian weights of `size` pixels in each of them, mirrored at the ends without repeating.

    Args:
        sigma: in pixels, > 0.
        radius: how far the kernel reaches, in pixels, below `size`.
        size: number of pixels.
    """
    taps = jnp.arange(-radius, radius + 1)
    total = jnp.exp(-((taps / sigma) ** 2) / 2).sum()
    place, out = jnp.arange(size), jnp.arange(size)[:, None]

    def weight(source: Array, counted: Array) -> Array:
        distance = source - out
        kernel = jnp.exp(-((distance / sigma) ** 2) / 2)
        return jnp.where((jnp.abs(distance) <= radius) & counted, kernel, 0)

    # A pixel counts once itself, once as its image before the first and once behind the last.
    below, above = weight(-place, place > 0), weight(2 * (size - 1) - place, place < size - 1)
    return (weight(place, place >= 0) + below + above) / total


@partial(jax.jit, static_argnames=("sigma", "radius"))
def gaussian_blur(
    key: Keys,
    images: Images,
    mask: Mask | None = None,
    sigma: tuple[float, float] = (0.1, 2.0),
    radius: int | None = None,
) -> Images | tuple[Images, Mask]:
    """Blurs each image with a Gaussian of random width.

    Args:
        key: one typed key, or [b], one per example.
        images: [b, h, w, c].
        mask: returned as it is.
        sigma: interval of the standard deviation in pixels, > 0.
        radius: of the kernel of 2 radius + 1 pixels; None is three of the largest sigma, at most
            what the images allow.

    Returns:
        The images; or (images, mask) when a mask is given.

    Raises:
        ValueError: sigma or radius is out of its range, or the number of keys is not the number of
            images.
    """
    check_interval("sigma", sigma, 1e-6, math.inf)
    height, width = images.shape[1:3]
    most = min(height, width) - 1
    if radius is None:
        radius = min(most, math.ceil(3 * sigma[1]))
    if not 0 <= radius <= most:
        raise ValueError(f"radius must be in [0, {most}], below the images' side, got {radius}")

    def change(key: Array, image: Array) -> Array:
        own = jax.random.uniform(key, minval=sigma[0], maxval=sigma[1])
        rows, columns = (blur_weights(own, radius, size) for size in (height, width))
        return separable(rows, columns, image)

    return recoloured(change, key, images, mask)
