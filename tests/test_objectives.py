"""Tests of the objectives against slow references: losses, AWP, the eps schedule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust import attacks, data, models, parallel
from jaxrobust.training import (
    Context,
    adversarial,
    create_state,
    guarded_n_fgsm,
    mart,
    sgd,
    standard,
    trades,
    train_step,
    with_awp,
)

SHAPE, BATCH, CLASSES = (2, 3, 1), 8, 4
RANDOM = np.random.default_rng(0)
W = RANDOM.normal(size=(6, CLASSES)).astype(np.float32)
IMAGES = RANDOM.uniform(0.2, 0.8, (BATCH, *SHAPE)).astype(np.float32)
LABELS = RANDOM.integers(0, CLASSES, BATCH).astype(np.int32)
BATCH_OF_8 = {"image": IMAGES, "label": LABELS, "index": np.arange(BATCH, dtype=np.int32)}


def logits_of(params, x):
    return x.reshape(len(x), -1) @ params["w"] + params["bias"]


# A linear net: closed forms hold, and it compiles in no time.
LINEAR = models.Model(
    init=lambda key, shape: {"params": {"w": jnp.asarray(W), "bias": 0.1 * jnp.arange(4.0)}},
    apply=lambda variables, x: logits_of(variables["params"], x),
    train=lambda variables, x, *, axis_name=None, dtype=None: (
        logits_of(variables["params"], x),
        {},
    ),
    config={},
)
PARAMS = LINEAR.init(None, SHAPE)["params"]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    # The net is tiny: nearly all of the time here is the compiler's.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def context(step=0, extra=None):
    keys = jax.random.split(jax.random.key(0), BATCH)
    apply = lambda x: logits_of(PARAMS, x)  # noqa: E731
    return Context(apply, keys, jnp.int32(step), extra or {}, None)


def run_steps(objective, count=1, *, rate=0.1, batches=None, mapping=None, **options):
    """(state, metrics per step) of a linear net."""
    optimizer = sgd(rate, momentum=0.0)
    step = train_step(LINEAR, optimizer, objective, **options)
    state = create_state(LINEAR, optimizer, jax.random.key(1), SHAPE, extra=objective.extra)
    run = jax.jit(step) if mapping is None else parallel.data_parallel(step, mapping=mapping)
    history = []
    for i in range(count):
        state, metrics = run(state, BATCH_OF_8 if batches is None else batches[i])
        history.append(jax.tree.map(float, metrics))
    return state, history


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_logits(x):
    return np.asarray(x, np.float64).reshape(len(x), -1) @ W + 0.1 * np.arange(4.0)


def assert_bit_identical(tree, other):
    chex.assert_trees_all_equal(tree, other)


# ---- losses -------------------------------------------------------------------------------------

X_ADV = np.clip(IMAGES + RANDOM.uniform(-0.3, 0.3, IMAGES.shape), 0, 1).astype(np.float32)


def own(p):
    return p[np.arange(BATCH), LABELS]


def others(p):
    return np.where(np.arange(CLASSES) == LABELS[:, None], -np.inf, p)


def slow_losses(name):
    p, q = softmax(numpy_logits(IMAGES)), softmax(numpy_logits(X_ADV))
    kl = (p * (np.log(p) - np.log(q))).sum(1)
    smooth = 0.9 * np.eye(CLASSES)[LABELS] + 0.1 / CLASSES
    return {
        "adversarial": -np.log(own(q)),
        "smoothed": -(smooth * np.log(q)).sum(1),
        "trades": -np.log(own(p)) + 6 * kl,
        "mart": -np.log(own(q)) - np.log(1.0001 - others(q).max(1)) + 5 * kl * (1 - own(p)),
    }[name]


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("adversarial", adversarial(attacks.fgsm(0.1))),
        ("adversarial", standard()),
        ("smoothed", adversarial(attacks.fgsm(0.1), label_smoothing=0.1)),
        ("smoothed", standard(label_smoothing=0.1)),
        ("trades", trades(attacks.linf_pgd(0.1))),
        ("mart", mart(attacks.linf_pgd(0.1))),
    ],
)
def test_losses_equal_a_slow_reference(name, objective):
    forward = lambda x: (logits_of(PARAMS, x), {"seen": x.sum()})  # noqa: E731
    losses, metrics, stats = objective.loss(
        context(), forward, jnp.asarray(IMAGES), jnp.asarray(X_ADV), jnp.asarray(LABELS)
    )
    np.testing.assert_allclose(losses, slow_losses(name), rtol=1e-4, atol=1e-5)
    right = (numpy_logits(X_ADV).argmax(1) == LABELS).mean()
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
    # TRADES and MART pass both halves at once, the others the adversarial images alone.
    both = IMAGES.sum() + X_ADV.sum()
    expected = both if name in ("trades", "mart") else X_ADV.sum()
    np.testing.assert_allclose(stats["seen"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adversarial", "trades", "mart"])
def test_the_attack_raises_the_methods_own_loss_with_the_examples_keys(name):
    seen = {}

    def attack(loss_fn, x, key, mask=None, args=()):
        seen["value"], seen["keys"] = loss_fn(jnp.asarray(X_ADV), *args), key
        return jnp.asarray(X_ADV)

    method = {"adversarial": adversarial, "trades": trades, "mart": mart}[name]
    x_adv, extra, metrics = method(attack).perturb(
        context(), jnp.asarray(IMAGES), jnp.asarray(LABELS)
    )
    p, q = softmax(numpy_logits(IMAGES)), softmax(numpy_logits(X_ADV))
    kl = (p * (np.log(p) - np.log(q))).sum(1)
    np.testing.assert_allclose(
        seen["value"], kl if name == "trades" else -np.log(own(q)), rtol=1e-4, atol=1e-5
    )
    assert (seen["keys"] == context().keys).all()
    np.testing.assert_array_equal(x_adv, X_ADV)
    assert (extra, metrics) == ({}, {})


def test_adversarial_training_at_eps_zero_is_standard_training_bit_for_bit():
    for attack in (attacks.linf_pgd(0.0, steps=2), attacks.n_fgsm(0.0)):
        plain = run_steps(standard(), 3, augment=data.flip)
        none = run_steps(adversarial(attack), 3, augment=data.flip)
        assert_bit_identical(plain[0].params, none[0].params)
        assert plain[1] == none[1]


@pytest.mark.parametrize(
    ("attack", "length"),
    [
        (attacks.fgsm(0.08), 0.08),
        (attacks.linf_pgd(0.08, steps=1, step_size=0.04, start="none"), 0.04),
        (attacks.n_fgsm(0.08, noise=0.0), 0.08),
    ],
)
def test_the_eps_schedule_scales_radius_and_step(attack, length):
    objective = adversarial(attack, eps_schedule=optax.linear_schedule(0.0, 1.0, 10))
    for step, factor in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        x_adv, _, _ = objective.perturb(context(step), jnp.asarray(IMAGES), jnp.asarray(LABELS))
        gradient = (softmax(numpy_logits(IMAGES)) - np.eye(CLASSES)[LABELS]) @ W.T
        expected = IMAGES + factor * length * np.sign(gradient).reshape(IMAGES.shape)
        np.testing.assert_allclose(x_adv, expected, atol=1e-6)


@pytest.mark.parametrize("method", [trades, mart])
def test_a_negative_beta_is_refused(method):
    with pytest.raises(ValueError, match="beta must be >= 0, got -1"):
        method(attacks.linf_pgd(0.1), -1.0)


@pytest.mark.parametrize("method", [adversarial, trades, mart])
def test_an_attack_on_a_classifier_is_refused(method):
    with pytest.raises(TypeError, match=r"training needs attacks called as .* which takes labels"):
        method(attacks.apgd_ce("linf", 0.1))


# ---- adversarial weight perturbation ------------------------------------------------------------


def slow_gradient(w, bias):
    """Of the mean cross entropy at the clean images."""
    x = IMAGES.reshape(BATCH, -1).astype(np.float64)
    error = (softmax(x @ w + bias) - np.eye(CLASSES)[LABELS]) / BATCH
    return x.T @ error, error.sum(0)


def test_awp_takes_the_gradient_at_moved_weights_and_updates_the_old_ones():
    gamma, rate = 0.3, 0.5
    state, _ = run_steps(with_awp(standard(), gamma), rate=rate)
    w, bias = W.astype(np.float64), 0.1 * np.arange(4.0)
    ascent, _ = slow_gradient(w, bias)
    moved = w + gamma * np.linalg.norm(w) * ascent / np.linalg.norm(ascent)
    at_moved = slow_gradient(moved, bias)
    np.testing.assert_allclose(state.params["w"], w - rate * at_moved[0], atol=1e-5)
    np.testing.assert_allclose(state.params["bias"], bias - rate * at_moved[1], atol=1e-5)
    assert np.abs(at_moved[0] - ascent).max() > 1e-3


def test_awp_without_strength_or_before_its_start_is_no_awp_bit_for_bit():
    plain = run_steps(adversarial(attacks.fgsm(0.1)), 3)
    for awp in (
        with_awp(adversarial(attacks.fgsm(0.1)), 0.0),
        with_awp(adversarial(attacks.fgsm(0.1)), 0.5, warmup_steps=3),
    ):
        state, history = run_steps(awp, 3)
        assert_bit_identical(state.params, plain[0].params)
        assert history == plain[1]
    begun = run_steps(with_awp(adversarial(attacks.fgsm(0.1)), 0.5, warmup_steps=2), 3)
    assert begun[1][1] == plain[1][1]
    assert begun[1][2]["loss"] > plain[1][2]["loss"]


def test_awp_stands_still_on_a_flat_loss():
    params = {"w": jnp.ones((2, 2))}
    zero = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    moved = with_awp(standard(), 0.5).move_weights(zero, params, jnp.int32(0))
    np.testing.assert_array_equal(moved["w"], params["w"])


def test_a_negative_gamma_is_refused():
    with pytest.raises(ValueError, match=r"gamma must be >= 0, got -0\.1"):
        with_awp(standard(), -0.1)


# ---- N-FGSM with a guard (more in test_guard.py) ------------------------------------------------


def test_an_unneeded_guard_changes_nothing():
    cheap = attacks.n_fgsm(0.1)
    plain = run_steps(adversarial(cheap), 4)
    guarded = run_steps(
        guarded_n_fgsm(cheap, attacks.linf_pgd(0.1, steps=2), check_every=2, gap=0.99), 4
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        guarded[0].params,
        plain[0].params,
    )
    assert all(m["rescue"] == 0 for m in guarded[1])


def test_trades_needs_a_start_off_the_image():
    with pytest.raises(ValueError, match=r"attack must start at random.*got start='none'"):
        trades(attacks.linf_pgd(0.1, start="none"))


def test_a_schedule_needs_an_attack_with_an_eps_of_its_own():
    ramp = optax.linear_schedule(0.0, 1.0, 10)
    several = attacks.worst_of(attacks.linf_pgd(0.1, 1), attacks.linf_pgd(0.2, 1))
    with pytest.raises(ValueError, match="eps_schedule needs an attack with an eps of its own"):
        adversarial(several, eps_schedule=ramp)
    adversarial(attacks.apgd("linf", 0.1, steps=2), eps_schedule=ramp)
