"""The fifteen common corruptions at five severities, as the package imagecorruptions makes them.

    foggy = corrupt(test.images, "fog", severity=3)

Source: Hendrycks and Dietterich 2019 (ImageNet-C).
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from jaxrobust.data.packages import require

NOISE = ("gaussian_noise", "shot_noise", "impulse_noise")
BLUR = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
WEATHER = ("snow", "frost", "fog", "brightness")
DIGITAL = ("contrast", "elastic_transform", "pixelate", "jpeg_compression")
CORRUPTIONS = (*NOISE, *BLUR, *WEATHER, *DIGITAL)
SEVERITIES = (1, 2, 3, 4, 5)

# The package's smallest image, and the corruptions that take their own seed.
_LEAST = 32
_ULP = 1e-6  # by so much images may leave [0, 1], as for the attacks
_SEEDED = ("impulse_noise", "glass_blur")


def corrupt(
    images: Any,
    name: str,
    severity: int,
    *,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Corrupts every image.

    Severities are those of ImageNet at 224 pixels, and not of CIFAR-10-C. Images below 32 pixels
    are framed by their own edge for the while; grey images are corrupted in colour and made grey
    again.

    Args:
        images: [n, h, w, c] float in [0, 1], c = 1 or 3; rounded to 8 bits.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        indices: [n] numbers of the images in their data set, 0 .. n - 1 by default: image i draws
            from (seed, indices[i]) alone.
        seed: of all draws.
        progress: show a progress bar.

    Returns:
        [n, h, w, c] float32 in [0, 1], multiples of 1 / 255 where the image has colour.

    Raises:
        ValueError: names the argument, its value and what was expected.
        ImportError: the package is not installed.
    """
    images = np.asarray(images)
    indices = range(len(images)) if indices is None else indices
    check_images(images)
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    _check(images, name, severity, indices)
    apply = package().corrupt
    whole = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    corrupted = np.empty(images.shape, np.float32)
    label = f"{name} {severity}"
    for row, index in enumerate(tqdm(indices, desc=label, unit="image", disable=not progress)):
        number = _number(seed, CORRUPTIONS.index(name), severity, index)
        own = {"seed": number} if name in _SEEDED else {}
        with _seeded(number):
            found = apply(_framed(whole[row]), severity, name, **own)
        corrupted[row] = _unframed(found, images.shape[1:]) / 255
    return corrupted


def package() -> ModuleType:
    """The package of the corruptions.

    Raises:
        ImportError: it is not installed; the message has the command that brings it.
    """
    return require("imagecorruptions", "imagecorruptions-imaug", "common corruptions")


def check_images(images: Any) -> None:
    """Refuses images that cannot be corrupted.

    Raises:
        ValueError: they are not [n, h, w, 1 or 3], not float, or outside [0, 1] by over 1e-6.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be [n, h, w, 1 or 3], got shape {images.shape}")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be float in [0, 1], got {images.dtype}")
    if images.size and not (images.min() >= -_ULP and images.max() <= 1 + _ULP):
        raise ValueError(
            f"images must be in [0, 1], got values from {images.min():g} to {images.max():g}"
        )


def _check(images, name, severity, indices):
    if name not in CORRUPTIONS:
        raise ValueError(f"name must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    if len(indices) != len(images) or (len(indices) and np.min(indices) < 0):
        raise ValueError(f"indices must be {len(images)} numbers >= 0, got {indices}")


def _number(*words: int) -> int:
    """One number below 2^32 from several."""
    return int(np.random.SeedSequence([int(word) for word in words]).generate_state(1)[0])


@contextlib.contextmanager
def _seeded(number: int) -> Iterator[None]:
    """The package draws from numpy's global generator: lend it, and put the caller's state back."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(number)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def _framed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """In colour, and at least 32 pixels high and wide."""
    image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    missing = [max(_LEAST - side, 0) for side in image.shape[:2]]
    frame = [(side // 2, side - side // 2) for side in missing]
    return np.pad(image, (*frame, (0, 0)), mode="edge")


def _unframed(image: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What `_framed` was given, in size and channels."""
    top, left = (max(_LEAST - side, 0) // 2 for side in shape[:2])
    image = image[top : top + shape[0], left : left + shape[1]].astype(np.float32)
    return image.mean(-1, keepdims=True) if shape[-1] == 1 else image
