"""Square attack: the published sizes of windows, ball and box, and black-box strength."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, balls
from jaxrobust.attacks.square import _bump, _corner, _sides
from tests.test_apgd import BATCH, GOLDENS, KEY, LABELS, NORMS, X, logits_fn

EPS = {"linf": 0.06, "l2": 0.4, "l1": 2.5}


def test_windows_shrink_at_the_published_queries():
    sides = _sides("linf", 10000, 0.8, False, (32, 32))
    assert sides[[0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]].tolist() == [
        29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 2, 1,
    ]  # fmt: skip
    rescaled = _sides("linf", 5000, 0.8, True, (32, 32))
    np.testing.assert_array_equal(rescaled, sides[::2])


def test_the_attack_and_what_makes_it_have_the_same_defaults():
    assert attacks.Square(eps=0.1, norm="linf") == attacks.square("linf", 0.1)


def test_windows_of_two_bumps_have_a_middle_and_fit_the_image():
    sides = _sides("l2", 5000, 0.8, False, (28, 20))
    assert (sides[sides < 20] % 2 == 1).all()
    assert sides.max() == 20
    assert sides.min() == 3


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [1, 3, 5, 8])
def test_a_bump_has_norm_one_and_two_signs(norm, side):
    bump = _bump(norm, side)
    size = np.sqrt((bump**2).sum()) if norm == "l2" else np.abs(bump).sum()
    np.testing.assert_allclose(size, 1, atol=1e-6)
    assert (bump[side // 2 :] < 0).any()
    assert side == 1 or (bump[: side // 2] > 0).any()


@pytest.mark.parametrize("norm", NORMS)
def test_it_breaks_what_it_may_inside_ball_and_box_and_leaves_the_rest(norm):
    x_adv = attacks.square(norm, EPS[norm], queries=300)(logits_fn, X, LABELS, KEY)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert balls.norms(x_adv - X, norm).max() <= EPS[norm] * (1 + 1e-5)
    wrong = np.asarray(logits_fn(x_adv).argmax(1) != LABELS)
    np.testing.assert_array_equal(wrong, np.asarray((x_adv != X).any((1, 2, 3))))
    random = X + balls.ball(norm).sample(
        jax.random.split(KEY, BATCH), jnp.full((BATCH, 1, 1, 1), EPS[norm]), X.shape
    )
    by_chance = (logits_fn(jnp.clip(random, 0, 1)).argmax(1) != LABELS).mean()
    assert wrong.mean() > 2 * by_chance + 0.1


@pytest.mark.parametrize("edges", [True, False])
def test_windows_reach_the_last_row_and_column_if_asked_to(edges):
    keys = jax.random.split(KEY, 500)
    corners = jax.vmap(lambda key: _corner(key, (5, 8, 1), 2, edges))(keys)
    last = [3, 6] if edges else [2, 5]
    assert corners.max(0).tolist() == last
    assert corners.min(0).tolist() == [0, 0]


def test_more_queries_break_more():
    broken = [
        (logits_fn(attacks.square("linf", 0.03, queries=q)(logits_fn, X, LABELS, KEY)).argmax(1)
         != LABELS).mean()
        for q in (5, 300)
    ]  # fmt: skip
    assert broken[1] > broken[0]


def test_no_gradient_is_taken():
    forward_only = jax.custom_jvp(logits_fn)

    @forward_only.defjvp
    def refuse(primals, tangents):
        raise AssertionError("Square asked for a gradient")

    x_adv = attacks.square("linf", 0.06, queries=50)(forward_only, X, LABELS, KEY)
    assert (x_adv != X).any()


def test_half_a_batch_gives_the_same_rows_and_so_does_jit():
    attack = attacks.square("linf", 0.05, queries=120)
    keys = attacks.example_keys(KEY, BATCH)
    whole = np.asarray(attack(logits_fn, X, LABELS, keys))
    np.testing.assert_allclose(
        whole[1::2], attack(logits_fn, X[1::2], LABELS[1::2], keys[1::2]), atol=1e-6
    )
    traced = jax.jit(lambda x, y, k: attack(logits_fn, x, y, k))(X, LABELS, keys)
    np.testing.assert_allclose(whole, traced, atol=1e-6)


def test_masked_pixels_are_bit_identical_and_other_norms_refuse_masks():
    mask = jnp.zeros((5, 4, 1)).at[::2].set(1)
    x_adv = attacks.square("linf", 0.3, queries=50)(logits_fn, X, LABELS, KEY, mask=mask)
    np.testing.assert_array_equal(x_adv[:, 1::2], X[:, 1::2])
    assert (x_adv != X).any()
    x = X.at[:, 1::2].set(-0.0)
    x_adv = attacks.square("linf", 0.3, queries=50)(logits_fn, x, logits_fn(x).argmax(1), KEY, mask)
    assert x_adv[:, 1::2].tobytes() == x[:, 1::2].tobytes()
    assert (x_adv != x).any()
    with pytest.raises(ValueError, match="in linf only"):
        attacks.square("l2", 0.3)(logits_fn, X, LABELS, KEY, mask=mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries must be a whole number >= 1, got 0"),
        ({"restarts": 0}, "restarts must be"),
        ({"share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        ({"norm": "l0"}, "norm must be one of"),
    ],
)
def test_bad_settings_are_named(change, message):
    setting = {"norm": "linf", **change}
    with pytest.raises(ValueError, match=message):
        attacks.square(setting.pop("norm"), 0.1, **setting)


@pytest.mark.parametrize(
    ("shape", "norm", "eps"),
    [((1, 7, 1), "l2", 3.0), ((3, 2, 3), "linf", 0.5), ((6, 4, 1), "l1", 9.0)],
)
def test_images_of_few_pixels_and_one_row_are_attacked_too(shape, norm, eps):
    weight = jnp.asarray(GOLDENS["noise"].ravel()[: int(np.prod(shape))].reshape(shape))
    two = lambda x: jnp.stack([0 * x[:, 0, 0, 0], (x * weight).sum((1, 2, 3))], 1)  # noqa: E731
    x = jnp.full((4, *shape), 0.5)
    labels = two(x).argmax(1)
    x_adv = attacks.square(norm, eps, queries=100)(two, x, labels, KEY)
    assert (two(x_adv).argmax(1) != labels).any()


def test_a_tie_is_a_success_only_where_it_is_misclassified():
    """Scores that are multiples of a quarter, as low precision gives them, tie often."""

    def coarse(x):
        return jnp.round(4 * logits_fn(x)) / 4

    right = coarse(X).argmax(1) == LABELS
    x_adv = attacks.square("linf", 0.06, queries=60)(coarse, X, LABELS, KEY)
    moved = (x_adv != X).any((1, 2, 3))
    # What comes back changed is broken, and the search went on after ties that were none.
    assert (coarse(x_adv).argmax(1) != LABELS)[moved].all()
    fine = attacks.square("linf", 0.06, queries=60)(logits_fn, X, LABELS, KEY)
    broken = [
        (f(x).argmax(1) != LABELS)[right].mean() for f, x in ((coarse, x_adv), (logits_fn, fine))
    ]
    assert broken[0] >= broken[1] - 0.1
