"""Images that stay in their files: an array by its shape and its rows, decoded when asked for.

pairs = pair_source("cc3m/train.tsv", size=224).pairs()
some = pairs.take(rows)                  # decodes nothing
batch = np.asarray(some.images[:512])    # decodes these
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from jaxrobust.data.dataset import Source, check_images
from jaxrobust.data.decoding import decoding_pool

_AT_ONCE = 512  # images that are decoded together where all are looked at


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImages:
    """[n, h, w, c] float32 in [0, 1] on disk, with a few others in memory among them.

    Rows are chosen as of an array and stay undecoded; `np.asarray` and iteration decode them.

    Attributes:
        source: the images on disk.
        places: [n] an image's place in `source`, or `len(source)` and its place in `added`.
        added: [m, h, w, c] images that are on no disk, such as poisons.
        known: digests by place in `source`, found so far; all that were made of one share them,
            since hashing an image means decoding it.
    """

    source: Source
    places: Int[np.ndarray, "n"]
    added: Float[np.ndarray, "m h w c"]
    known: dict[int, bytes] = dataclasses.field(default_factory=dict, repr=False)

    ndim = 4
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the array that this stands for."""
        return (len(self.places), *self.added.shape[1:])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Any) -> "StoredImages":
        places = self.places[rows]
        if places.ndim != 1:
            raise IndexError(f"rows must be a slice or an array of rows, got {rows!r}")
        return dataclasses.replace(self, places=places)

    def __iter__(self) -> Iterator[Float[np.ndarray, "h w c"]]:
        for start in range(0, len(self), _AT_ONCE):
            yield from np.asarray(self[start : start + _AT_ONCE])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        images, stored = np.empty(self.shape, np.float32), self._is_stored
        if stored.any():
            with decoding_pool(min(16, os.cpu_count() or 1)) as pool:
                images[stored] = self.source.take(self.places[stored], pool).images
        images[~stored] = self.added[self.places[~stored] - len(self.source)]
        return images if dtype is None else images.astype(dtype, copy=False)

    @property
    def _is_stored(self) -> np.ndarray:
        return self.places < len(self.source)

    def joined(self, images: Float[np.ndarray, "k h w c"]) -> "StoredImages":
        """These images, with others behind them."""
        return self._with(images, lambda new: np.concatenate([self.places, new]))

    def replaced(
        self, rows: Int[np.ndarray, "k"], images: Float[np.ndarray, "k h w c"]
    ) -> "StoredImages":
        """These images, with others in place of some."""

        def put(new: np.ndarray) -> np.ndarray:
            places = self.places.copy()
            places[rows] = new
            return places

        return self._with(images, put)

    def _with(self, images, put) -> "StoredImages":
        images = np.asarray(images, np.float32)
        new = len(self.source) + len(self.added) + np.arange(len(images))
        added = np.concatenate([self.added, images])
        return dataclasses.replace(self, places=put(new), added=added)

    def digests(self) -> list[bytes]:
        """SHA-256 of each image's pixels; those on disk are decoded for it, once in a program."""
        stored = self._is_stored
        missing = [place for place in set(self.places[stored].tolist()) if place not in self.known]
        with tqdm(total=len(missing), desc="hashing images", disable=None, delay=1) as bar:
            for first in range(0, len(missing), _AT_ONCE):
                some = np.array(missing[first : first + _AT_ONCE])
                images = np.asarray(dataclasses.replace(self, places=some))
                self.known.update(zip(some.tolist(), map(_digest, images), strict=True))
                bar.update(len(some))
        others = [_digest(image) for image in self.added]
        return [
            self.known[place] if is_stored else others[place - len(self.source)]
            for place, is_stored in zip(self.places.tolist(), stored, strict=True)
        ]


# What holds images: both have a shape, a length and rows.
Images = np.ndarray | StoredImages


def stored(source: Source) -> StoredImages:
    """All images of a source, in its order.

    Args:
        source: images of one shape: with `size`, or stored so.
    """
    shape = source[0]["image"].shape
    return StoredImages(source, np.arange(len(source)), np.empty((0, *shape), np.float32))


def checked(images: Any) -> Images:
    """Images as they are stored, or as an array that was looked through: `check_images`."""
    return images if isinstance(images, StoredImages) else check_images(images)


def joined(images: Images, others: np.ndarray) -> Images:
    """Images with others behind them."""
    if isinstance(images, StoredImages):
        return images.joined(others)
    return np.concatenate([images, others]).astype(np.float32)


def replaced(images: Images, rows: Int[np.ndarray, "k"], others: np.ndarray) -> Images:
    """Images with others in place of some rows."""
    if isinstance(images, StoredImages):
        return images.replaced(rows, others)
    changed = np.array(images)
    changed[rows] = others
    return changed


def digests(images: Images) -> list[bytes]:
    """SHA-256 of each image's pixels."""
    if isinstance(images, StoredImages):
        return images.digests()
    return [_digest(image) for image in images]


def identity(images: Images) -> bytes:
    """Digest of images in memory; of stored ones, of which they are and of some of their files."""
    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    held = [images]
    if isinstance(images, StoredImages):
        held = [images.places, images.added]
        stored = images.places[images.places < len(images.source)]
        digest.update(images.source.fingerprint(stored).encode())
    for array in held:
        digest.update(np.ascontiguousarray(array))
    return digest.digest()


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image)).digest()
