import itertools
import json

import numpy as np
import pytest

from experiments import mixtures, plots_sipat, records


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
    np.testing.assert_array_equal(records.unpacked(records.packed(right), 77), right)


def random_outcomes(seed, shares, n=60):
    """A setting and controls, [2 seeds, 2 rows, n] each, of about these accuracies."""
    rng = np.random.default_rng(seed)
    setting, *others = (rng.random((2, 2, n)) < np.array(share)[:, None] for share in shares)
    return setting, dict(zip("abc", others, strict=False))


def test_an_interval_that_is_one_of_many_is_as_wide_as_its_share_of_the_error():
    setting, controls = random_outcomes(7, [(0.8, 0.7), (0.9, 0.3), (0.6, 0.6)])
    found = mixtures.margin(setting, controls, 1, resamples=500, comparisons=5, seed=2)
    each = np.stack([setting, *controls.values()]).mean(1)
    draws = np.random.default_rng(2).multinomial(60, np.full(60, 1 / 60), 500)
    margins = [slow_margin((each * draw).mean(-1)) for draw in draws]
    expected = np.quantile(margins, (0.005, 0.995))
    np.testing.assert_allclose((found.interval.low, found.interval.high), expected, atol=1e-12)


def test_resamples_are_the_same_however_many_are_held_at_a_time(monkeypatch):
    setting, controls = random_outcomes(8, [(0.8, 0.7), (0.9, 0.3)])
    whole = mixtures.margin(setting, controls, 1, resamples=100)
    monkeypatch.setattr(mixtures, "_AT_ONCE", 30)
    assert mixtures.margin(setting, controls, 1, resamples=100) == whole


def record(cells, seeds=2):
    """A record of the second experiment with one radius, as its results file has it."""
    problem = {"grid": [0.1], "suite_eps": [0.1]}
    config = {
        "problems": {"digits": problem}, "seeds": list(range(seeds)), "pgd_steps": 50,
        "suite_images": 50,
    }  # fmt: skip
    found = [
        {
            "key": {"dataset": "digits", "method": method, "seed": seed},
            "metrics": {"outcomes": records.packed(rows), "images": rows.shape[1], **suite},
        }
        for method, (outcome, suite) in cells.items()
        for seed, rows in enumerate(outcome)
    ]
    return {"config": config, "cells": found}


def lines_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_only_settings_above_all_controls_are_followed_up_and_later_seeds_stand_alone(tmp_path):
    better, random = outcomes(0.85, 0.9), np.random.default_rng(0)
    # The first seed chose it; on the second one it is no better than its control.
    lucky = np.stack([better[0], outcomes(0.85, 0.6)[0]])
    cells = {
        "at": outcomes(0.85, 0.6), "fresh": better, "lucky": lucky, "worse": outcomes(0.85, 0.5)
    }  # fmt: skip
    shuffled = {name: (rows[..., random.permutation(100)], {}) for name, rows in cells.items()}
    path = tmp_path / "sipat.json"
    path.write_text(json.dumps(record(shuffled)))
    _, _, *lines = lines_of(plots_sipat.follow_up(path))
    assert [line[1] for line in lines] == ["fresh", "lucky"]
    fresh, by_luck = (line[5] for line in lines)
    assert fresh.startswith("+30.0 (")
    assert by_luck.startswith("+0.0 (")


def test_pgd_is_set_beside_the_suite_on_the_suites_images_alone(tmp_path):
    rows = outcomes(0.9, 0.8)  # the first 50 of 100 images all withstand PGD
    suite = {"suite_accuracy": [0.7]}
    path = tmp_path / "sipat.json"
    path.write_text(json.dumps(record({"at": (rows, suite), "unjudged": (rows, {})})))
    _, _, *lines = lines_of(plots_sipat.beside_suite(path))
    assert lines == [["at", "100.0", "70.0", "30.0"]]
