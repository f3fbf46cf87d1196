import itertools

import numpy as np
import pytest

from experiments import common, mixtures


def outcomes(clean, robust, n=100):
    """[2 seeds, 2 rows, n] with these accuracies."""
    rows = [np.arange(n) < round(n * share) for share in (clean, robust)]
    return np.stack([np.stack(rows)] * 2)


CONTROLS = {"robust": outcomes(0.8, 0.6), "clean": outcomes(0.9, 0.2), "poor": outcomes(0.7, 0.1)}


def test_a_setting_is_held_against_the_best_mixture_of_equal_clean_accuracy():
    found = mixtures.margin(outcomes(0.85, 0.7), CONTROLS, 1)
    # Half of each: 0.4.
    assert found.rivals == ("clean", "robust")
    assert found.share == pytest.approx(0.5)
    assert found.interval.estimate == pytest.approx(0.3)
    assert found.above


def test_what_lies_on_the_controls_line_is_not_above_it():
    found = mixtures.margin(outcomes(0.85, 0.4), CONTROLS, 1)
    assert found.interval.estimate == pytest.approx(0.0)
    assert not found.above


@pytest.mark.parametrize(("clean", "rival"), [(0.5, "robust"), (0.97, "clean")])
def test_outside_the_controls_range_one_of_them_is_the_rival(clean, rival):
    found = mixtures.margin(outcomes(clean, 0.5), CONTROLS, 1)
    assert found.rivals == (rival,)
    expected = 0.5 - CONTROLS[rival][:, 1].mean()
    assert found.interval.estimate == pytest.approx(expected)


def slow_margin(points):
    """The setting's height above the best mixture, one pair after the other."""
    (clean, robust), *controls = points
    wanted = min(clean, max(x for x, _ in controls))
    found = [y for x, y in controls if x >= wanted]
    for (x1, y1), (x2, y2) in itertools.permutations(controls, 2):
        if x1 >= wanted > x2:
            share = (wanted - x2) / (x1 - x2)
            found.append(share * y1 + (1 - share) * y2)
    return robust - max(found)


def test_the_interval_is_that_of_the_whole_margin_drawn_anew():
    rng = np.random.default_rng(3)
    shares = rng.uniform(0.3, 0.9, (4, 2))
    setting, *others = (rng.random((2, 2, 60)) < share[:, None] for share in shares)
    controls = dict(zip("abc", others, strict=True))
    found = mixtures.margin(setting, controls, 1, resamples=300, seed=5)
    each = np.stack([setting, *others]).mean(1)
    assert found.interval.estimate == pytest.approx(slow_margin(each.mean(-1)))
    draws = np.random.default_rng(5).multinomial(60, np.full(60, 1 / 60), 300)
    margins = [slow_margin((each * draw).mean(-1)) for draw in draws]
    expected = np.quantile(margins, (0.025, 0.975))
    np.testing.assert_allclose((found.interval.low, found.interval.high), expected, atol=1e-12)


def test_a_setting_on_a_steep_part_of_the_controls_line_is_not_called_above_it():
    # One clean image more, and the mixture that is as accurate loses half of its robustness.
    rng = np.random.default_rng(0)
    clean = rng.random(1000) < 0.98
    flipped = clean.copy()
    flipped[np.flatnonzero(~clean)[:2]] = True
    robust, weak = rng.random(1000) < 0.8, rng.random(1000) < 0.2
    controls = {"robust": np.stack([clean, robust])[None], "clean": np.stack([flipped, weak])[None]}
    other = clean.copy()
    other[np.flatnonzero(~clean)[3]] = True
    other[np.flatnonzero(clean)[0]] = False
    other[np.flatnonzero(~clean)[4]] = True
    found = mixtures.margin(np.stack([other, robust])[None], controls, 1)
    assert found.interval.estimate > 0.2
    assert not found.above


def test_no_mixture_of_two_exceeds_the_boundary_and_its_corners_are_points():
    rng = np.random.default_rng(0)
    clean, robust = rng.random((2, 30))
    corners = mixtures.boundary(clean, robust)
    points = set(zip(clean.tolist(), robust.tolist(), strict=True))
    assert {tuple(corner) for corner in corners.tolist()} <= points
    assert (np.diff(corners[:, 0]) > 0).all()
    assert (np.diff(corners[:, 1]) < 0).all()
    share = rng.random((30, 30))
    mixed = [share * v[:, None] + (1 - share) * v[None] for v in (clean, robust)]
    height = np.interp(mixed[0], *corners.T, left=corners[0, 1], right=-np.inf)
    assert (mixed[1] <= height + 1e-12).all()


def test_outcomes_come_back_from_their_packed_form():
    right = np.random.default_rng(1).random((3, 77)) < 0.4
    np.testing.assert_array_equal(common.unpacked(common.packed(right), 77), right)
