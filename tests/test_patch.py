"""The patch threat: one window, at the gradient's largest, filled as Auto-PGD fills it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrobust as jr
from jaxrobust import losses
from jaxrobust.attacks import apgd_ce, patch, scheduler
from tests.test_apgd import KEY, LABELS, X, logits_fn

HEIGHT, WIDTH = X.shape[1:3]
EPS = 0.15


def changed(x_adv):
    return np.asarray((x_adv != X).any(-1))


def broken(x_adv):
    return np.asarray(logits_fn(x_adv).argmax(1) != LABELS)


@pytest.fixture(scope="module")
def found():
    return patch((1, 2), eps=EPS, places=3, steps=20)(logits_fn, X, LABELS, KEY)


def test_only_one_window_changes_and_stays_in_the_box(found):
    assert found.min() >= 0
    assert found.max() <= 1
    for window in changed(found):
        rows, columns = np.nonzero(window)
        if len(rows):
            assert np.ptp(rows) < 1
            assert np.ptp(columns) < 2
    assert 0.1 < broken(found).mean() < 1
    np.testing.assert_array_equal(broken(found), changed(found).any((1, 2)))


def test_more_places_break_what_fewer_do_and_more(found):
    one = broken(patch((1, 2), eps=EPS, places=1, steps=20)(logits_fn, X, LABELS, KEY))
    assert (broken(found) | ~one).all()
    assert broken(found).sum() > one.sum()


def test_the_first_place_is_where_the_gradient_is_largest():
    x_adv = patch((1, 2), eps=EPS, places=1, steps=20)(logits_fn, X, LABELS, KEY)
    loss = lambda x: losses.cross_entropy(logits_fn(x), LABELS).sum()  # noqa: E731
    size = np.abs(np.asarray(jax.grad(loss)(X))).sum(-1)
    assert changed(x_adv).any()
    for window, weight in zip(changed(x_adv), size, strict=True):
        if window.any():
            sums = {
                (i, j): weight[i, j : j + 2].sum() for i in range(HEIGHT) for j in range(WIDTH - 1)
            }
            top, left = max(sums, key=sums.get)
            outside = window.copy()
            outside[top, left : left + 2] = False
            assert not outside.any()


def test_a_window_of_the_whole_image_is_auto_pgd():
    whole = patch((HEIGHT, WIDTH), eps=0.03, places=1, steps=20)(logits_fn, X, LABELS, KEY)
    plain = apgd_ce("linf", 0.03, steps=20)(logits_fn, X, LABELS, KEY)
    np.testing.assert_array_equal(broken(whole), broken(plain))
    assert 0.1 < broken(whole).mean() < 1
    assert jnp.abs(whole - X).max() <= 0.03 + 1e-6


def test_no_room_is_the_identity():
    np.testing.assert_array_equal(patch(2, eps=0.0, steps=3)(logits_fn, X, LABELS, KEY), X)


def test_it_runs_as_the_scheduler_asks():
    assert isinstance(patch(2).search(10), scheduler.Search)
    assert patch(2, places=4).search(10).rounds == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be a whole number >= 1, got 0"),
        ({"size": (2, 3, 1)}, "size must be one or two whole numbers"),
        ({"size": 2, "places": 0}, "places must be a whole number >= 1"),
        ({"size": 2, "eps": -1.0}, "eps must be >= 0"),
        ({"size": 2, "eps": 8}, "8 / 255, not 8"),
        ({"size": 2, "steps": 0}, "steps"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        patch(**settings)


def test_a_window_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="size must fit into"):
        jr.patch(HEIGHT + 1)(logits_fn, X, LABELS, KEY)
