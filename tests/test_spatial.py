"""The spatial threat: moves against scipy, and the search against a loop over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import jaxrobust as jr
from jaxrobust.attacks import scheduler, spatial
from jaxrobust.attacks.spatial import move
from tests.test_apgd import KEY, LABELS, X, logits_fn

IMAGE = np.random.default_rng(0).random((9, 6, 2), np.float32)
GRID = (3, 2, 5)


def moved(image, down=0.0, right=0.0, angle=0.0, fill=0.0):
    one = lambda v: jnp.asarray([v], jnp.float32)  # noqa: E731
    return np.asarray(move(jnp.asarray(image)[None], one(down), one(right), one(angle), fill)[0])


def test_no_move_changes_no_bit():
    np.testing.assert_array_equal(moved(IMAGE), IMAGE)


def test_whole_shifts_bring_in_the_fill():
    down = moved(IMAGE, down=2 / 9, fill=0.25)
    np.testing.assert_allclose(down[2:], IMAGE[:-2], atol=1e-5)
    np.testing.assert_array_equal(down[:1], 0.25)
    left = moved(IMAGE, right=-1 / 6)
    np.testing.assert_allclose(left[:, :-1], IMAGE[:, 1:], atol=1e-5)
    np.testing.assert_allclose(left[:, -1], 0, atol=1e-5)


def test_a_quarter_turn_is_numpys():
    square = IMAGE[:6]
    np.testing.assert_allclose(moved(square, angle=90), np.rot90(square), atol=1e-5)


@pytest.mark.parametrize("angle", [-30.0, 12.5])
def test_rotation_and_shift_agree_with_scipy(angle):
    turn = np.deg2rad(angle)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    # Scipy cuts off at the border, where we blend with the fill: give it a border of zeros.
    wide = np.pad(IMAGE, ((4, 4), (4, 4), (0, 0)))
    middle = (np.asarray(wide.shape[:2]) - 1) / 2
    offset = middle - matrix @ (middle + np.array([0.1 * 9, -0.15 * 6]))
    slow = [ndimage.affine_transform(wide[..., c], matrix, offset, order=1) for c in range(2)]
    ours = moved(IMAGE, down=0.1, right=-0.15, angle=angle)
    np.testing.assert_allclose(ours, np.stack(slow, -1)[4:-4, 4:-4], atol=1e-5)


def test_it_breaks_exactly_what_some_move_of_the_grid_breaks():
    attack = spatial(0.5, shift=0.2, rotation=40, grid=GRID)
    x_adv = attack(logits_fn, X, LABELS, KEY)
    shifts, sides, turns = (0.5 * np.linspace(-1, 1, n) for n in GRID)
    broken = np.zeros(len(X), bool)
    for down in 0.2 * shifts:
        for right in 0.2 * sides:
            for angle in 40 * turns:
                each = [jnp.full(len(X), v, jnp.float32) for v in (down, right, angle)]
                broken |= np.asarray(logits_fn(move(X, *each)).argmax(1) != LABELS)
    ours = np.asarray(logits_fn(x_adv).argmax(1) != LABELS)
    np.testing.assert_array_equal(ours, broken)
    assert 0.1 < broken.mean() < 1


def test_a_smaller_share_is_no_new_trace_and_none_of_it_is_the_identity():
    traces = []

    def counted(x):
        traces.append(x.shape)
        return logits_fn(x)

    attack = lambda eps: spatial(eps, grid=GRID)(counted, X, LABELS, KEY)  # noqa: E731
    attack(1.0), attack(0.3)  # a full shape, and the one that finishes the rest
    before = len(traces)
    attack(0.4)
    np.testing.assert_array_equal(attack(0.0), X)
    assert len(traces) == before


def test_it_runs_under_jit_with_the_same_flags():
    attack = spatial(grid=GRID, rotation=40)
    under_jit = jax.jit(lambda x: attack(logits_fn, x, LABELS, KEY))(X)
    eager = attack(logits_fn, X, LABELS, KEY)
    np.testing.assert_array_equal((under_jit != X).any((1, 2, 3)), (eager != X).any((1, 2, 3)))


def test_the_widest_moves_come_first():
    search = spatial(shift=0.1, rotation=30, grid=(3, 3, 3)).search(10)
    assert isinstance(search, scheduler.Search)
    assert search.evaluations == 27
    assert np.abs(search.moves[:8]).tolist() == [[0.1, 0.1, 30.0]] * 8
    assert search.moves[-1] == (0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 1.5}, r"eps must lie in \[0, 1\], got 1.5"),
        ({"eps": -0.1}, r"eps must lie in \[0, 1\], got -0.1"),
        ({"shift": 3}, "shift must be in sides of the image"),
        ({"rotation": -5}, "rotation must be in degrees"),
        ({"grid": (5, 5)}, "grid must be three whole numbers >= 1"),
        ({"grid": (5, 5, 0)}, "grid must be a whole number >= 1, got 0"),
        ({"bounds": (0.0, np.inf)}, "bounds must be finite"),
        ({"loop": "while"}, "loop"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        spatial(**settings)


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="mask must be None"):
        jr.spatial()(logits_fn, X, LABELS, KEY, mask=jnp.ones(X.shape))
