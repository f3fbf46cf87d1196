"""Maps: exact areas, controls, human annotations, the cache, and what is refused."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from jaxrobust import data, salience

RANDOM = np.random.default_rng(0)
SCORES = jnp.asarray(RANDOM.normal(size=(3, 5, 4, 1)), jnp.float32)


@hypothesis.given(
    levels=strategies.integers(1, 4),
    area=strategies.floats(0, 1, width=32),
    seed=strategies.integers(0, 99),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_top_fraction_marks_exactly_k_of_the_highest_whatever_the_ties(levels, area, seed):
    scores = np.random.default_rng(seed).integers(0, levels, (2, 3, 7, 1)).astype(np.float32)
    maps = np.asarray(salience.top_fraction(scores, area))
    count = int(np.floor(np.float32(area) * np.float32(21) + np.float32(0.5)))
    assert set(np.unique(maps)) <= {0, 1}
    for one, score in zip(maps.ravel().reshape(2, -1), scores.reshape(2, -1), strict=True):
        assert one.sum() == count
        # Python's sort is stable: ties in reading order.
        expected = sorted(range(21), key=lambda place: -score[place])[:count]
        np.testing.assert_array_equal(np.flatnonzero(one), sorted(expected))


def test_every_example_may_have_its_own_area():
    maps = salience.top_fraction(SCORES, jnp.asarray([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(maps.sum((1, 2, 3)), [0, 10, 20])


def test_top_fraction_is_the_same_under_jit():
    tied = jnp.round(SCORES)
    jitted = jax.jit(salience.top_fraction)(tied, 0.35)
    np.testing.assert_array_equal(jitted, salience.top_fraction(tied, 0.35))


def test_a_rank_map_has_the_area_that_is_asked_for_and_the_scores_order():
    for share in (0.1, 0.3, 0.5, 0.9):
        maps = salience.rank_map(SCORES, share)
        # Twenty pixels: the rule of midpoints is off by a few thousandths.
        np.testing.assert_allclose(salience.area(maps), share, atol=0.02)
        for one, score in zip(maps, SCORES, strict=True):
            np.testing.assert_array_equal(np.argsort(one.ravel()), np.argsort(score.ravel()))
    np.testing.assert_array_equal(salience.rank_map(SCORES, 0.0), 0)
    np.testing.assert_array_equal(salience.rank_map(SCORES, 1.0), 1)


def test_a_soft_map_spans_zero_to_one_and_a_constant_one_is_zero():
    maps = salience.soft(SCORES)
    np.testing.assert_array_equal(maps.min((1, 2, 3)), 0)
    np.testing.assert_array_equal(maps.max((1, 2, 3)), 1)
    np.testing.assert_array_equal(salience.soft(jnp.full((1, 2, 2, 1), 0.7)), 0)


def test_dilation_agrees_with_a_loop():
    spots = (SCORES > 1).astype(jnp.float32)
    dilated = salience.dilate(spots, 1)
    padded = np.pad(np.asarray(spots), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for row in range(5):
        for column in range(4):
            window = padded[:, row : row + 3, column : column + 3].max((1, 2, 3))
            np.testing.assert_array_equal(dilated[:, row, column, 0], window)


def test_blur_agrees_with_scipy_inside():
    from scipy.ndimage import gaussian_filter

    scores = RANDOM.normal(size=(1, 15, 17, 1)).astype(np.float32)
    expected = gaussian_filter(scores[0, ..., 0], 1.0, truncate=3.0)
    blurred = salience.blur(scores, 1.0)[0, ..., 0]
    np.testing.assert_allclose(blurred[3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-5)
    np.testing.assert_allclose(salience.blur(np.ones((1, 5, 6, 1), np.float32), 2.0), 1, rtol=1e-6)


def test_stand_out_agrees_with_numpy():
    squared = np.square(np.asarray(SCORES))
    mean, deviation = squared.mean((1, 2, 3)), squared.std((1, 2, 3))
    expected = squared > (mean + deviation)[:, None, None, None]
    np.testing.assert_array_equal(salience.stand_out(SCORES), expected)
    np.testing.assert_array_equal(salience.stand_out(jnp.zeros((1, 2, 2, 1))), 0)


def test_controls_protect_as_much_as_the_map():
    maps = salience.rank_map(SCORES, 0.3)
    for control in (salience.shuffled, salience.displaced):
        other = control(jax.random.key(0), maps)
        values = lambda m: np.sort(np.asarray(m).reshape(3, -1))  # noqa: E731
        np.testing.assert_array_equal(values(other), values(maps))
        assert (other != maps).any()
        np.testing.assert_array_equal(other, control(jax.random.key(0), maps))
    least = salience.least_salient(SCORES, 0.3)
    np.testing.assert_array_equal(least.sum((1, 2, 3)), 6)
    np.testing.assert_array_equal(least * salience.top_fraction(SCORES, 0.7), 0)


def test_a_displaced_map_keeps_its_shape():
    maps = np.zeros((1, 6, 6, 1), np.float32)
    maps[0, 1:3, 2:5] = 1
    moved = salience.displaced(jax.random.key(2), maps)
    shifted = [np.roll(maps, (i, j), (1, 2)) for i in range(6) for j in range(6)]
    assert any((moved == one).all() for one in shifted)


def test_control_rows_follow_their_keys():
    maps = salience.top_fraction(SCORES, 0.3)
    keys = jax.random.split(jax.random.key(1), 3)
    for control in (salience.shuffled, salience.displaced):
        np.testing.assert_array_equal(control(keys, maps)[1:], control(keys[1:], maps[1:]))


def test_inverting_twice_changes_nothing():
    maps = salience.top_fraction(SCORES, 0.3)
    np.testing.assert_array_equal(salience.invert(salience.invert(maps)), maps)


DATASET = data.Dataset(
    np.zeros((3, 5, 4, 2), np.float32),
    np.zeros(3, np.int32),
    np.asarray([7, 5, 9], np.int32),
    ("a",),
)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((3, 4, 4, 1)), r"salience must have shape \(3, 5, 4, 1\), got \(3, 4, 4, 1\)"),
        (
            np.full((3, 5, 4, 1), np.nan),
            r"salience must not hold NaN, got some in rows \[0, 1, 2\]",
        ),
        (np.full((3, 5, 4, 1), 1.5), r"salience must lie in \[0, 1\], got values in \[1.5, 1.5\]"),
    ],
)
def test_maps_that_do_not_fit_are_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        salience.attach(DATASET, maps)


@pytest.mark.parametrize(
    ("area", "message"),
    [
        (1.2, r"area must be in \[0, 1\], got 1.2"),
        (-0.1, r"area must be in \[0, 1\], got -0.1"),
        (jnp.ones(2), r"area must be a number or \[3\], got shape \(2,\)"),
    ],
)
def test_an_area_out_of_range_is_refused(area, message):
    for function in (salience.top_fraction, salience.rank_map, salience.least_salient):
        with pytest.raises(ValueError, match=message):
            function(SCORES, area)


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="scores must not hold NaN"):
        salience.top_fraction(SCORES.at[0, 0, 0, 0].set(jnp.nan), 0.5)
    with pytest.raises(ValueError, match=r"scores must have shape \[b, h, w, 1\], got \(3, 5, 4\)"):
        salience.soft(SCORES[..., 0])


def test_attached_maps_reach_the_batches_with_their_examples():
    maps = salience.top_fraction(SCORES, 0.3)
    batch = next(data.batches(salience.attach(DATASET, maps), 3, seed=1))
    rows = [list(DATASET.indices).index(index) for index in batch["index"]]
    np.testing.assert_array_equal(batch["salience"], np.asarray(maps)[rows])
    assert "salience" not in next(data.batches(DATASET, 3))


def test_files_are_read_and_unannotated_examples_are_zero(tmp_path):
    grey = RANDOM.integers(0, 256, (5, 4), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    maps = salience.from_files([None, tmp_path / "a.png", None])
    np.testing.assert_array_equal(maps[1, ..., 0], grey / np.float32(255))
    np.testing.assert_array_equal(maps[[0, 2]], 0)
    missing = tmp_path / "b.png"
    with pytest.raises(FileNotFoundError, match=f"1 annotated examples have no map: {missing}"):
        salience.from_files([tmp_path / "a.png", missing])
    with pytest.raises(ValueError, match="paths must lead to maps of one shape"):
        salience.from_files([None])


def test_boxes_are_rescaled_with_the_image():
    boxes = [[(0.0, 0.0, 10.0, 20.0), (30.0, 0.0, 10.0, 40.0)], None, []]
    maps = salience.from_boxes(boxes, [(40, 40)] * 3, (4, 8))
    expected = np.zeros((4, 8))
    expected[:2, :2] = 1
    expected[:, 6:] = 1
    np.testing.assert_array_equal(maps[0, ..., 0], expected)
    np.testing.assert_array_equal(maps[1:], 0)
    with pytest.raises(ValueError, match="a box must have width and height > 0"):
        salience.from_boxes([[(0.0, 0.0, 0.0, 2.0)]], [(4, 4)], (4, 4))


def test_alpha_is_the_map():
    images = RANDOM.uniform(size=(2, 3, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(salience.from_alpha(images)[..., 0], images[..., 3])


def test_a_share_of_the_examples_loses_its_map_whatever_the_order():
    maps = np.ones((40, 2, 2, 1), np.float32)
    indices = np.arange(100, 140)
    kept = salience.unannotate(maps, indices, 0.25)
    lost = np.flatnonzero(~kept.any((1, 2, 3)))
    assert len(lost) == 10
    np.testing.assert_array_equal(maps, 1)
    backwards = salience.unannotate(maps, indices[::-1], 0.25)
    np.testing.assert_array_equal(backwards[::-1], kept)
    with pytest.raises(ValueError, match=r"area must be in \[0, 1\]"):
        salience.unannotate(maps, indices, 1.5)


def test_cached_maps_are_made_once_and_found_by_id(tmp_path):
    made = []

    def make(rows):
        made.append(list(rows))
        return np.asarray(rows, np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1))

    ids = np.asarray([7, 3, 9])
    first = salience.cached(tmp_path, {"by": 1}, ids, make)
    again = salience.cached(tmp_path, {"by": 1}, ids[::-1], make)
    np.testing.assert_array_equal(again, first[::-1])
    assert made == [[0, 1, 2]]
    more = salience.cached(tmp_path, {"by": 1}, np.asarray([9, 4]), make)
    np.testing.assert_array_equal(more[:, 0, 0, 0], [2, 1])
    assert made == [[0, 1, 2], [1]]
    salience.cached(tmp_path, {"by": 2}, ids, make)
    assert made[2:] == [[0, 1, 2]]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_cache_says_which_file_to_delete(tmp_path):
    make = lambda rows: np.zeros((len(rows), 1, 1, 1))  # noqa: E731
    salience.cached(tmp_path, {}, np.arange(2), make)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{file} is damaged .*: delete it"):
        salience.cached(tmp_path, {}, np.arange(2), make)


def test_maps_of_the_wrong_number_are_not_cached(tmp_path):
    with pytest.raises(ValueError, match="make must return 2 maps without NaN"):
        salience.cached(tmp_path, {}, np.arange(2), lambda rows: np.zeros((1, 1, 1, 1)))
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_tells_methods_settings_and_weights_apart():
    weights = {"a": np.ones(2, np.float32)}
    one = salience.made_by(partial(salience.rise, samples=3), weights, data="x")
    assert one == salience.made_by(partial(salience.rise, samples=3), weights, data="x")
    assert one != salience.made_by(partial(salience.rise, samples=4), weights, data="x")
    assert one != salience.made_by(partial(salience.occlusion), weights, data="x")
    assert one != salience.made_by(partial(salience.rise, samples=3), {"a": np.zeros(2)}, data="x")
    assert one != salience.made_by(partial(salience.rise, samples=3), weights, data="y")
