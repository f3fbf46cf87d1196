"""TFDS builders of the classic sets, reading the official archives without TensorFlow.

CIFAR-10 and CIFAR-100 (the binary version: nothing is unpickled), SVHN (cropped), ImageNette and
Tiny-ImageNet-200. Archives are read as a stream, never unpacked on disk. Their SHA-256 sums are in
checksums.tsv, where TFDS finds them. An archive that was put into the manual folder is used after
the same check.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from jaxrobust.data.builders import DIGITS, image_features
from jaxrobust.data.decoding import encode_png

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/"
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

PROBE_SECONDS = 15

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# Label order: the sorted WordNet ids, which are the archive's folder names.
IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def fetch(dl_manager: Any, url: str) -> Path:
    """The local copy of an archive: from the manual folder, the download cache or the network.

    Args:
        dl_manager: TFDS's download manager, which verifies size and SHA-256.
        url: where the archive is published.

    Returns:
        Path of the archive.

    Raises:
        ConnectionError: it cannot be downloaded; the message says where to put it by hand.
        ValueError: it is not the file that is expected there.
    """
    name = url.rsplit("/", 1)[1].partition("?")[0]
    place = dl_manager.download_dir / "manual" / name
    try:
        if not place.exists() and not _is_cached(dl_manager, url):
            # TFDS tries ten times over three minutes before it gives up; one question tells.
            requests.head(url, timeout=PROBE_SECONDS)
        return Path(dl_manager.download(url))
    except tfds.download.download_manager.NonMatchingChecksumError as error:
        found = place if place.exists() else url
        raise ValueError(f"{found} is not the official {name}: {error}") from error
    # OSError is what the client raises when there is no route, no name or no answer.
    except (tfds.download.DownloadError, OSError) as error:
        raise ConnectionError(
            f"cannot download {url} ({type(error).__name__}); place the file at {place}"
        ) from error


def _is_cached(dl_manager: Any, url: str) -> bool:
    # TFDS keeps downloads of a data set in a folder of its name, older versions did not.
    infos = (i for p in ("*.INFO", "*/*.INFO") for i in dl_manager.download_dir.glob(p))
    return any(url in json.loads(info.read_text()).get("urls", ()) for info in infos)


def tar_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar archive, in archive order, read as a stream."""
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            if member.isfile():
                yield member.name.removeprefix("./"), tar.extractfile(member).read()


def _example(image: bytes, label: int | str, index: int) -> dict:
    return {"image": io.BytesIO(image), "label": label, "index": index}


def _info(builder: Any, description: str, features: Any, homepage: str) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=builder, description=description, features=features, homepage=homepage
    )


def cifar_records(
    content: bytes, label_bytes: int
) -> Iterator[tuple[UInt8[np.ndarray, "32 32 3"], int]]:
    """Images and labels of one file of the binary version.

    A record is `label_bytes` label bytes, the last of which is the class (before it CIFAR-100 has
    the super-class), and then 3 x 32 x 32 pixel bytes, colour planes first.

    Args:
        content: the file.
        label_bytes: 1 for CIFAR-10, 2 for CIFAR-100.

    Returns:
        Iterator over ([32, 32, 3] uint8, label).

    Raises:
        ValueError: the length is no multiple of a record.
    """
    length = label_bytes + 3072
    if len(content) % length:
        raise ValueError(f"a file of {len(content)} bytes does not hold records of {length}")
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    for record in records:
        image = record[label_bytes:].reshape(3, 32, 32).transpose(1, 2, 0)
        yield image, int(record[label_bytes - 1])


def cifar_examples(
    members: dict[str, bytes], files: Sequence[str], label_bytes: int, first: int
) -> Iterator[tuple[int, dict]]:
    """TFDS examples of some files of the archive; indices count from `first`."""
    index = first
    for file in files:
        for image, label in cifar_records(members[file], label_bytes):
            yield index, _example(encode_png(image), label, index)
            index += 1


class JaxrobustCifar10(tfds.core.GeneratorBasedBuilder):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 in 10 classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = image_features((32, 32, 3), CIFAR10_CLASSES, "png")
        return _info(self, "CIFAR-10, binary version.", features, CIFAR_URL + "cifar.html")

    def _split_generators(self, dl_manager: Any) -> dict:
        archive = fetch(dl_manager, CIFAR_URL + "cifar-10-binary.tar.gz")
        members = {Path(name).name: content for name, content in tar_members(archive)}
        train = [f"data_batch_{number}.bin" for number in range(1, 6)]
        return {
            "train": self._generate_examples(members, train, 0),
            "test": self._generate_examples(members, ["test_batch.bin"], 50_000),
        }

    def _generate_examples(self, members: dict, files: list[str], first: int) -> Iterator:
        return cifar_examples(members, files, 1, first)


class JaxrobustCifar100(tfds.core.GeneratorBasedBuilder):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 in 100 fine classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = image_features((32, 32, 3), 100, "png")
        return _info(self, "CIFAR-100, binary version.", features, CIFAR_URL + "cifar.html")

    def _split_generators(self, dl_manager: Any) -> dict:
        archive = fetch(dl_manager, CIFAR_URL + "cifar-100-binary.tar.gz")
        members = {Path(name).name: content for name, content in tar_members(archive)}
        self.info.features["label"].names = members["fine_label_names.txt"].decode().split()
        return {
            "train": self._generate_examples(members, "train.bin", 0),
            "test": self._generate_examples(members, "test.bin", 50_000),
        }

    def _generate_examples(self, members: dict, file: str, first: int) -> Iterator:
        return cifar_examples(members, [file], 2, first)


class JaxrobustSvhn(tfds.core.GeneratorBasedBuilder):
    """SVHN, cropped: 73,257 training and 26,032 test house-number digits of 32x32."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = image_features((32, 32, 3), DIGITS, "png")
        return _info(self, "Street View House Numbers, cropped digits.", features, SVHN_URL)

    def _split_generators(self, dl_manager: Any) -> dict:
        files = {
            split: fetch(dl_manager, f"{SVHN_URL}{split}_32x32.mat") for split in ("train", "test")
        }
        return {
            "train": self._generate_examples(files["train"], 0),
            "test": self._generate_examples(files["test"], 73_257),
        }

    def _generate_examples(self, file: Path, first: int) -> Iterator[tuple[int, dict]]:
        import scipy.io

        content = scipy.io.loadmat(file)
        images = np.moveaxis(content["X"], -1, 0)
        # Matlab counts from 1 and so writes the digit 0 as 10.
        labels = content["y"].reshape(-1) % 10
        for index, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
            yield index, _example(encode_png(image), int(label), index)


class JaxrobustImagenette(tfds.core.GeneratorBasedBuilder):
    """ImageNette, version 2: 9,469 training and 3,925 validation photographs in 10 classes."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS asks for a list
        tfds.core.BuilderConfig(name=f"{side}px", description=f"shorter side {side} pixels")
        for side in (160, 320)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = image_features((None, None, 3), tuple(IMAGENETTE_CLASSES.values()), "jpeg")
        return _info(
            self, "ImageNette, version 2.", features, "https://github.com/fastai/imagenette"
        )

    def _split_generators(self, dl_manager: Any) -> dict:
        side = self.builder_config.name.removesuffix("px")
        archive = fetch(dl_manager, f"{IMAGENETTE_URL}imagenette2-{side}.tgz")
        return {
            "train": self._generate_examples(archive, "train"),
            "validation": self._generate_examples(archive, "val"),
        }

    def _generate_examples(self, archive: Path, folder: str) -> Iterator[tuple[int, dict]]:
        images = (item for item in tar_members(archive) if item[0].lower().endswith(".jpeg"))
        for index, (name, content) in enumerate(images):
            split, wordnet_id = Path(name).parts[-3:-1]
            if split == folder:
                yield index, _example(content, IMAGENETTE_CLASSES[wordnet_id], index)


class JaxrobustTinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Tiny-ImageNet-200: 100,000 training and 10,000 validation images of 64x64 in 200 classes.

    The archive's test images have no labels and are left out.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = image_features((64, 64, 3), 200, "jpeg")
        return _info(self, "Tiny-ImageNet-200.", features, "http://cs231n.stanford.edu")

    def _split_generators(self, dl_manager: Any) -> dict:
        archive = fetch(dl_manager, TINY_IMAGENET_URL)
        with zipfile.ZipFile(archive) as packed:
            texts = {
                name: packed.read(f"tiny-imagenet-200/{name}").decode()
                for name in ("wnids.txt", "words.txt", "val/val_annotations.txt")
            }
        ids = sorted(texts["wnids.txt"].split())
        self.info.features["label"].names = readable_names(ids, texts["words.txt"])
        rows = (line.split("\t") for line in texts["val/val_annotations.txt"].splitlines())
        label_of_file = {row[0]: ids.index(row[1]) for row in rows}
        return {
            "train": self._generate_examples(archive, ids, {}, "train"),
            "validation": self._generate_examples(archive, ids, label_of_file, "val"),
        }

    def _generate_examples(
        self, archive: Path, ids: list[str], label_of_file: dict[str, int], folder: str
    ) -> Iterator[tuple[int, dict]]:
        with zipfile.ZipFile(archive) as packed:
            files = sorted(name for name in packed.namelist() if name.endswith(".JPEG"))
            for index, name in enumerate(files):
                parts = Path(name).parts
                if parts[1] != folder:
                    continue
                # train/<id>/images/<file> against val/images/<file>
                label = ids.index(parts[2]) if folder == "train" else label_of_file[parts[-1]]
                yield index, _example(packed.read(name), label, index)


def readable_names(ids: list[str], words: str) -> list[str]:
    """Class names for WordNet ids: the first word of each, with the id where two would be equal.

    Args:
        ids: the ids, in label order.
        words: lines of "id<tab>word, synonym, ...".

    Returns:
        One unique name per id.
    """
    entries = dict(line.split("\t", 1) for line in words.splitlines() if "\t" in line)
    first = [entries.get(one, one).split(",")[0].strip() for one in ids]
    return [
        name if first.count(name) == 1 else f"{name} ({one})"
        for one, name in zip(ids, first, strict=True)
    ]
