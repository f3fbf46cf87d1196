"""HopSkipJump sees classes alone, and still ends near the nearest boundary."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.attacks import example_keys, hop_skip_jump, nearest

BATCH, IMAGE = 6, (3, 2, 2)
DIM = int(np.prod(IMAGE))
KEY = jax.random.key(0)
X = 0.5 + 0.1 * jax.random.normal(KEY, (BATCH, *IMAGE))
WEIGHTS = jax.random.normal(jax.random.key(1), (DIM, 2))
DUAL = {"linf": 1, "l2": 2}
ATTACKS = {norm: hop_skip_jump(norm, 12, evaluations=40) for norm in ("linf", "l2")}


def logits_fn(x, weights):
    """Classes alone: one or zero, with no gradient."""
    return jax.nn.one_hot(((x.reshape(len(x), -1) - 0.5) @ weights).argmax(1), weights.shape[1])


def predicted(x, weights=WEIGHTS):
    return np.array(logits_fn(x, weights).argmax(1))


@pytest.mark.parametrize("norm", ATTACKS)
def test_a_linear_boundary_is_found_from_classes_alone(norm):
    flat = np.asarray(X, np.float64).reshape(BATCH, -1) - 0.5
    normal = np.asarray(WEIGHTS[:, 0] - WEIGHTS[:, 1])
    least = np.abs(flat @ normal) / np.linalg.norm(normal, ord=DUAL[norm])
    x_adv = ATTACKS[norm](logits_fn, X, predicted(X), KEY, args=(WEIGHTS,))
    assert np.all(predicted(x_adv) != predicted(X))
    excess = np.asarray(nearest.norms(x_adv - X, norm)) / least - 1
    assert np.all(excess > -1e-3)  # rounding of x_adv - x
    assert np.median(excess) < 0.03  # 12 steps of noisy normals
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_rows_stand_alone_and_masked_and_misclassified_ones_stay():
    labels = predicted(X)
    labels[1] = 1 - labels[1]
    mask = jnp.ones(IMAGE).at[0].set(0)
    keys = example_keys(KEY, BATCH)
    x = X.at[0, 0].set(-0.0)
    attack = ATTACKS["l2"]
    whole = attack(logits_fn, x, labels, KEY, mask, (WEIGHTS,))
    part = attack(logits_fn, x[3:5], labels[3:5], keys[3:5], mask, (WEIGHTS,))
    np.testing.assert_allclose(part, whole[3:5], atol=1e-5)
    assert whole[1].tobytes() == x[1].tobytes()
    assert whole[:, 0].tobytes() == x[:, 0].tobytes()
    changed = np.asarray((whole != x).any((1, 2, 3)))
    assert changed.sum() >= BATCH - 2
    assert np.all((predicted(whole) != labels)[changed])
    other = attack(logits_fn, x, labels, jax.random.key(7), mask, (WEIGHTS,))
    assert np.any(other != whole)


def test_starts_of_ones_own_and_targets():
    weights = jax.random.normal(jax.random.key(2), (DIM, 4))
    labels = predicted(X, weights)
    targets = (labels + 1) % 4
    draws = jax.random.uniform(KEY, (200, *IMAGE))
    classes = predicted(draws, weights)
    starts = jnp.stack([draws[np.flatnonzero(classes == t)[0]] for t in targets])
    attack = hop_skip_jump("l2", 4, evaluations=20)
    x_adv = attack(logits_fn, X, labels, KEY, args=(weights,), targets=targets, starts=starts)
    assert np.all(predicted(x_adv, weights) == targets)
    size = lambda x: np.asarray(nearest.norms(x - X, "l2"))  # noqa: E731
    assert np.all(size(x_adv) < size(starts))
    x_adv = attack(logits_fn, X, labels, KEY, args=(weights,), targets=targets, starts=X)
    assert x_adv.tobytes() == X.tobytes()  # no start, no result


def test_batches_of_none_and_no_boundary_at_all():
    attack = ATTACKS["l2"]
    assert attack(logits_fn, X[:0], np.zeros(0, int), KEY, args=(WEIGHTS,)).shape == (0, *IMAGE)
    constant = lambda x, weights: jnp.ones((len(x), 1)) * jnp.array([1.0, 0]) + 0 * x.sum()  # noqa: E731
    x_adv = attack(constant, X, np.zeros(BATCH, int), KEY, args=(WEIGHTS,))
    assert x_adv.tobytes() == X.tobytes()


def test_attacks_are_values():
    for attack in ATTACKS.values():
        assert dataclasses.replace(attack) == attack
        assert json.loads(json.dumps(dataclasses.asdict(attack)))["steps"] == 12


WRONG = {
    "norm must be one of .*got 'l1'": lambda: hop_skip_jump("l1"),
    "steps must be a whole number >= 1, got 0": lambda: hop_skip_jump(steps=0),
    "evaluations must be a whole number >= 1, got 0": lambda: hop_skip_jump(evaluations=0),
    "gamma must be > 0, got 0": lambda: hop_skip_jump(gamma=0.0),
    "bounds must be finite": lambda: hop_skip_jump(bounds=None),
    "starts must have x's shape": lambda: ATTACKS["l2"](
        logits_fn, X, predicted(X), KEY, args=(WEIGHTS,), starts=X[:2]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def test_a_key_is_needed():
    with pytest.raises(TypeError, match="key must be typed"):
        ATTACKS["l2"](logits_fn, X, predicted(X), args=(WEIGHTS,))
