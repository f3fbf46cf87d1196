"""TFDS builders of cut-out pictures on photographs: labelled images whose salience is exact.

What a picture's alpha says is drawn, the salience map says is salient: no annotator, no model.
Pictures and photographs are split first and put together afterwards, so that no picture and no
background of the test images was ever seen in training. `pictures` says whose art it is.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from jaxrobust.data.builders import image_features
from jaxrobust.data.decoding import encode_png
from jaxrobust.data.packages import require
from jaxrobust.data.pictures import (
    STAMP_CLASSES,
    TWEMOJI_CLASSES,
    Picture,
    photographs,
    stamp_pictures,
    twemoji_pictures,
)

# Images per class, and the share of the pictures and of the photographs that they are made of.
SPLITS = {"train": (750, 0.7), "validation": (100, 0.1), "test": (150, 0.2)}

# A picture's longer side, and a background's side before it shrinks: shares of the image's side
# and of the photograph's shorter side.
PICTURE_SIDES = (0.5, 0.9)
BACKGROUND_SIDES = (0.25, 1.0)
_LARGEST = 256  # pixels of a picture kept in memory


class Composite(NamedTuple):
    """An image with its exact salience: [side, side, 3] and [side, side, 1], uint8."""

    image: UInt8[np.ndarray, "side side 3"]
    salience: UInt8[np.ndarray, "side side 1"]


def composite(picture: Any, photograph: Any, random: np.random.RandomState, side: int) -> Composite:
    """Puts a cut-out of random size at a random place of a random part of a photograph.

    image = alpha * picture + (1 - alpha) * background

    Args:
        picture: pillow image, RGBA, cropped to what is drawn.
        photograph: pillow image, RGB.
        random: drawn from five times.
        side: of the result, in pixels.
    """
    image = background(photograph, random, side)
    width, height = picture.size
    scale = random.uniform(*PICTURE_SIDES) * side / max(width, height)
    small = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    left, top = (int(random.randint(side - extent + 1)) for extent in small.size)
    layer = small.getchannel("A")
    image.paste(small, (left, top), layer)
    salience = np.zeros((side, side, 1), np.uint8)
    salience[top : top + small.height, left : left + small.width, 0] = np.asarray(layer)
    return Composite(np.asarray(image), salience)


def background(photograph: Any, random: np.random.RandomState, side: int) -> Any:
    """A random square of a photograph, shrunk to `side` pixels; pillow images."""
    width, height = photograph.size
    extent = max(side, round(random.uniform(*BACKGROUND_SIDES) * min(width, height)))
    left, top = int(random.randint(width - extent + 1)), int(random.randint(height - extent + 1))
    return photograph.resize((side, side), box=(left, top, left + extent, top + extent))


def split_by_family(pictures: Sequence[Picture], split: str, seed: int = 0) -> list[Picture]:
    """The pictures of one split: each class's families, shuffled and cut by `SPLITS`.

    Args:
        pictures: of all splits.
        split: "train", "validation" or "test".
        seed: of the shuffle.

    Returns:
        The split's pictures, class after class, in shuffled order.
    """
    chosen = []
    for label in sorted({picture.label for picture in pictures}):
        members = [picture for picture in pictures if picture.label == label]
        families = list(dict.fromkeys(picture.family for picture in members))
        order = [families[i] for i in np.random.RandomState(seed).permutation(len(families))]
        wanted = order[_part(len(order), split)]
        chosen += [p for name in wanted for p in members if p.family == name]
    return chosen


def _part(count: int, split: str) -> slice:
    """Where a split lies in `count` shuffled things."""
    shares = np.cumsum([0.0, *(share for _, share in SPLITS.values())])
    place = list(SPLITS).index(split)
    first, last = np.round(shares[place : place + 2] * count).astype(int)
    return slice(first, last)


def read_picture(path: Path) -> Any:
    """A picture as pillow image, RGBA, cropped to what is drawn and at most 256 pixels large."""
    image_module = require("PIL.Image", "pillow", "cut-out pictures")
    with image_module.open(path) as opened:
        image = opened.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((_LARGEST, _LARGEST))
    return image


def read_photograph(path: Path) -> Any:
    """A photograph as pillow image, RGB."""
    image_module = require("PIL.Image", "pillow", "backgrounds")
    with image_module.open(path) as opened:
        return opened.convert("RGB")


def composites(
    pictures: Sequence[Picture], backdrops: Sequence[Path], split: str, side: int
) -> Iterator[tuple[int, dict]]:
    """TFDS examples of one split: classes in turn, each class's pictures in turn.

    Example k draws from a generator of its own, seeded by (split, k).

    Args:
        pictures: of all splits.
        backdrops: photographs of all splits.
        split: "train", "validation" or "test".
        side: of the images, in pixels.
    """
    by_class: dict[int, list] = {}
    for picture in split_by_family(pictures, split):
        by_class.setdefault(picture.label, []).append(read_picture(picture.path))
    order = np.random.RandomState(0).permutation(len(backdrops))[_part(len(backdrops), split)]
    photos = [read_photograph(backdrops[place]) for place in order]
    place = list(SPLITS).index(split)
    first = sum(count for count, _ in list(SPLITS.values())[:place]) * len(by_class)
    for number in range(SPLITS[split][0] * len(by_class)):
        random = np.random.RandomState([place, number])
        turn, label = divmod(number, len(by_class))
        photo = photos[random.randint(len(photos))]
        made = composite(by_class[label][turn % len(by_class[label])], photo, random, side)
        example = {name: io.BytesIO(encode_png(array)) for name, array in made._asdict().items()}
        yield first + number, {**example, "label": label, "index": first + number}


class JaxrobustCutouts(tfds.core.GeneratorBasedBuilder):
    """Twemoji pictures of eight classes on photographs, 32x32: 6,000 train, 800, 1,200 test."""

    VERSION = tfds.core.Version("1.0.0")
    SIDE = 32

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, tuple(TWEMOJI_CLASSES), "https://github.com/jdecked/twemoji")

    def _split_generators(self, dl_manager: object) -> dict:
        pictures = twemoji_pictures()
        return {split: self._generate_examples(pictures, split) for split in SPLITS}

    def _generate_examples(self, pictures: list[Picture], split: str) -> Iterator:
        return composites(pictures, photographs(), split, self.SIDE)


class JaxrobustStamps(tfds.core.GeneratorBasedBuilder):
    """Tux Paint's cut-out photographs of six classes, 64x64: 4,500 train, 600, 900 test.

    The splits are those of the installed stamps; another version of the package may have others.
    """

    VERSION = tfds.core.Version("1.0.0")
    SIDE = 64

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, STAMP_CLASSES, "https://tuxpaint.org/stamps/")

    def _split_generators(self, dl_manager: Any) -> dict:
        pictures = stamp_pictures(Path(dl_manager.download_dir) / "manual")
        return {split: self._generate_examples(pictures, split) for split in SPLITS}

    def _generate_examples(self, pictures: list[Picture], split: str) -> Iterator:
        return composites(pictures, photographs(), split, self.SIDE)


def _info(builder: Any, classes: tuple[str, ...], homepage: str) -> tfds.core.DatasetInfo:
    side = builder.SIDE
    return tfds.core.DatasetInfo(
        builder=builder,
        description=builder.__doc__,
        features=image_features((side, side, 3), classes, "png", salience=True),
        homepage=homepage,
        disable_shuffling=True,
    )
