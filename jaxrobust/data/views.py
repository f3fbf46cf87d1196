"""Random views of images for contrastive training, composed from crops, colours and blur.

    first, second = clip_views(key_a, images), clip_views(key_b, images)

One key per example, as in `augment`: a row depends on its own key alone.
"""

import math
from functools import partial

import jax

from jaxrobust.data.augment import Images, Keys, Mask, compose, flip
from jaxrobust.data.colours import check_channels, check_share, color_jitter, grayscale
from jaxrobust.data.resampling import gaussian_blur, random_resized_crop
from jaxrobust.keys import example_keys

# What SafeCLIP's blur was made for: 21 pixels and sigma up to 2 at a side of 224.
_BLUR_SIDE, _BLUR_RADIUS, _BLUR_SIGMA = 224, 10, 2.0


def blur_for(side: int, strength: float = 1.0) -> tuple[tuple[float, float], int]:
    """SafeCLIP's blur for images of another side than 224: the interval of sigma, and the radius.

    At 224 it is sigma in [0.1, 2] and 21 pixels. Sigma is a length in the picture and shrinks with
    it, but to no less than half a pixel, below which a Gaussian does nothing; the kernel shrinks
    too, since 21 pixels of a 32-pixel image would be mostly mirrored border, and holds three sigma.

    Args:
        side: of the images, the shorter one, in pixels.
        strength: scales sigma.
    """
    shrink = side / _BLUR_SIDE
    largest = max(_BLUR_SIGMA * shrink, 0.5) * strength
    radius = max(round(_BLUR_RADIUS * shrink), math.ceil(3 * largest))
    return (min(0.1, largest), largest), min(radius, side - 1)


@partial(jax.jit, static_argnames=("strength", "mirror"))
def clip_views(
    key: Keys,
    images: Images,
    mask: Mask | None = None,
    strength: float = 1.0,
    mirror: bool = True,
) -> Images | tuple[Images, Mask]:
    """One random view of each image as SafeCLIP draws it; two keys give two views.

    Flip, random resized crop (area 0.08 to 1), with probability 0.8 colour jitter (0.5, 0.5, 0.5,
    0.1), with probability 0.2 grey, and always a blur (`blur_for`).

    Args:
        key: one typed key, or [b], one per example.
        images: [b, h, w, c] in [0, 1], c = 1 or 3.
        mask: [b, h, w, 1] or [b, h, w, c]; moved along by flip and crop.
        strength: s in [0, 1]: the smallest crop is 1 - 0.92 s of the area, ratios are
            (3/4)^s to (4/3)^s, colours, the chance of grey and the blur are s times the full ones.
            0 changes nothing.
        mirror: with the flip, at any strength above 0; not for pictures of text or arrows.

    Returns:
        The images; or (images, mask) when a mask is given.

    Raises:
        ValueError: strength is not in [0, 1], the images have neither 1 nor 3 channels, or the
            number of keys is not the number of images.

    Source: SafeCLIP (Yang et al. 2023, arXiv:2310.05862), its public code's augmentations.
    """
    check_share("strength", strength)
    check_channels(images)
    if strength == 0:
        example_keys(key, len(images))  # the number of keys is checked at any strength
        return images if mask is None else (images, mask)
    sigma, radius = blur_for(min(images.shape[1:3]), strength)
    amounts = dict.fromkeys(("brightness", "contrast", "saturation"), 0.5 * strength)
    crop = partial(
        random_resized_crop,
        scale=(1 - 0.92 * strength, 1.0),
        ratio=((3 / 4) ** strength, (4 / 3) ** strength),
    )
    view = compose(
        *([flip] if mirror else []),
        crop,
        partial(color_jitter, **amounts, hue=0.1 * strength),
        partial(grayscale, probability=0.2 * strength),
        partial(gaussian_blur, sigma=sigma, radius=radius),
    )
    return view(key, images, mask)
