"""COCO's images with their captions as pairs; TFDS prepares them once.

pairs = coco_pairs("val", size=224)  # five captions an image are five rows
"""

import os
from collections.abc import Sequence

import numpy as np

from jaxrobust.data.dataset import Record, Source
from jaxrobust.data.loading import Entry, prepared
from jaxrobust.data.pair_faults import check_on_bad, row_faults, sift
from jaxrobust.data.pair_tables import Row
from jaxrobust.data.pairs import PairSource

YEARS = ("2017", "2014")
SPLITS = ("train", "val")


def coco_pairs(
    split: str = "train",
    *,
    year: str = "2017",
    size: int | None = 224,
    captions: int = 5,
    on_bad: str = "skip",
    data_dir: str | os.PathLike | None = None,
) -> PairSource:
    """COCO's images with their captions, one row for each; the first call prepares the set.

    Args:
        split: "train" or "val".
        year: "2017" or "2014".
        size: side in pixels to resize and centre-crop to; None needs images of one shape.
        captions: of each image at most, in the order of COCO's ids, >= 1.
        on_bad: as for `pair_source`: what is done about empty and repeated captions.
        data_dir: where prepared sets live; None is `$TFDS_DATA_DIR` or ~/tensorflow_datasets. The
            unpacked archives of the split are looked for in its downloads/manual/coco.

    Returns:
        The pairs; an index is COCO's annotation id.

    Raises:
        ValueError: an argument is out of its range, or a caption is bad and `on_bad` is "raise".
        FileNotFoundError: the archives are not there.
    """
    for name, value, known in (("split", split, SPLITS), ("year", year, YEARS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    for name, value in (("captions", captions), ("size", size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    check_on_bad(on_bad)
    import tensorflow_datasets as tfds

    entry = Entry("jaxrobust.data.coco", "JaxrobustCocoCaptions", config=f"{split}{year}")
    builder = prepared(entry, data_dir)
    raw = {"image": tfds.decode.SkipDecoding()}
    stored = builder.as_data_source(split, decoders=raw)
    images = builder.info.metadata["images"]
    place_of = {str(number): place for place, (number, _) in enumerate(images)}
    rows = [
        Row(identity, str(number), text)
        for number, texts in images
        for identity, text in (texts[:captions] or [(-number, None)])  # an image without any
    ]
    kept, counts = sift(rows, row_faults(rows), f"coco {split}{year}", on_bad)

    def read(positions: Sequence[int]) -> list[Record]:
        chosen = [kept[position] for position in positions]
        found = stored.__getitems__([place_of[row.image] for row in chosen])
        return [
            Record(one["image"], position, row.number, f"coco image {row.image}")
            for position, row, one in zip(positions, chosen, found, strict=True)
        ]

    texts = tuple(row.caption.strip() for row in kept)
    indices = np.array([row.number for row in kept], np.int32)
    return PairSource(Source(read, len(kept), texts, channels=3, size=size), indices, counts)
