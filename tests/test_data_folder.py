import io
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from jaxrobust.data import batches, decoding, load, load_folder, source
from jaxrobust.data.decoding import decode_image, encode_png


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """Two classes with pictures of one colour each, as train and val; sizes differ."""
    for split, count in (("train", 3), ("val", 1)):
        for level, name in ((50, "zebra"), (200, "ant")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                image = np.full((10 + number, 14, 3), level, np.uint8)
                (tmp_path / split / name / f"{number}.png").write_bytes(encode_png(image))
    return tmp_path


def test_a_folder_is_read_with_classes_sorted_by_name(folder):
    data = load_folder(folder, size=8)
    assert data.class_names == ("ant", "zebra")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.images.shape == (6, 8, 8, 3)
    levels = np.float32([200] * 3 + [50] * 3) / np.float32(255)
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], levels)
    val = load(f"folder:{folder}", "val", size=8)
    assert len({*data.indices, *val.indices}) == 8


def test_a_folder_without_splits_is_its_own_training_split(folder):
    direct = load_folder(folder / "train", size=8)
    np.testing.assert_array_equal(direct.images, load_folder(folder, size=8).images)


def test_splits_and_classes_may_be_links(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "train").symlink_to(folder / "train", target_is_directory=True)
    found, direct = load_folder(linked, size=8), load_folder(folder, size=8)
    np.testing.assert_array_equal(found.images, direct.images)
    assert found.indices.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_folder_streams_the_same_batches(folder):
    lazy, eager = source(f"folder:{folder}", size=8), load_folder(folder, size=8)
    for left, right in zip(batches(lazy, 2, seed=3), batches(eager, 2, seed=3), strict=True):
        np.testing.assert_array_equal(left["image"], right["image"])
        np.testing.assert_array_equal(left["index"], right["index"])


def test_large_images_are_decoded_by_threads_to_the_same_arrays(tmp_path, random, monkeypatch):
    (tmp_path / "class").mkdir()
    for number in range(4):
        image = random.integers(0, 256, (90, 90, 3), np.uint8)
        (tmp_path / "class" / f"{number}.png").write_bytes(encode_png(image))
    names = []
    decode = decoding.decode_image

    def watched(*arguments):
        names.append(threading.current_thread().name)
        return decode(*arguments)

    monkeypatch.setattr(decoding, "decode_image", watched)
    lazy = source(f"folder:{tmp_path}")
    expected = lazy.take(range(4))[0]
    (batch,) = batches(lazy, 4, shuffle=False, workers=2)
    np.testing.assert_array_equal(batch["image"], expected)
    assert all(name.startswith("jaxrobust-decode") for name in names[-4:])
    assert not [t for t in threading.enumerate() if t.name.startswith("jaxrobust-decode")]


def test_the_centre_of_the_image_is_kept():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    assert (decode_image(encode_png(image), 3, 10) == 255).all()
    tall = decode_image(encode_png(image.transpose(1, 0, 2).copy()), 3, 10)
    assert (tall == 255).all()


def test_resizing_keeps_the_mean_of_a_photograph(random):
    image = random.integers(0, 256, (64, 64, 1), np.uint8)
    small = decode_image(encode_png(image), 1, 16)
    assert small.shape == (16, 16, 1)
    # An average over 4x4 blocks and more; without it the noise's spread would stay 74.
    assert abs(small.mean() - image.mean()) < 3
    assert small.std() < 25


def test_unreadable_images_are_all_named(folder):
    for name in ("zebra/9.png", "ant/8.png"):
        (folder / "train" / name).write_bytes(b"no picture")
    whole = (folder / "train/ant/0.png").read_bytes()
    (folder / "train/ant/7.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read 3 of 9 images: .*7\.png.*8\.png.*9\.png"):
        load_folder(folder, size=8)


def test_images_of_different_shapes_need_a_size(folder):
    with pytest.raises(ValueError, match=r"1\.png is \(11, 14, 3\).*\(10, 14, 3\); give size="):
        load_folder(folder)


def test_bad_folders_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"one sub-folder per class, got .*nowhere"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown split 'test' of"):
        load_folder(folder, "test")
    with pytest.raises(ValueError, match=r"no classes: .*ant holds no sub-folders"):
        load_folder(folder / "train" / "ant")
    (folder / "train" / "bee").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*bee holds no images"):
        load_folder(folder)


def test_a_folder_of_other_splits_is_not_taken_for_classes(folder):
    (folder / "train").rename(folder / "training")
    with pytest.raises(ValueError, match=r"'training'.* would be taken for classes"):
        load(f"folder:{folder}", "train")


def test_a_split_that_lacks_a_class_keeps_the_labels_of_the_others(folder):
    shutil.rmtree(folder / "val" / "ant")
    val = load_folder(folder, "val", size=8)
    assert val.class_names == load_folder(folder, size=8).class_names == ("ant", "zebra")
    assert val.labels.tolist() == [1]


def test_what_is_hidden_is_no_example(folder):
    before = len(load_folder(folder, size=8).labels)
    image = (folder / "train" / "ant" / "0.png").read_bytes()
    (folder / "train" / "ant" / ".checkpoints").mkdir()
    (folder / "train" / "ant" / ".checkpoints" / "0.png").write_bytes(image)
    (folder / "train" / "ant" / "._0.png").write_bytes(image)
    assert len(load_folder(folder, size=8).labels) == before


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_images_of_16_bits_keep_their_upper_ones(kind):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, format=kind)
    decoded = decode_image(stream.getvalue(), 1, None)
    np.testing.assert_array_equal(decoded[..., 0], np.round(ramp / 257))


def test_images_whose_white_is_unknown_are_refused():
    stream = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(stream, format="TIFF")
    with pytest.raises(ValueError, match="8 or 16 bits, got an image of mode 'F'"):
        decode_image(stream.getvalue(), 1, None)
    assert not decoding.is_readable(stream.getvalue())


def test_an_image_of_few_levels_is_resized_in_full_depth():
    ramp = (np.arange(64).reshape(8, 8, 1) // 4).astype(np.uint8)  # 0 to 15 of 16
    encoded = encode_png(ramp)
    np.testing.assert_array_equal(decode_image(encoded, 1, 8, levels=16), ramp)
    large = decode_image(encoded, 1, 28, levels=16)
    bright = encode_png(np.uint8(np.round(ramp * (255 / 16))))
    fine = decode_image(bright, 1, 28) * np.float32(16 / 255)
    np.testing.assert_allclose(large, fine, atol=1e-5)
    assert len(np.unique(large)) > 60


def test_a_header_that_promises_too_much_is_damage(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    encoded = encode_png(np.zeros((8, 8, 1), np.uint8))
    assert decoding.decoded_or_none(encoded, 1, None) is None
    assert decoding.stored_shape(encoded) is None
