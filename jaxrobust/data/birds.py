"""TFDS builder of CUB-200-2011 with its segmentations: birds, and which pixels are the bird.

A segmentation is a grey picture: the share of annotators (out of five) who called the pixel bird.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxrobust.data.builders import image_features
from jaxrobust.data.classic import fetch, tar_members

IMAGES_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
MAPS_URL = "https://data.caltech.edu/records/w9d68-gec53/files/segmentations.tgz?download=1"
CLASSES = 200
_TABLES = ("images", "image_class_labels", "train_test_split", "classes")


def read_tables(archive: Path) -> dict[str, dict[str, str]]:
    """The archive's four tables, each a dict of id -> value, all text.

    Raises:
        ValueError: a table is missing.
    """
    wanted = {f"CUB_200_2011/{name}.txt": name for name in _TABLES}
    tables = {
        wanted[name]: dict(line.split(" ", 1) for line in content.decode().splitlines())
        for name, content in tar_members(archive)
        if name in wanted
    }
    missing = [name for name in _TABLES if name not in tables]
    if missing:
        raise ValueError(f"{archive} lacks the tables {', '.join(missing)}")
    return tables


def segmentation_of(maps: Mapping[str, bytes], name: str) -> bytes:
    """The segmentation of the image file `name`.

    Raises:
        ValueError: the archive of segmentations lacks it.
    """
    path = str(Path("segmentations") / Path(name).with_suffix(".png"))
    if path not in maps:
        raise ValueError(f"image {name} is annotated but {path} is not in segmentations.tgz")
    return maps[path]


class JaxrobustCub200(tfds.core.GeneratorBasedBuilder):
    """CUB-200-2011: 5,994 training and 5,794 test photographs of 200 species, with segmentations.

    Source: Wah et al. 2011 (The Caltech-UCSD Birds-200-2011 dataset).
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="CUB-200-2011 with segmentations.",
            features=image_features((None, None, 3), CLASSES, "jpeg", salience=True),
            homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        )

    def _split_generators(self, dl_manager: Any) -> dict:
        archive = fetch(dl_manager, IMAGES_URL)
        maps = dict(tar_members(fetch(dl_manager, MAPS_URL)))
        tables = read_tables(archive)
        # "001.Black_footed_Albatross"; numbered from 1.
        names = sorted(tables["classes"].values())
        self.info.features["label"].names = [n.partition(".")[2].replace("_", " ") for n in names]
        return {
            "train": self._generate_examples(archive, maps, tables, "1"),
            "test": self._generate_examples(archive, maps, tables, "0"),
        }

    def _generate_examples(
        self, archive: Path, maps: dict, tables: dict, flag: str
    ) -> Iterator[tuple[int, dict]]:
        id_of = {name: number for number, name in tables["images"].items()}
        folder = "CUB_200_2011/images/"
        for path, content in tar_members(archive):
            name = path.removeprefix(folder)
            number = id_of.get(name)
            if number is None or tables["train_test_split"][number] != flag:
                continue
            yield (
                int(number),
                {
                    "image": io.BytesIO(content),
                    "label": int(tables["image_class_labels"][number]) - 1,
                    "index": int(number),
                    "salience": io.BytesIO(segmentation_of(maps, name)),
                },
            )
