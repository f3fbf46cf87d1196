"""Sets with exact salience: cut-outs, stamps and CUB-200-2011 on small files of its layout."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from jaxrobust import data
from jaxrobust.data import birds, cutouts, pictures
from tests.test_data_archives import jpeg, manual, register, write_tar


@pytest.fixture
def random():
    return np.random.default_rng(0)


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()


# Pictures


def test_the_installed_pictures_are_those_that_the_splits_were_made_for():
    found = pictures.twemoji_pictures()
    counts = np.bincount([picture.label for picture in found])
    assert len(counts) == len(pictures.TWEMOJI_CLASSES) == 8
    assert counts.min() >= 40
    assert len({picture.path for picture in found}) == len(found)
    assert len(pictures.photographs()) == 20


def test_other_pictures_are_refused(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    picture = pictures.Picture(file, 2, "family")
    expected = hashlib.sha256(b"2 family a.png\nx").hexdigest()
    pictures.check_digest([picture], expected, "a set")
    file.write_bytes(b"y")
    with pytest.raises(ValueError, match=f"a set: SHA-256 is .*, expected {expected}"):
        pictures.check_digest([picture], expected, "a set")


def test_a_woman_a_man_and_a_person_doing_the_same_are_one_family():
    assert pictures.family("1f469-200d-1f680") == pictures.family("1f9d1-200d-1f680") == "1f680"
    assert pictures.family("1f3c3-200d-2640-fe0f") == pictures.family("1f3c3")
    assert pictures.family("1f469") != pictures.family("1f468")


def test_no_picture_and_no_family_is_on_two_sides_of_a_split():
    found = pictures.twemoji_pictures()
    parts = [cutouts.split_by_family(found, split) for split in cutouts.SPLITS]
    assert sorted(p for part in parts for p in part) == sorted(found)
    families = [{(p.label, p.family) for p in part} for part in parts]
    assert len(set.union(*families)) == sum(len(one) for one in families)
    shares = np.array([len(one) for one in families]) / sum(len(one) for one in families)
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.02)
    assert all(len({p.label for p in part}) == 8 for part in parts)


def test_missing_stamps_say_which_command_brings_them(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "STAMPS", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
        pictures.stamp_pictures(tmp_path)


def write_stamps(folder, random, count=10):
    for name in pictures.STAMP_CLASSES:
        (folder / name / "cartoon").mkdir(parents=True)
        for number in range(count):
            image = random.integers(0, 256, (20, 30, 4), np.uint8)
            image[..., 3] = 0
            image[5:15, 5:25, 3] = 255
            Image.fromarray(image).save(folder / name / f"{number}.png")
        Image.fromarray(image).save(folder / name / "0_mirror.png")
        Image.fromarray(image).save(folder / name / "cartoon" / "a.png")


def test_stamps_are_photographs_without_cartoons_and_mirrored_copies(tmp_path, monkeypatch, random):
    write_stamps(tmp_path / "stamps", random)
    monkeypatch.setattr(pictures, "STAMPS", tmp_path / "stamps")
    found = pictures.stamp_pictures(tmp_path)
    assert len(found) == 10 * len(pictures.STAMP_CLASSES)
    assert {picture.label for picture in found} == set(range(len(pictures.STAMP_CLASSES)))


# Composition


def test_an_opaque_picture_replaces_the_background_where_its_map_is_one(random):
    picture = Image.fromarray(np.full((10, 14, 4), [255, 0, 0, 255], np.uint8))
    photo = Image.fromarray(np.full((50, 60, 3), [0, 0, 255], np.uint8))
    image, salience = cutouts.composite(picture, photo, np.random.RandomState(0), 32)
    assert image.shape == (32, 32, 3)
    assert set(np.unique(salience)) == {0, 255}
    inside = salience[..., 0] == 255
    np.testing.assert_array_equal(image[inside], [[255, 0, 0]] * inside.sum())
    np.testing.assert_array_equal(image[~inside], [[0, 0, 255]] * (~inside).sum())
    rows, columns = np.nonzero(inside)
    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    assert 16 <= width <= 29
    np.testing.assert_allclose(height / width, 10 / 14, atol=0.06)


def test_half_transparent_pixels_are_mixed_by_their_alpha():
    picture = Image.fromarray(np.full((8, 8, 4), [200, 200, 200, 128], np.uint8))
    photo = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    image, salience = cutouts.composite(picture, photo, np.random.RandomState(1), 16)
    np.testing.assert_allclose(image, salience / 255 * 200 * np.ones(3), atol=1.5)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The cut-out set in small: five images per class and split."""
    folder = tmp_path_factory.mktemp("cutouts")
    with pytest.MonkeyPatch.context() as patch:
        small = {name: (5, share) for name, (_, share) in cutouts.SPLITS.items()}
        patch.setattr(cutouts, "SPLITS", small)
        return {split: data.load("cutouts", split, data_dir=folder) for split in small}


def test_the_cut_out_set_carries_its_maps(few):
    for split, part in few.items():
        assert part.images.shape == (40, 32, 32, 3), split
        assert part.salience.shape == (40, 32, 32, 1)
        assert part.salience.dtype == np.float32
        assert part.salience.min() == 0
        assert part.salience.max() == 1
        assert 0.1 < part.salience.mean() < 0.6
        np.testing.assert_array_equal(part.labels, np.arange(40) % 8)
        assert part.class_names == tuple(pictures.TWEMOJI_CLASSES)
    indices = np.concatenate([part.indices for part in few.values()])
    assert len(np.unique(indices)) == 120


def test_the_cut_out_set_is_the_same_every_time(few):
    small = {split: (5, share) for split, (_, share) in cutouts.SPLITS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutouts, "SPLITS", small)
        made = cutouts.composites(
            pictures.twemoji_pictures(), pictures.photographs(), "validation", 32
        )
        for row, (index, example) in zip(range(10), made, strict=False):
            assert index == few["validation"].indices[row]
            for name in ("image", "salience"):
                stored = data.decoding.decode_image(
                    example[name].read(), 3 if name == "image" else 1, None
                )
                field = getattr(few["validation"], "images" if name == "image" else name)
                np.testing.assert_array_equal(stored, np.round(field[row] * 255))


def test_batches_of_a_source_have_their_maps():
    maps = np.zeros((4, 4), np.uint8)
    maps[1:3, 1:3] = 255
    record = data.dataset.Record(png(np.zeros((4, 4, 3), np.uint8)), 0, 3, "a", png(maps))
    source = data.Source(lambda positions: [record for _ in positions], 6, ("x",))
    batch = next(data.batches(source, 2))
    np.testing.assert_array_equal(batch["salience"][0, ..., 0], maps / 255)
    np.testing.assert_array_equal(source[0]["salience"], batch["salience"][0])


def test_a_map_of_another_size_than_its_image_is_refused():
    record = data.dataset.Record(
        png(np.zeros((4, 4, 3), np.uint8)), 0, 0, "bird 7", png(np.zeros((4, 6), np.uint8))
    )
    source = data.Source(lambda positions: [record], 1, ("x",), size=4)
    message = r"map of bird 7 must have its image's size \(4, 4\), got \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        source.take([0])


# CUB-200-2011


def bird_archives(random, folder, *, lost=()):
    """Six birds of two species; (images, maps) by id."""
    names = ["001.Black_footed_Albatross", "200.Common_Yellowthroat"]
    classes = [f"{i} {i:03d}.Species_{i}" for i in range(2, 200)]
    classes = [f"1 {names[0]}", *classes, f"200 {names[1]}"]
    tables = {"images": [], "image_class_labels": [], "train_test_split": [], "classes": classes}
    files, drawn = {}, {}
    for number in range(1, 7):
        species = (1, 200)[number % 2]
        name = f"{names[number % 2]}/bird_{number}.jpg"
        tables["images"].append(f"{number} {name}")
        tables["image_class_labels"].append(f"{number} {species}")
        tables["train_test_split"].append(f"{number} {int(number <= 4)}")
        image = np.full((40, 60, 3), 40 * number, np.uint8)
        segmentation = np.zeros((40, 60), np.uint8)
        segmentation[:, 10 : 10 + 5 * number] = 204
        files[f"CUB_200_2011/images/{name}"] = jpeg(image)
        drawn[name] = segmentation
    texts = {f"CUB_200_2011/{n}.txt": "\n".join(rows).encode() for n, rows in tables.items()}
    maps = {
        f"segmentations/{name.removesuffix('.jpg')}.png": png(segmentation)
        for name, segmentation in drawn.items()
        if name not in lost
    }
    write_tar(folder / "CUB_200_2011.tgz", {**files, **texts})
    write_tar(folder / "segmentations.tgz", maps)
    return list(drawn)


def register_birds(monkeypatch, folder):
    urls = {birds.IMAGES_URL: "CUB_200_2011.tgz", birds.MAPS_URL: "segmentations.tgz"}
    paths = {url: folder / name for url, name in urls.items()}
    register(monkeypatch, birds.JaxrobustCub200, paths)


def test_birds_come_with_their_segmentations(tmp_path, monkeypatch, random):
    folder = manual(tmp_path)
    bird_archives(random, folder)
    register_birds(monkeypatch, folder)
    train = data.load("cub200", data_dir=tmp_path, size=40)
    test = data.load("cub200", "test", data_dir=tmp_path, size=40)
    assert sorted(train.indices) == [1, 2, 3, 4]
    assert sorted(test.indices) == [5, 6]
    assert train.class_names[0] == "Black footed Albatross"
    assert train.class_names[199] == "Common Yellowthroat"
    for part in (train, test):
        for example in part:
            index = example["index"]
            assert example["label"] == (0, 199)[index % 2]
            np.testing.assert_allclose(example["image"], 40 * index / 255, atol=0.01)
            # 60 pixels wide, cropped to the 40 in the middle.
            expected = np.zeros(40)
            expected[: 5 * index] = 204 / 255
            np.testing.assert_allclose(example["salience"][0, :, 0], expected, atol=1e-6)


def test_a_bird_without_its_segmentation_is_named(tmp_path, monkeypatch, random):
    folder = manual(tmp_path)
    lost = "001.Black_footed_Albatross/bird_2.jpg"
    bird_archives(random, folder, lost=[lost])
    register_birds(monkeypatch, folder)
    with pytest.raises(ValueError, match=f"image {lost} is annotated but segmentations/.*png"):
        data.load("cub200", data_dir=tmp_path)


def test_an_archive_without_its_tables_is_refused(tmp_path):
    write_tar(tmp_path / "a.tgz", {"CUB_200_2011/images.txt": b"1 a.jpg"})
    with pytest.raises(ValueError, match="lacks the tables image_class_labels"):
        birds.read_tables(tmp_path / "a.tgz")


def test_emoji_are_every_picture_once_and_families_stay_on_one_side(tmp_path):
    splits = {
        name: data.load("emoji", name, data_dir=tmp_path)
        for name in ("train", "validation", "test")
    }
    every = pictures.twemoji_pictures()
    rows = np.concatenate([split.indices for split in splits.values()])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(every)))
    # Classes are split by themselves, so that it is a class's family that stays together.
    named = lambda i: (every[i].label, every[i].family)  # noqa: E731
    seen = {name: set(map(named, split.indices)) for name, split in splits.items()}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not seen[one] & seen[other]
    test = splits["test"]
    assert test.images.shape[1:] == (72, 72, 3)
    assert len(set(test.labels)) == len(test.class_names) == 8
    np.testing.assert_array_equal(test.labels, [every[i].label for i in test.indices])
    # Where nothing is drawn it is white.
    np.testing.assert_array_equal(
        test.images[np.broadcast_to(test.salience == 0, test.images.shape)], 1
    )
