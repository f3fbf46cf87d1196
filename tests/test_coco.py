"""COCO's captions on small files of its layout."""

import json
import logging
import shutil

import numpy as np
import pytest

from jaxrobust.data.coco_pairs import coco_pairs
from jaxrobust.data.decoding import decode_image
from tests.test_data_archives import jpeg, manual


@pytest.fixture
def coco(tmp_path):
    """Three training images with captions, one validation image; returns the images' bytes."""
    folder, random = manual(tmp_path) / "coco", np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    files = {}
    content = {
        "train2017": {
            42: ["a dog ", "a brown dog\n", "a dog"],
            7: ["two cats", "!!!"],
            19: ["", "a tree"],
        },
        "val2017": {3: ["a house"]},
    }
    for split, images in content.items():
        (folder / split).mkdir()
        for number in images:
            files[number] = jpeg(random.integers(0, 256, (20 + number, 30, 3), np.uint8))
            (folder / split / f"{number:012d}.jpg").write_bytes(files[number])
        notes = [(number, text) for number, texts in images.items() for text in texts]
        table = {
            "images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in images],
            "annotations": [
                {"id": 100 + i, "image_id": n, "caption": text} for i, (n, text) in enumerate(notes)
            ],
        }
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(table))
    return files


def test_every_caption_is_a_row_with_its_own_image(tmp_path, coco, caplog):
    with caplog.at_level(logging.INFO, "jaxrobust.data"):
        train = coco_pairs("train", data_dir=tmp_path, size=16)
    # Image ids in order, then annotation ids.
    assert train.captions == ("two cats", "!!!", "a tree", "a dog", "a brown dog")
    assert train.counts["rows"] == 7
    assert (train.counts["caption empty"], train.counts["duplicate row"]) == (1, 1)
    (record,) = caplog.records
    assert "coco train2017: 5 of 7 pairs kept" in record.message
    everything = train.take(range(5))
    assert everything.indices.tolist() == [103, 104, 106, 100, 101]
    for row, number in enumerate((7, 7, 19, 42, 42)):
        expected = decode_image(coco[number], 3, 16) / np.float32(255)
        np.testing.assert_array_equal(everything.images[row], expected)
    # The second time from the prepared folder, the archives gone.
    (tmp_path / "downloads" / "manual" / "coco").rename(tmp_path / "lost")
    again = coco_pairs("train", data_dir=tmp_path, size=16, captions=1)
    assert again.captions == ("two cats", "a dog")


def test_validation_does_not_need_the_training_images(tmp_path, coco):
    folder = tmp_path / "downloads" / "manual" / "coco"
    (folder / "annotations" / "captions_train2017.json").unlink()
    shutil.rmtree(folder / "train2017")
    assert coco_pairs("val", data_dir=tmp_path).captions == ("a house",)


def test_what_is_missing_is_named(tmp_path, coco):
    folder = tmp_path / "downloads" / "manual" / "coco"
    (folder / "train2017" / "000000000019.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images .*000000000019\.jpg"):
        coco_pairs("train", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"captions_train2014\.json and the images"):
        coco_pairs("train", year="2014", data_dir=tmp_path)


def test_an_annotation_of_no_image_is_refused(tmp_path, coco):
    from jaxrobust.data.coco import read_annotations

    folder = tmp_path / "downloads" / "manual" / "coco"
    path = folder / "annotations" / "captions_val2017.json"
    table = json.loads(path.read_text())
    table["annotations"].append({"id": 900, "image_id": 4, "caption": "a car"})
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="annotation 900 is of no listed image"):
        read_annotations(folder, "val2017")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split must be one of .* got 'test'"),
        ({"year": "2015"}, "year must be one of .* got '2015'"),
        ({"captions": 0}, "captions must be >= 1, got 0"),
        ({"on_bad": "drop"}, "on_bad must be 'skip' or 'raise', got 'drop'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        coco_pairs(**{"data_dir": tmp_path, **options})
