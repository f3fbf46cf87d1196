"""Image files as arrays: decoded, resized, looked at; and the threads that do it."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxrobust.data.packages import require

# Modes of pillow whose white is not known.
_OPEN_ENDED = ("I", "F")


def decode_image(encoded: bytes, channels: int, size: int | None, levels: int = 255) -> np.ndarray:
    """Decodes an image file; with `size`, resizes the shorter side to it and crops the centre.

    Args:
        encoded: the bytes of a file in any format that pillow reads; of 16 bits the upper ones.
        channels: 1 for grey, 3 for RGB; the image is converted.
        size: side of the square result in pixels, or None.
        levels: stored value of a fully bright pixel.

    Returns:
        [h, w, channels], uint8 in [0, levels]; float32 if it was resized from another number of
        levels than 255.

    Raises:
        ValueError: pixels of 32 bits or floating point.
    """
    image_module = require("PIL.Image", "pillow", "decoding images")
    with image_module.open(io.BytesIO(encoded)) as opened:
        image = _eight_bits(opened, image_module).convert("L" if channels == 1 else "RGB")
    if size is None or image.size == (size, size):
        return _array(image, channels)
    if levels != 255:  # resized in its few levels, it would keep as few
        image = image.point(lambda value: round(min(value, levels) * 255 / levels))
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((width, height), image_module.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    array = _array(image.crop((left, top, left + size, top + size)), channels)
    return array if levels == 255 else array * np.float32(levels / 255)


def _array(image, channels):
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def _eight_bits(opened: Any, image_module: Any) -> Any:
    """As it is, or of 16 bits the upper ones: pillow would cut everything above 255."""
    if opened.mode in _OPEN_ENDED:
        raise ValueError(f"pixels must have 8 or 16 bits, got an image of mode {opened.mode!r}")
    if not opened.mode.startswith("I;16"):
        return opened
    return image_module.fromarray(((np.asarray(opened, np.uint32) + 128) // 257).astype(np.uint8))


def decoded_or_none(
    encoded: bytes, channels: int, size: int | None, levels: int = 255
) -> np.ndarray | None:
    """As `decode_image`; None for a damaged file."""
    try:
        return decode_image(encoded, channels, size, levels)
    except _damage():
        return None


def stored_shape(encoded: bytes) -> tuple[int, int] | None:
    """(height, width) from an image file's header; None if it is damaged."""
    image_module = require("PIL.Image", "pillow", "decoding images")
    try:
        with image_module.open(io.BytesIO(encoded)) as opened:
            return opened.height, opened.width
    except _damage():
        return None


def is_readable(encoded: bytes) -> bool:
    """Whether an image file can be decoded to its end.

    A JPEG is decoded at an eighth of its size, which reads all of its bytes in a fraction of the
    time.

    Args:
        encoded: the bytes of the file.
    """
    image_module = require("PIL.Image", "pillow", "decoding images")
    try:
        with image_module.open(io.BytesIO(encoded)) as opened:
            opened.draft("RGB", (1, 1))
            opened.load()
            return opened.mode not in _OPEN_ENDED
    except _damage():
        return False


def _damage() -> tuple[type[BaseException], ...]:
    """What pillow raises on a damaged file."""
    image_module = require("PIL.Image", "pillow", "decoding images")
    return OSError, SyntaxError, ValueError, image_module.DecompressionBombError


def encode_png(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """The PNG file of an image: [h, w, 1] grey or [h, w, 3] RGB, uint8."""
    image_module = require("PIL.Image", "pillow", "encoding images")
    stream = io.BytesIO()
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    image_module.fromarray(squeezed).save(stream, format="PNG")
    return stream.getvalue()


@contextmanager
def decoding_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for `Source.take`; pillow releases the interpreter lock while it decodes."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="jaxrobust-decode")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
