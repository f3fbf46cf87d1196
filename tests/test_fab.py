"""FAB: agreement with the reference, closed forms, and the smallest perturbation over rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, balls
from tests.test_apgd import BATCH, GOLDENS, KEY, LABELS, NORMS, STEPS, TARGETS, X, logits_fn


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["fab", "fab_t"])
def test_the_smallest_perturbations_are_those_of_the_reference(norm, kind):
    if kind == "fab":
        attack = attacks.fab(norm, steps=STEPS)
    else:
        attack = attacks.fab_t(norm, steps=STEPS, targets=1)
    x_adv = attack(logits_fn, X, LABELS, KEY)
    assert (logits_fn(x_adv).argmax(1) != LABELS).all()
    ours = balls.norms(x_adv - X, norm)
    theirs = balls.norms(jnp.asarray(GOLDENS[f"{kind}_{norm}"]) - X, norm)
    # Which of two nearly equal boundaries comes first may hang on rounding.
    assert np.isclose(ours, theirs, rtol=1e-3).mean() > 0.9
    np.testing.assert_allclose(jnp.median(ours), jnp.median(theirs), rtol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_classifier_it_finds_the_nearest_point_of_the_boundary(norm):
    weight = jnp.asarray(GOLDENS["noise"][0])
    inside = 0.45 + 0.1 * X
    linear = lambda x: jnp.stack([0 * x[:, 0, 0, 0], (x * weight).sum((1, 2, 3)) - 0.3], 1)  # noqa: E731
    labels = linear(inside).argmax(1)
    x_adv = attacks.fab(norm, steps=20)(linear, inside, labels, KEY)
    dual = {
        "linf": jnp.abs(weight).sum(),
        "l2": jnp.sqrt(jnp.square(weight).sum()),
        "l1": jnp.abs(weight).max(),
    }[norm]
    gap = jnp.abs(linear(inside)[:, 1])
    sizes = balls.norms(x_adv - inside, norm)
    # An overshoot of 5 % finds the other side; steps back by 10 % look for it from inside.
    assert (sizes >= gap / dual - 1e-6).all()
    assert (sizes <= 1.06 * gap / dual).all()


def test_inside_eps_it_stops_at_the_first_success_and_else_returns_the_image():
    sizes = balls.norms(attacks.fab("l2", steps=STEPS)(logits_fn, X, LABELS, KEY) - X, "l2")
    eps = float(jnp.median(sizes))
    x_adv = attacks.fab("l2", eps, steps=STEPS)(logits_fn, X, LABELS, KEY)
    moved = np.asarray((x_adv != X).any((1, 2, 3)))
    np.testing.assert_array_equal(moved, np.asarray(sizes <= eps))
    assert balls.norms(x_adv - X, "l2").max() <= eps * (1 + 1e-6)


def test_more_targets_never_make_the_smallest_perturbation_larger():
    # So many that both runs fill whole batches: those of another size round differently, and a
    # walk along the boundary remembers it.
    rows = np.resize(np.arange(len(X)), 200)
    x, labels = X[rows], LABELS[rows]
    one, all_ = (
        balls.norms(
            attacks.fab_t("linf", targets=n, steps=15)(logits_fn, x, labels, KEY) - x, "linf"
        )
        for n in (1, 4)
    )
    assert (all_ <= one + 1e-7).all()
    assert (all_ < one - 1e-4).any()


def test_jit_equals_no_jit():
    attack = attacks.fab_t("l2", 0.2, targets=2, steps=10)
    traced = jax.jit(lambda x, y: attack(logits_fn, x, y, KEY))(X, LABELS)
    np.testing.assert_allclose(attack(logits_fn, X, LABELS, KEY), traced, atol=1e-6)


def test_masks_and_maps_are_refused():
    with pytest.raises(ValueError, match="no mask and no map"):
        attacks.fab("linf", 0.1)(logits_fn, X, LABELS, KEY, mask=jnp.ones((5, 4, 2)))
    with pytest.raises(ValueError, match="no mask and no map"):
        attacks.fab("linf", jnp.ones((BATCH, 5, 4, 2)))(logits_fn, X, LABELS, KEY)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="targets must be a whole number >= 1, got 0"):
        attacks.fab_t("linf", targets=0)
    with pytest.raises(ValueError, match="restarts must be a whole number >= 1, got 0"):
        attacks.fab("linf", restarts=0)
    with pytest.raises(ValueError, match=r"restarts must be 1 without eps, .* got 5"):
        attacks.fab("linf", restarts=5)
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        attacks.fab("linf", -1.0)


def test_targets_are_the_likeliest_wrong_classes():
    assert (TARGETS != LABELS).all()
    x_adv = attacks.fab_t("linf", targets=1, steps=STEPS)(logits_fn, X, LABELS, KEY)
    assert (logits_fn(x_adv).argmax(1) == TARGETS).mean() > 0.8
