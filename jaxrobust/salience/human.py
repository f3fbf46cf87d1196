"""Maps that people made: segmentation images, boxes and alpha channels; and examples without one.

An unannotated example has the map 0 and is trained on like any other: nothing of it is protected.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxrobust.data.decoding import decode_image
from jaxrobust.salience.maps import check_area, check_maps

Box = tuple[float, float, float, float]
Maps = Float[np.ndarray, "n h w 1"]


def attach(dataset: Any, maps: Any) -> Any:
    """A data set with these maps, after checks; batches then have the column "salience".

    Args:
        dataset: `data.Dataset` of n examples.
        maps: [n, h, w, 1] in [0, 1], row by row those of the data set.

    Raises:
        ValueError: maps of the wrong size, with NaN, or outside [0, 1].
    """
    check_maps(maps, dataset.images)
    return dataset.replace(salience=np.asarray(maps, np.float32))


def from_files(paths: Sequence[str | Path | None], *, size: int | None = None) -> Maps:
    """Reads grey segmentation images: black is 0, white is 1.

    Args:
        paths: one per example, in the data set's order; None for an unannotated one.
        size: as for the data set: the shorter side is resized to it and the centre cropped.

    Returns:
        [n, h, w, 1] float32.

    Raises:
        FileNotFoundError: an annotated example's file is missing; the first few are named.
        ValueError: no example is annotated, or the images differ in shape.
    """
    files = [None if path is None else Path(path) for path in paths]
    missing = [str(path) for path in files if path is not None and not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} annotated examples have no map: {', '.join(missing[:5])}"
        )
    read = {i: decode_image(p.read_bytes(), 1, size) for i, p in enumerate(files) if p is not None}
    shapes = {one.shape for one in read.values()}
    if len(shapes) != 1:
        raise ValueError(f"paths must lead to maps of one shape, got {sorted(shapes)}")
    maps = np.zeros((len(files), *shapes.pop()), np.float32)
    for row, one in read.items():
        maps[row] = one / np.float32(255)
    return maps


def from_boxes(
    boxes: Sequence[Sequence[Box] | None],
    image_sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
) -> Maps:
    """1 inside the union of an example's boxes, which are rescaled with the image.

    A pixel belongs to a box that holds its centre.

    Args:
        boxes: per example (x, y, width, height) of each box in pixels of the original image; None
            or no box for an unannotated example.
        image_sizes: per example (height, width) of the original image.
        size: (h, w) of the maps.

    Returns:
        [n, h, w, 1] of 0 and 1.

    Raises:
        ValueError: another number of sizes than of boxes, or a box without extent.
    """
    maps = np.zeros((len(boxes), *size, 1), np.float32)
    for one, own, (height, width) in zip(maps, boxes, image_sizes, strict=True):
        rows = (np.arange(size[0]) + 0.5) * height / size[0]
        columns = (np.arange(size[1]) + 0.5) * width / size[1]
        for x, y, box_width, box_height in own or ():
            if box_width <= 0 or box_height <= 0:
                raise ValueError(
                    f"a box must have width and height > 0, got {box_width, box_height}"
                )
            down = (rows >= y) & (rows < y + box_height)
            across = (columns >= x) & (columns < x + box_width)
            one[np.ix_(down, across)] = 1
    return maps


def from_alpha(images: Float[np.ndarray, "n h w 4"]) -> Maps:
    """The alpha channel of cut-out pictures in [0, 1]."""
    return np.ascontiguousarray(images[..., 3:], np.float32)


def unannotate(maps: Maps, indices: Int[np.ndarray, "n"], share: float, *, seed: int = 0) -> Maps:
    """Takes the maps of round(share n) examples away, as if nobody had annotated them.

    Who loses its map follows from the examples' ids and the seed, not from their order.

    Args:
        maps: [n, h, w, 1].
        indices: [n] ids, `Dataset.indices`.
        share: in [0, 1].
        seed: of the choice.

    Returns:
        A copy with maps of 0 among the others.

    Raises:
        ValueError: share outside [0, 1].

    Source: the option `unannotated_split` of SIP-AT's code, November 2023.
    """
    check_area(share, len(maps))
    chance = [np.random.RandomState([seed, int(index)]).random_sample() for index in indices]
    lost = np.argsort(chance, kind="stable")[: int(share * len(maps) + 0.5)]
    kept = np.array(maps)
    kept[lost] = 0
    return kept
