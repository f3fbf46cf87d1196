"""Random changes of colour on the device: jitter and greying; keys and masks as in `augment`."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrobust.data.augment import Images, Keys, Mask, recoloured

Plane = Float[Array, "*b h w"]

# ITU-R 601, as in pillow and torchvision.
LUMA = (0.299, 0.587, 0.114)


def check_share(name: str, value: float, most: float = 1.0) -> None:
    """Refuses a number outside [0, most]."""
    if not 0 <= value <= most:
        raise ValueError(f"{name} must be in [0, {most}], got {value}")


def check_channels(images: Array) -> None:
    """Refuses images that are neither grey nor RGB."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {images.shape[-1]}")


def luma(planes: Sequence[Plane]) -> Plane:
    """Brightness of pixels: 0.299 r + 0.587 g + 0.114 b, or the one plane of a grey image."""
    # Not a dot, which accelerators round to bfloat16.
    return sum(c * p for c, p in zip(LUMA, planes, strict=True)) if len(planes) == 3 else planes[0]


def shift_hue(planes: Sequence[Plane], turn: Float[Array, ""]) -> list[Plane]:
    """Turns the hue of each pixel, keeping HSV's saturation and value.

    Args:
        planes: red, green and blue in [0, 1].
        turn: in turns; 1/3 makes red green.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    safe = jnp.where(chroma == 0, 1, chroma)
    sixths = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )

    def turned(place: Array) -> Array:
        place -= 6 * jnp.floor(place / 6)  # a remainder, but vectorised on a CPU
        return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)

    return [turned(corner + (sixths + 6 * turn)) for corner in (5.0, 3.0, 1.0)]


@partial(jax.jit, static_argnames=("brightness", "contrast", "saturation", "hue", "probability"))
def color_jitter(
    key: Keys,
    images: Images,
    mask: Mask | None = None,
    brightness: float = 0.5,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 0.1,
    probability: float = 0.8,
) -> Images | tuple[Images, Mask]:
    """Changes brightness, contrast, saturation and hue by random amounts in random order.

    The first three: x <- clip(f x + (1 - f) base, 0, 1), f uniform in [1 - amount, 1 + amount],
    base being black, the image's mean brightness, and each pixel's own brightness.

    Args:
        key: one typed key, or [b], one per example.
        images: [b, h, w, c] in [0, 1], c = 1 or 3; grey images keep saturation and hue.
        mask: returned as it is.
        brightness: amount, in [0, 1].
        contrast: amount, in [0, 1].
        saturation: amount, in [0, 1].
        hue: largest turn either way, in [0, 1/2] turns.
        probability: that an example is changed at all.

    Returns:
        The images; or (images, mask) when a mask is given.

    Raises:
        ValueError: an amount is out of its range, the images have neither 1 nor 3 channels, or the
            number of keys is not the number of images.

    Source: torchvision's ColorJitter; amounts of SafeCLIP (Yang et al. 2023).
    """
    amounts = (brightness, contrast, saturation)
    for name, amount in zip(("brightness", "contrast", "saturation"), amounts, strict=True):
        check_share(name, amount)
    check_share("hue", hue, 0.5)
    check_share("probability", probability)
    check_channels(images)
    coloured = images.shape[-1] == 3

    def change(key: Array, image: Array) -> Array:
        # One draw for all, since each draw costs a second of compilation.
        draws = jax.random.uniform(key, (9,))
        factors = 1 + (2 * draws[1:4] - 1) * jnp.array(amounts)
        order, turn = jnp.argsort(draws[4:8]), (2 * draws[8] - 1) * hue
        planes = _planes(image.astype(jnp.float32))
        changed = _jittered(planes, factors, order, turn, coloured and hue > 0)
        return jnp.where(draws[0] < probability, jnp.stack(changed, -1), image)

    return recoloured(change, key, images, mask)


def _planes(image: Array) -> list[Array]:
    """The channels as arrays of their own; as one array XLA computes much three times on CPUs."""
    return [image[..., channel] for channel in range(image.shape[-1])]


def _jittered(planes: list, factors: Array, order: Array, turn: Array, with_hue: bool) -> list:
    """The four changes in `order`: 0 brightness, 1 contrast, 2 saturation, 3 hue.

    Hue is the only dear one and one per image must do: the cheap three stand before and after it,
    where a change whose turn is on the other side gets the factor 1, the identity.
    """

    def cheap(planes: list, number: Array, active: Array) -> list:
        factor = jnp.where(active & (number < 3), factors[jnp.minimum(number, 2)], 1)
        grey = luma(planes)
        base = jnp.where(number == 0, 0, jnp.where(number == 1, grey.mean(), grey))
        rest = (1 - factor) * base
        return [jnp.clip(factor * plane + rest, 0, 1) for plane in planes]

    turn_of_hue = jnp.argmax(order == 3)
    for place in range(3):
        planes = cheap(planes, order[place], place < turn_of_hue)
    if with_hue:
        planes = shift_hue(planes, turn)
    for place in range(1, 4):
        planes = cheap(planes, order[place], place > turn_of_hue)
    return planes


@partial(jax.jit, static_argnames="probability")
def grayscale(
    key: Keys, images: Images, mask: Mask | None = None, probability: float = 0.2
) -> Images | tuple[Images, Mask]:
    """Replaces all channels of an image by its brightness, with a probability.

    Args:
        key: one typed key, or [b], one per example.
        images: [b, h, w, c], c = 1 or 3.
        mask: returned as it is.
        probability: of becoming grey.

    Returns:
        The images; or (images, mask) when a mask is given.

    Raises:
        ValueError: probability is not in [0, 1], the images have neither 1 nor 3 channels, or the
            number of keys is not the number of images.
    """
    check_share("probability", probability)
    check_channels(images)

    def change(key: Array, image: Array) -> Array:
        if image.shape[-1] == 1:
            return image
        grey = luma(_planes(image))[..., None]
        return jnp.where(jax.random.bernoulli(key, probability), grey, image)

    return recoloured(change, key, images, mask)
