"""Common corruptions: deterministic by example, for every size and channel, resumable accuracy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imagecorruptions import corrupt as theirs

import jaxrobust as jr
from jaxrobust import checkpoint, evaluation
from jaxrobust.data import CORRUPTIONS, corrupt

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.random((3, 12, 20, 1), np.float32)
COLOUR = GENERATOR.random((3, 40, 33, 3), np.float32)
# Every file of the package at the cheapest ones; all fifteen run once below.
FEW = ("impulse_noise", "fog", "contrast")


def test_there_are_the_fifteen_common_ones():
    from imagecorruptions import get_corruption_names

    assert list(CORRUPTIONS) == get_corruption_names("common")


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_each_changes_images_of_any_size_and_is_repeatable(name, images):
    corrupted = corrupt(images, name, 3)
    assert corrupted.shape == images.shape
    assert corrupted.dtype == np.float32
    assert corrupted.min() >= 0
    assert corrupted.max() <= 1
    assert np.abs(corrupted - images).max(axis=(1, 2, 3)).min() > 1 / 255
    np.testing.assert_array_equal(corrupt(images, name, 3), corrupted)


@pytest.mark.parametrize("name", FEW)
def test_an_image_draws_from_its_own_index_alone(name):
    whole = corrupt(COLOUR, name, 5, seed=7)
    one = corrupt(COLOUR[2:], name, 5, indices=[2], seed=7)
    np.testing.assert_array_equal(one[0], whole[2])


def test_seeds_and_indices_change_the_draws():
    first = corrupt(COLOUR, "gaussian_noise", 3)
    assert (first != corrupt(COLOUR, "gaussian_noise", 3, seed=1)).any((1, 2, 3)).all()
    assert (first != corrupt(COLOUR, "gaussian_noise", 3, indices=[3, 4, 5])).any((1, 2, 3)).all()


def test_without_draws_it_is_the_packages_own_image():
    eight_bit = np.round(COLOUR[0] * 255).astype(np.uint8)
    ours = corrupt(COLOUR[:1], "jpeg_compression", 2)[0]
    np.testing.assert_array_equal(np.round(ours * 255), theirs(eight_bit, 2, "jpeg_compression"))


def test_severity_rises():
    away = [np.abs(corrupt(COLOUR, "gaussian_noise", s) - COLOUR).mean() for s in (1, 3, 5)]
    assert away == sorted(away)


def test_numpys_global_state_is_left_alone():
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    corrupt(COLOUR[:1], "gaussian_noise", 1)
    assert np.random.random() == expected  # noqa: NPY002


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "rain"}, "name must be one of"),
        ({"severity": 6}, "severity must be 1, 2, 3, 4 or 5, got 6"),
        ({"images": COLOUR[0]}, "images must be"),
        ({"images": COLOUR * 255}, r"images must be in \[0, 1\]"),
        ({"images": np.full_like(COLOUR, np.nan)}, r"images must be in \[0, 1\]"),
        ({"images": np.zeros((1, 40, 40, 3), np.uint8)}, "images must be float"),
        ({"indices": [0]}, r"indices must be 3 numbers >= 0, got \[0\]"),
        ({"indices": [0, -1, 2]}, "indices must be 3 numbers >= 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        corrupt(**{"images": COLOUR, "name": "fog", "severity": 1, **change})


def brightness(x, threshold):
    """Class 1 where the image is brighter than the threshold."""
    bright = x.mean((1, 2, 3)) - threshold
    return jnp.stack([-bright, bright], 1)


LABELS = np.asarray(GREY.mean((1, 2, 3)) > 0.5, np.int32)


def accuracies(**changes):
    settings = {"names": ("brightness", "contrast"), "args": (jnp.float32(0.5),), "batch_size": 2}
    settings.update(changes)
    return evaluation.corruption_accuracy(brightness, GREY, LABELS, progress=False, **settings)


def test_accuracy_is_that_of_the_corrupted_images():
    found = accuracies()
    assert list(found) == ["brightness", "contrast"]
    for severity in (1, 2, 3, 4, 5):
        images = corrupt(GREY, "brightness", severity)
        right = (images.mean((1, 2, 3)) > 0.5) == LABELS
        assert found["brightness"][severity - 1] == pytest.approx(right.mean())


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    path, calls = tmp_path / "corruptions.json", []
    whole = accuracies(state=path)
    words = json.loads(path.read_text())
    dropped = words["found"].pop("contrast 4")
    path.write_text(json.dumps(words))

    def counted(images, name, severity, **options):
        calls.append((name, severity))
        return corrupt(images, name, severity, **options)

    monkeypatch.setattr("jaxrobust.data.corruptions.corrupt", counted)
    assert accuracies(state=path) == whole
    assert calls == [("contrast", 4)]
    assert whole["contrast"][3] == dropped


def test_the_state_of_another_model_is_refused(tmp_path):
    path = tmp_path / "corruptions.json"
    accuracies(state=path)
    with pytest.raises(checkpoint.CheckpointError, match="state of another evaluation"):
        accuracies(state=path, args=(jnp.float32(2.0),))
    path.write_text("[")
    with pytest.raises(checkpoint.CheckpointError, match="no state of an evaluation"):
        accuracies(state=path)


def test_unknown_names_and_another_box_are_refused_before_any_attack():
    settings = {"threats": {"linf": 0.1}, "key": jax.random.key(0), "args": (0.5,)}
    for change, message in (
        ({"corruptions": ["rain"]}, "corruptions must be names among"),
        ({"corruptions": "fog"}, "corruptions must be names among"),
        ({"corruptions": ["fog"], "bounds": (-1.0, 1.0)}, "corruptions need images in bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            jr.evaluate(brightness, GREY, LABELS, **settings, **change)
