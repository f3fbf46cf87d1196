"""TFDS builder of emoji by group: every picture once, on white, in full size.

A small set of clean drawings, hard to learn from scratch and easy on the features of a network
that has seen the world. `pictures` says whose art it is; its alpha is the salience map.
"""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from jaxrobust.data.builders import image_features
from jaxrobust.data.cutouts import SPLITS, split_by_family
from jaxrobust.data.decoding import encode_png
from jaxrobust.data.packages import require
from jaxrobust.data.pictures import TWEMOJI_CLASSES, Picture, twemoji_pictures

SIDE = 72


class JaxrobustEmoji(tfds.core.GeneratorBasedBuilder):
    """Twemoji pictures of eight groups on white, 72x72; drawings of one family share a split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=image_features((SIDE, SIDE, 3), tuple(TWEMOJI_CLASSES), "png", salience=True),
            homepage="https://github.com/jdecked/twemoji",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict:
        pictures = twemoji_pictures()
        return {split: self._generate_examples(pictures, split) for split in SPLITS}

    def _generate_examples(self, pictures: list[Picture], split: str) -> Iterator:
        place = {picture.path: number for number, picture in enumerate(pictures)}
        chosen = split_by_family(pictures, split)
        # Shuffled, so that the first images are of all classes.
        for row in np.random.RandomState(0).permutation(len(chosen)):
            picture = chosen[row]
            image, salience = on_white(picture)
            number = place[picture.path]
            yield (
                number,
                {
                    "image": io.BytesIO(encode_png(image)),
                    "salience": io.BytesIO(encode_png(salience)),
                    "label": picture.label,
                    "index": number,
                },
            )


def on_white(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """A picture on white, [72, 72, 3], and its alpha, [72, 72, 1], uint8."""
    image_module = require("PIL.Image", "pillow", "data set 'emoji'")
    with image_module.open(picture.path) as opened:
        drawing = opened.convert("RGBA").resize((SIDE, SIDE))
    white = image_module.new("RGBA", drawing.size, "white")
    image = np.asarray(image_module.alpha_composite(white, drawing).convert("RGB"))
    return image, np.asarray(drawing.getchannel("A"))[..., None]
