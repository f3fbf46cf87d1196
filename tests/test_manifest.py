"""Manifests: whole, hashed, and only for the data that they were made for."""

import json

import numpy as np
import pytest

from jaxrobust.data.pairs import Pairs
from jaxrobust.safeclip import manifest, poisons, triggers

RANDOM = np.random.default_rng(1)


def some_pairs(count=12, first=0):
    images = RANDOM.random((count, 6, 6, 3), dtype=np.float32)
    captions = tuple(f"a {('cat', 'dog', 'fox')[row % 3]} no {row}" for row in range(count))
    return Pairs(images, captions, np.arange(first, first + count, dtype=np.int32))


CLEAN = some_pairs()
HELD = some_pairs(3, first=50)
ONE, FIRST = poisons.targeted(CLEAN, HELD.take([0]), ["dog"], per_target=4)
TWO, SECOND = poisons.backdoor(ONE, triggers.badnets(0.3), "cat", rate=2, style="consistent")
BOTH = manifest.join(FIRST, SECOND)


def test_a_manifest_comes_back_from_its_file(tmp_path):
    path = tmp_path / "deep" / "manifest.json"
    BOTH.save(path)
    assert manifest.load(path) == BOTH
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text())["sha256"] == BOTH.sha256


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    FIRST.save(path)

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="full"):
        BOTH.save(path)
    monkeypatch.undo()
    assert manifest.load(path) == FIRST
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("message", "edit"),
    [
        ("changed after", lambda text: text.replace('"dog"', '"fox"', 1)),
        ("changed after", lambda text: text.replace('"canary": false', '"canary": true', 1)),
        ("not a manifest", lambda text: text[:-20]),
        ("not a manifest of format", lambda text: "[1]"),
        ("not a manifest of format", lambda text: text.replace('"format": 2', '"format": 1')),
        ("expected fields", lambda text: text.replace('"clean"', '"clear"', 1)),
        ("kind must be", lambda text: text.replace('"targeted"', '"hidden"', 1)),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, message, edit):
    path = tmp_path / "manifest.json"
    BOTH.save(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=rf"manifest.json: .*{message}"):
        manifest.load(path)


def test_the_fingerprint_does_not_depend_on_the_order_but_on_everything_else():
    mark = manifest.fingerprint(CLEAN)
    assert mark == manifest.fingerprint(CLEAN.take(np.arange(12)[::-1]))
    images = CLEAN.images.copy()
    images[5, 2, 2, 1] = np.nextafter(images[5, 2, 2, 1], np.float32(2))
    swapped = (CLEAN.captions[1], CLEAN.captions[0], *CLEAN.captions[2:])
    others = (
        CLEAN.replace(images=images),
        CLEAN.replace(captions=swapped),
        CLEAN.replace(indices=CLEAN.indices + 1),
        CLEAN.take(slice(0, 11)),
    )
    marks = {manifest.fingerprint(pairs) for pairs in others}
    assert len(marks) == 4
    assert mark not in marks
    with pytest.raises(ValueError, match="indices must be unique, got 0 "):
        manifest.fingerprint(CLEAN.replace(indices=CLEAN.indices * 0))


def test_only_the_data_of_a_manifest_passes():
    manifest.check(BOTH, TWO)
    manifest.check(BOTH, TWO.take(np.arange(16)[::-1]))
    manifest.check(BOTH, CLEAN, clean=True)
    manifest.check(FIRST, ONE)
    with pytest.raises(ValueError, match="these are the clean ones"):
        manifest.check(BOTH, CLEAN)
    with pytest.raises(ValueError, match="these are the poisoned ones"):
        manifest.check(BOTH, TWO, clean=True)
    with pytest.raises(ValueError, match="does not belong to these 16 pairs"):
        manifest.check(BOTH, ONE)
    with pytest.raises(ValueError, match="does not belong to these 15 pairs"):
        manifest.check(BOTH, TWO.take(slice(1, None)))


def test_only_attacks_on_each_others_outcome_are_joined():
    assert BOTH.clean == manifest.fingerprint(CLEAN)
    assert BOTH.poisons == FIRST.poisons + SECOND.poisons
    assert manifest.join(FIRST) == FIRST
    with pytest.raises(ValueError, match="manifest 1 was made for"):
        manifest.join(SECOND, FIRST)
    with pytest.raises(ValueError, match="at least one"):
        manifest.join()


def test_the_mask_marks_the_poisons_in_any_order():
    mask = manifest.poisoned(BOTH, TWO.indices)
    changed = (TWO.images[:12] != CLEAN.images).any((1, 2, 3))
    np.testing.assert_array_equal(mask, [*changed, True, True, True, True])
    np.testing.assert_array_equal(manifest.poisoned(BOTH, TWO.indices[::-1]), mask[::-1])
    targeted = manifest.poisoned(BOTH, TWO.indices, kinds=("targeted",))
    np.testing.assert_array_equal(targeted, np.arange(16) >= 12)
    assert not manifest.poisoned(BOTH, TWO.indices, canary=True).any()
    assert manifest.poisoned(BOTH, TWO.indices, canary=False).sum() == 6
    with pytest.raises(ValueError, match="kinds must be among"):
        manifest.poisoned(BOTH, TWO.indices, kinds=("hidden",))


def test_an_entry_whose_columns_differ_in_length_is_refused():
    with pytest.raises(ValueError, match="of one length, got 2, 1 and 2"):
        manifest.Poison("targeted", "cat", (1, 2), ("a cat",), (1, 1))
