"""TFDS builder of COCO's captions, from its annotations and image folders, without TensorFlow."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrobust.data.coco_pairs import SPLITS, YEARS

_HOME = "https://cocodataset.org/#download"


class JaxrobustCocoCaptions(tfds.core.GeneratorBasedBuilder):
    """COCO: photographs with about five captions each; 2017 has 118,287 and 5,000 of them.

    The unpacked images and annotations of a split lie in downloads/manual/coco: for "train" of 2017
    annotations/captions_train2017.json and train2017/.
    An example's index is COCO's image id. Captions lie in the metadata besides, so that they can
    be read without the images.

    Source: Chen et al. 2015 (Microsoft COCO Captions).
    """

    VERSION = tfds.core.Version("1.0.0")
    # A split each: who wants the 5,000 for evaluation need not have the 118,287.
    BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS asks for a list
        tfds.core.BuilderConfig(name=f"{split}{year}", description=f"{split} of {year}")
        for year in YEARS
        for split in SPLITS
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "index": tfds.features.Scalar(np.int64),
                }
            ),
            homepage=_HOME,
            # Row k of the metadata is example k.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict:
        folder = Path(dl_manager.download_dir) / "manual" / "coco"
        images = read_annotations(folder, self.builder_config.name)
        self.info.metadata["images"] = [[number, texts] for number, _, texts in images]
        split = next(one for one in SPLITS if self.builder_config.name.startswith(one))
        return {split: self._generate_examples(images)}

    def _generate_examples(self, images: list) -> Iterator[tuple[int, dict]]:
        for number, path, texts in images:
            captions = [text if isinstance(text, str) else "" for _, text in texts]
            image = io.BytesIO(path.read_bytes())
            yield number, {"image": image, "captions": captions, "index": number}


def read_annotations(folder: Path, split: str) -> list[tuple[int, Path, list[list]]]:
    """The images of a split with their captions.

    Args:
        folder: holds annotations/captions_<split>.json and the images in <split>/.
        split: such as "train2017".

    Returns:
        (image id, file, [[annotation id, caption], ...]) in the order of the ids.

    Raises:
        FileNotFoundError: annotations or images are missing; the message says which and where.
        ValueError: an annotation names an image that is not listed.
    """
    table = folder / "annotations" / f"captions_{split}.json"
    if not table.is_file():
        raise FileNotFoundError(
            f"data set 'coco' needs {table} and the images of {folder / split}: unpack "
            f"the archives of {_HOME} there"
        )
    content = json.loads(table.read_text("utf-8"))
    captions: dict[int, list[list]] = {image["id"]: [] for image in content["images"]}
    for note in sorted(content["annotations"], key=lambda note: note["id"]):
        if note["image_id"] not in captions:
            raise ValueError(f"{table}: annotation {note['id']} is of no listed image")
        captions[note["image_id"]].append([note["id"], note["caption"]])
    files = {image["id"]: folder / split / image["file_name"] for image in content["images"]}
    missing = sorted(path for path in files.values() if not path.is_file())
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images of {table} are missing, the first is "
            f"{missing[0]}: unpack the archives of {_HOME} there"
        )
    return [(number, files[number], captions[number]) for number in sorted(files)]
