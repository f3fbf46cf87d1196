"""Images that stay on disk: they are to be what the same images in memory are."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jaxrobust import data, parallel, safeclip
from jaxrobust.data import stored_images
from jaxrobust.safeclip import triggers
from tests.tiny_clip import WORDS, tiny_clip

SHAPE, COUNT = (6, 6, 3), 24
CLASSES = ("cat", "dog")


def write_table(folder, count, first):
    rows = []
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, SHAPE, np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="PNG")
        (folder / f"{number}.png").write_bytes(stream.getvalue())
        rows.append(f"{number}.png\ta {CLASSES[number % 2]} no {number}")
    path = folder / f"from_{first}.tsv"
    path.write_text("\n".join(["image\tcaption", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return write_table(folder, COUNT, 0), write_table(folder, 4, 100)


@pytest.fixture(scope="module")
def both(tables):
    """The training pairs on disk and in memory."""
    return data.pair_source(tables[0]).pairs(), data.load_pairs(tables[0])[0]


def equal(stored, memory):
    assert isinstance(stored.images, data.StoredImages)
    assert stored.images.shape == memory.images.shape
    assert (stored.images.dtype, stored.images.ndim) == (memory.images.dtype, memory.images.ndim)
    np.testing.assert_array_equal(np.asarray(stored.images), memory.images)
    np.testing.assert_array_equal(stored.indices, memory.indices)
    assert stored.captions == memory.captions


def test_pairs_on_disk_are_those_in_memory(both):
    equal(*both)


def test_images_on_disk_can_be_gone_through_one_by_one(both):
    stored, memory = both
    np.testing.assert_array_equal(np.stack(list(stored.images)), memory.images)


@pytest.mark.parametrize(
    "rows", [slice(3, 9), slice(None, None, 5), [4, 4, 1], np.arange(COUNT) % 3 == 0, []]
)
def test_rows_are_chosen_as_of_an_array(both, rows):
    equal(*(pairs.take(rows) for pairs in both))


def test_choosing_rows_decodes_nothing(both, monkeypatch):
    stored = both[0]

    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(data.Source, "take", refuse)
    some = stored.take(slice(2, 9))
    assert len(some.images) == 7
    with pytest.raises(AssertionError, match="decoded"):
        np.asarray(some.images)


def test_one_row_is_not_a_set_of_images(both):
    with pytest.raises(IndexError, match="a slice or an array of rows, got 3"):
        both[0].images[3]


def test_images_in_memory_join_and_replace_those_on_disk(both):
    stored, memory = (pairs.images for pairs in both)
    new = np.random.default_rng(0).random((3, *SHAPE), dtype=np.float32)
    for images in (stored, memory):
        changed = stored_images.replaced(images, np.array([5, 0]), new[:2])
        changed = stored_images.joined(changed, new)
        expected = np.concatenate([memory, new])
        expected[[5, 0]] = new[:2]
        np.testing.assert_array_equal(np.asarray(changed), expected)
        back = changed[np.arange(len(changed))[::-1]]
        np.testing.assert_array_equal(np.asarray(back), expected[::-1])
        assert stored_images.digests(back) == stored_images.digests(expected[::-1])
    np.testing.assert_array_equal(np.asarray(stored), memory)


def test_an_image_on_disk_is_decoded_once_for_its_digest(both, monkeypatch):
    stored = both[0].take(slice(None))
    decoded = []
    original = data.Source.take

    def take(self, positions, pool=None):
        decoded.extend(positions)
        return original(self, positions, pool)

    monkeypatch.setattr(data.Source, "take", take)
    images = stored_images.stored(stored.images.source)
    decoded.clear()
    first = stored_images.digests(images[:10])
    assert stored_images.digests(images[5:15])[:5] == first[5:]
    assert sorted(decoded) == list(range(15))


def poison(pairs, held_out):
    """Poisons of all three kinds."""
    one, first = safeclip.targeted(pairs, held_out.take([0]), ["dog"], per_target=3)
    two, second = safeclip.backdoor(one, triggers.badnets(0.3), "cat", rate=4)
    style = {"rate": 2, "style": "consistent"}
    three, third = safeclip.backdoor(two, triggers.blended(0.2), "dog", **style)
    return three, safeclip.manifest.join(first, second, third)


def test_other_files_are_another_set_unless_nobody_uses_them(tmp_path):
    table = write_table(tmp_path, COUNT, 0)

    def identities():
        images = data.pair_source(table).pairs().images
        used = dataclasses.replace(images, places=images.places[1:6])
        return stored_images.identity(images), stored_images.identity(used)

    before = identities()
    assert identities() == before
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    assert identities()[0] != before[0]
    assert identities()[1] == before[1]
    (tmp_path / "3.png").write_bytes((tmp_path / "1.png").read_bytes())
    assert identities()[1] != before[1]


def test_poisons_and_manifest_are_those_of_the_pairs_in_memory(both, tables):
    held_out = data.pair_source(tables[1]).pairs()
    stored, theirs = poison(both[0], held_out)
    memory, ours = poison(both[1], data.load_pairs(tables[1])[0])
    equal(stored, memory)
    assert theirs == ours
    safeclip.manifest.check(ours, stored)


def test_training_from_disk_is_training_from_memory(both):
    recipe = safeclip.Recipe(
        epochs=3,
        unimodal_epochs=1,
        batch_size=8,
        warmup=2,
        pool=16,
        bounds=(0.5, 1.0),
        fallback=0.5,
    )
    tokens = np.random.default_rng(2).integers(0, WORDS, (COUNT, 3, 6)).astype(np.int32)
    clip = tiny_clip()
    mesh = parallel.data_mesh(1)
    with pytest.warns(UserWarning, match=r"outside .0.5, 1.0., so the best 50% are safe"):
        one, other = (
            safeclip.fit(clip, recipe, pairs.images, tokens, mesh=mesh, progress=False)
            for pairs in both
        )
    assert one.history == other.history
    np.testing.assert_array_equal(one.trust.scores, other.trust.scores)
    np.testing.assert_array_equal(
        one.state.params["logit_scale"], other.state.params["logit_scale"]
    )
