"""Bad input to attacks gives one clear error each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks

KEY = jax.random.key(0)
X = jnp.full((2, 3, 3, 1), 0.5)
LABELS = jnp.array([0, 1])


def loss_fn(x):
    return x.sum((1, 2, 3))


def logits_fn(x):
    return x.sum((2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attacks.linf_pgd(-0.1), "eps must be >= 0, got -0.1"),
        (lambda: attacks.linf_pgd(float("nan")), "eps must be >= 0, got nan"),
        (lambda: attacks.l2_pgd(np.array([0.1, -0.2])), "eps must be >= 0, got -0.2"),
        (lambda: attacks.l2_pgd(jnp.array([0.1, jnp.nan])), "eps must be >= 0, got nan"),
        (lambda: attacks.l1_pgd(1.0, step_size=-1.0), "step_size must be >= 0, got -1"),
        (lambda: attacks.l2_pgd(1.0, momentum=-0.5), "momentum must be >= 0, got -0.5"),
        (lambda: attacks.linf_pgd(0.1, 0), "steps must be a whole number >= 1, got 0"),
        (lambda: attacks.linf_pgd(0.1, True), "steps must be a whole number >= 1, got True"),
        (lambda: attacks.pgd("l7", 0.1), r"norm must be one of .*got 'l7'"),
        (lambda: attacks.fgsm(0.1, "l7"), r"norm must be one of .*got 'l7'"),
        (lambda: attacks.linf_pgd(0.1, start="warm"), r"start must be one of .*got 'warm'"),
        (lambda: attacks.linf_pgd(0.1, loop="while"), r"loop must be one of .*got 'while'"),
        (
            lambda: attacks.linf_pgd(0.1, bounds=(1.0, 0.0)),
            r"bounds must be \(low, high\) with low < high, got \(1.0, 0.0\)",
        ),
        (lambda: attacks.n_fgsm(-0.1), "eps must be >= 0, got -0.1"),
        (lambda: attacks.n_fgsm(0.1, noise=-1.0), "noise must be >= 0, got -1"),
        (lambda: attacks.n_fgsm(0.1, start="none"), "start must be .*, got 'none'"),
        (lambda: attacks.n_fgsm(0.1, step_size=-1.0), "step_size must be >= 0, got -1"),
        (lambda: attacks.restarts(attacks.fgsm(0.1), 0), "count must be >= 1, got 0"),
        (lambda: attacks.multi_targeted(attacks.fgsm(0.1), 0), "targets must be >= 1, got 0"),
        (lambda: attacks.worst_of(), "worst_of needs at least one attack, got none"),
    ],
)
def test_an_attack_of_bad_numbers_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


PGD = attacks.linf_pgd(0.1, 2)
BATCHES = [
    (X[0, 0, 0], ValueError, r"x must be a batch \[b, ...\] of rank >= 2, got shape \(1,\)"),
    (jnp.ones((2, 3, 3, 1), jnp.uint8), TypeError, r"x must be floating point in .*got uint8"),
    (255 * X, ValueError, r"x must lie in \(0.0, 1.0\), got values in \[127.5, 127.5\]"),
    (X - 0.6, ValueError, r"x must lie in \(0.0, 1.0\), got values in \[-0.1, -0.1\]"),
    (X.at[1].set(jnp.nan), ValueError, r"x must lie in .*got values in \[nan, nan\]"),
    (X.at[1].set(jnp.inf), ValueError, r"x must lie in .*got values in \[0.5, inf\]"),
]


@pytest.mark.parametrize(("x", "error", "message"), BATCHES)
def test_a_bad_batch_is_refused_by_every_attack(x, error, message):
    for attack in (PGD, attacks.n_fgsm(0.1), attacks.restarts(PGD, 2), attacks.worst_of(PGD)):
        with pytest.raises(error, match=message):
            attack(loss_fn, x, KEY)
    for attack in (attacks.targeted(PGD), attacks.multi_targeted(PGD)):
        with pytest.raises(error, match=message):
            attack(logits_fn, x, LABELS, KEY)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (jnp.array([0, 3]), ValueError, r"labels must lie in \[0, 3\), got values in \[0, 3\]"),
        (jnp.array([-1, 2]), ValueError, r"labels must lie in \[0, 3\), got values in \[-1, 2\]"),
        (jnp.array([0.0, 1.0]), TypeError, "labels must be integers, got float32"),
        (jnp.array([0, 1, 2]), ValueError, r"labels must have shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_labels_are_refused(labels, error, message):
    for attack in (attacks.targeted(PGD), attacks.multi_targeted(PGD)):
        with pytest.raises(error, match=message):
            attack(logits_fn, X, labels, KEY)


def test_a_model_of_one_class_has_no_other_to_be_driven_to():
    with pytest.raises(ValueError, match="logits of at least 2 classes, got 1"):
        attacks.multi_targeted(PGD)(lambda x: logits_fn(x)[:, :1], X, 0 * LABELS, KEY)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (None, TypeError, r"key must be typed, as jax.random.key\(0\) makes it, got None"),
        (jnp.zeros(2, jnp.uint32), TypeError, r"key must be typed, as jax.random.key\(0\)"),
        (jax.random.split(KEY, 3), ValueError, r"one per example \(2,\), got \(3,\)"),
    ],
)
def test_a_bad_key_is_refused_where_one_is_needed(key, error, message):
    for attack in (PGD, attacks.restarts(PGD, 2)):
        if key is not None or attack is PGD:  # the wrapper's annotation refuses None by itself
            with pytest.raises(error, match=message):
                attack(loss_fn, X, key)
    if key is None:
        assert attacks.fgsm(0.1)(loss_fn, X).shape == X.shape
        assert PGD(loss_fn, X, delta=jnp.zeros_like(X)).shape == X.shape


@pytest.mark.parametrize("loss", [lambda x: x.sum(), lambda x: x.sum(3)])
def test_a_loss_that_is_not_one_number_per_example_is_refused(loss):
    for attack in (PGD, attacks.n_fgsm(0.1)):
        with pytest.raises(ValueError, match=r"loss_fn must return one loss per example, \(2,\)"):
            attack(loss, X, KEY)


def test_shapes_that_do_not_fit_the_batch_are_named():
    wrong = jnp.ones((3, 3))
    for name in ("eps", "step_size"):
        attack = dataclasses.replace(PGD, **{name: wrong})
        with pytest.raises(ValueError, match=rf"{name} must be a number.*got shape \(3, 3\)"):
            attack(loss_fn, X, KEY)
    with pytest.raises(ValueError, match=r"mask must be a number.*got shape \(3, 3\)"):
        PGD(loss_fn, X, KEY, wrong)


def test_the_stepped_loop_is_refused_inside_jit():
    attack = dataclasses.replace(PGD, loop="stepped")
    with pytest.raises(ValueError, match="loop='stepped' runs from the host"):
        jax.jit(lambda x: attack(loss_fn, x, KEY))(X)
