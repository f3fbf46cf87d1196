"""The evaluation photographs that the foolbox package carries, read without importing foolbox."""

import numpy as np

from jaxrobust.data.dataset import Dataset, Record, Source, to_memory
from jaxrobust.data.packages import package_file, require

CLASSES = {
    "imagenet": 1000,
    "cifar10": 10,
    "cifar100": 100,
    "mnist": 10,
    "fashionMNIST": 10,
}
GREY = ("mnist", "fashionMNIST")
# The photographs differ in shape, from 512x512 to 1024x683; ImageNet models take 224.
IMAGENET_SIZE = 224


def foolbox_photos(dataset: str = "imagenet", *, size: int | None = None) -> Dataset:
    """20 labelled images of a well-known set: enough for an example, too few for a figure.

    Args:
        dataset: "imagenet", "cifar10", "cifar100", "mnist" or "fashionMNIST".
        size: side in pixels to resize and centre-crop to; None is 224 for ImageNet's photographs,
            which differ in shape, and the set's own 32 or 28 otherwise.

    Returns:
        images [20, h, w, c] float32 in [0, 1] (c = 1 for the MNIST kinds), labels from the file
        names, indices 0 to 19; the class names are the labels as text.

    Raises:
        ValueError: an unknown set, or size < 1.
        ImportError: foolbox or pillow is not installed.
    """
    if dataset not in CLASSES:
        raise ValueError(f"dataset must be one of {', '.join(CLASSES)}, got {dataset!r}")
    if size is not None and size < 1:
        raise ValueError(f"size must be >= 1 pixel, got {size}")
    purpose = f"the {dataset} photographs"
    require("PIL.Image", "pillow", purpose)
    folder = package_file("foolbox", "foolbox", "data", purpose)
    # cifar10_03_0.png: set, number, label.
    files = sorted(folder.glob(f"{dataset}_[0-9][0-9]_*.*"))
    labels = [int(file.stem.rsplit("_", 1)[1]) for file in files]

    def read(positions: list[int]) -> list[Record]:
        chosen = [(files[position], labels[position], position) for position in positions]
        return [Record(f.read_bytes(), label, index, f.name) for f, label, index in chosen]

    names = tuple(str(label) for label in np.arange(CLASSES[dataset]))
    channels = 1 if dataset in GREY else 3
    size = size or (IMAGENET_SIZE if dataset == "imagenet" else None)
    return to_memory(Source(read, len(files), names, channels, size))
