"""Tests of the objectives of smoothed training against slow references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust import attacks, models, parallel, smoothing
from jaxrobust.training import (
    Context,
    consistency,
    create_state,
    denoising,
    gaussian,
    sgd,
    smooth_adv,
    train_step,
)

SHAPE, BATCH, CLASSES, SIGMA = (2, 3, 1), 8, 4, 0.25
RANDOM = np.random.default_rng(0)
W = RANDOM.normal(size=(6, CLASSES)).astype(np.float32)
IMAGES = RANDOM.uniform(0.2, 0.8, (BATCH, *SHAPE)).astype(np.float32)
LABELS = RANDOM.integers(0, CLASSES, BATCH).astype(np.int32)
BATCH_OF_8 = {"image": IMAGES, "label": LABELS, "index": np.arange(BATCH, dtype=np.int32)}
COPIES = RANDOM.normal(size=(BATCH, 3, *SHAPE)).astype(np.float32)


def logits_of(params, x):
    return x.reshape(len(x), -1) @ params["w"]


def as_model(function, params):
    return models.Model(
        init=lambda key, shape: {"params": jax.tree.map(jnp.asarray, params)},
        apply=lambda variables, x: function(variables["params"], x),
        train=lambda variables, x, *, axis_name=None, dtype=None: (
            function(variables["params"], x),
            {},
        ),
        config={},
    )


LINEAR = as_model(logits_of, {"w": W})
DENOISER = as_model(lambda params, x: params["gain"] * x, {"gain": np.full((1, 1), 0.7)})


def classify(x):
    return logits_of({"w": W}, x)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    # The nets are tiny: nearly all of the time here is the compiler's.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def context(step=0):
    keys = jax.random.split(jax.random.key(0), BATCH)
    return Context(classify, keys, jnp.int32(step), {}, None)


def forward(x):
    return classify(x), {"seen": len(x)}


def perturbed(objective, step=0):
    x_adv, extra, metrics = objective.perturb(
        context(step), jnp.asarray(IMAGES), jnp.asarray(LABELS)
    )
    assert (extra, metrics) == ({}, {})
    return np.asarray(x_adv)


def log_softmax(x):
    z = x.reshape(*x.shape[:2], -1).astype(np.float64) @ W
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def own(log_p):
    return np.take_along_axis(log_p, LABELS[:, None, None], 2)[..., 0]


def slow_consistency(log_p, weight, entropy):
    total = np.zeros(BATCH)
    for i, rows in enumerate(log_p):
        q = np.exp(rows).mean(0)
        apart = np.mean([(q * (np.log(q) - row)).sum() for row in rows])
        fit = -np.mean([row[LABELS[i]] for row in rows])
        total[i] = fit + weight * apart - entropy * (q * np.log(q)).sum()
    return total


@pytest.mark.parametrize("name", ["gaussian", "smoothed", "smooth_adv", "consistency", "plain"])
def test_losses_equal_a_slow_reference(name):
    log_p = log_softmax(COPIES)
    smooth = 0.9 * np.eye(CLASSES)[LABELS] + 0.1 / CLASSES
    fit = -own(log_p).mean(1)
    objective, expected = {
        "gaussian": (gaussian(SIGMA, samples=3), fit),
        "smoothed": (
            gaussian(SIGMA, samples=3, label_smoothing=0.1),
            -(smooth[:, None] * log_p).sum(2).mean(1),
        ),
        "smooth_adv": (smooth_adv(attacks.l2_pgd(0.1), SIGMA, samples=3), fit),
        "consistency": (
            consistency(SIGMA, samples=3, weight=7.0, entropy=0.3),
            slow_consistency(log_p, 7.0, 0.3),
        ),
        "plain": (consistency(SIGMA, samples=3, weight=0.0, entropy=0.0), fit),
    }[name]
    got, metrics, stats = objective.loss(
        context(), forward, jnp.asarray(IMAGES), jnp.asarray(COPIES), jnp.asarray(LABELS)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    right = (np.exp(log_p).mean(1).argmax(1) == LABELS).mean()
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
    assert stats == {"seen": 3 * BATCH}  # all copies in one pass


def test_copies_are_the_image_and_gaussian_noise_of_its_own():
    for objective in (gaussian(SIGMA, samples=200), consistency(SIGMA, samples=200)):
        noise = (perturbed(objective) - IMAGES[:, None]) / SIGMA
        assert noise.shape == (BATCH, 200, *SHAPE)
        rows = noise.reshape(BATCH * 200, 6)
        assert abs(rows.mean()) < 4 / np.sqrt(rows.size)
        assert abs(rows.std() - 1) < 4 / np.sqrt(2 * rows.size)
        assert len(np.unique(rows[:, 0])) == len(rows)


def test_smooth_adv_with_one_step_goes_up_the_smoothed_loss_with_the_noise_held_fixed():
    eps = 0.3
    attack = attacks.l2_pgd(eps, steps=1, step_size=eps, start="none", bounds=None)
    copies = perturbed(smooth_adv(attack, SIGMA, samples=3))
    noise = copies - copies.mean(1, keepdims=True)
    plain = perturbed(gaussian(SIGMA, samples=3))
    drawn = plain - IMAGES[:, None]
    # The same noise as in Gaussian training of the same key, before and after the attack.
    np.testing.assert_allclose(noise, drawn - drawn.mean(1, keepdims=True), atol=1e-5)
    # d/dx of -log(mean_j softmax_y(z(x + noise_j))) for linear z, by hand.
    p = np.exp(log_softmax(plain))
    share = own(p) / own(p).sum(1, keepdims=True)
    rows = (p - np.eye(CLASSES)[LABELS][:, None]) @ W.T
    gradient = (share[..., None] * rows).sum(1)
    delta = (copies - plain)[:, 0].reshape(BATCH, -1)
    expected = eps * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    np.testing.assert_allclose(delta, expected, atol=1e-4)


def test_smooth_adv_at_eps_zero_is_gaussian_training_bit_for_bit():
    still = smooth_adv(attacks.l2_pgd(0.0, steps=2), SIGMA, samples=2)
    np.testing.assert_array_equal(perturbed(still), perturbed(gaussian(SIGMA, samples=2)))


def test_the_eps_schedule_scales_the_attack():
    ramp = optax.linear_schedule(0.0, 1.0, 10)
    attack = attacks.l2_pgd(0.3, steps=1, step_size=0.3, start="none", bounds=None)
    objective = smooth_adv(attack, SIGMA, samples=2, eps_schedule=ramp)
    plain = perturbed(gaussian(SIGMA, samples=2))
    for step, length in ((0, 0.0), (5, 0.15), (10, 0.3)):
        delta = (perturbed(objective, step) - plain)[:, 0].reshape(BATCH, -1)
        np.testing.assert_allclose(np.linalg.norm(delta, axis=1), length, atol=1e-5)


def test_the_denoisers_loss_is_its_error_and_its_agreement_with_the_frozen_classifier():
    restored = 0.7 * IMAGES + 0.1
    mse = ((restored - IMAGES) ** 2).reshape(BATCH, -1).mean(1)
    log_p = log_softmax(restored[:, None])[:, 0]
    answer = (IMAGES.reshape(BATCH, -1) @ W).argmax(1)
    agreement = -log_p[np.arange(BATCH), answer]
    for weights, expected in (
        ({}, mse),
        ({"mse": 0.0, "stability": 1.0}, agreement),
        ({"mse": 2.0, "stability": 0.5}, 2 * mse + 0.5 * agreement),
    ):
        images = jnp.asarray(IMAGES)
        got, metrics, _ = denoising(SIGMA, classify, **weights).loss(
            context(), lambda x: (0.7 * x + 0.1, {}), images, images, LABELS
        )
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        right = (log_p.argmax(1) == LABELS).mean()
        np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)


def steps_of(objective, model, count=2, mesh=None):
    """(params, metrics of the last step)."""
    optimizer = sgd(0.1, momentum=0.0)
    step = train_step(model, optimizer, objective)
    state = create_state(model, optimizer, jax.random.key(1), SHAPE)
    run = jax.jit(step) if mesh is None else parallel.data_parallel(step, mesh)
    for _ in range(count):
        state, metrics = run(state, BATCH_OF_8)
    return state.params, jax.tree.map(float, metrics)


@pytest.mark.parametrize("name", ["consistency", "smooth_adv"])
def test_training_on_eight_devices_equals_training_on_one(name):
    objective = {
        "consistency": consistency(SIGMA),
        "smooth_adv": smooth_adv(attacks.l2_pgd(0.2, steps=1), SIGMA),
    }[name]
    alone = steps_of(objective, LINEAR)
    spread = steps_of(objective, LINEAR, mesh=parallel.data_mesh(8))
    np.testing.assert_allclose(alone[0]["w"], spread[0]["w"], atol=1e-5)
    assert alone[1] == pytest.approx(spread[1], abs=1e-5)


def test_a_denoiser_learns_to_shrink_what_is_mostly_noise():
    # The best gain on pixels x with noise is E x^2 / (E x^2 + sigma^2).
    objective = denoising(SIGMA, classify)
    optimizer = sgd(1.0, momentum=0.0)
    step = jax.jit(train_step(DENOISER, optimizer, objective))
    state = create_state(DENOISER, optimizer, jax.random.key(1), SHAPE)
    gains = []
    for _ in range(200):
        state, metrics = step(state, BATCH_OF_8)
        gains.append(float(state.params["gain"][0, 0]))
    best = (IMAGES**2).mean() / ((IMAGES**2).mean() + SIGMA**2)
    assert np.mean(gains[50:]) == pytest.approx(best, abs=0.02)
    assert 0 <= float(metrics["accuracy"]) <= 1


def test_noise_in_training_is_the_smoothing_noise_of_the_examples_keys():
    keys = jax.vmap(jax.random.fold_in, (0, None))(context().keys, 0)
    drawn = smoothing.noise(keys, IMAGES.shape, sigma=SIGMA, samples=2)
    np.testing.assert_allclose(
        perturbed(gaussian(SIGMA, samples=2)), IMAGES[:, None] + drawn, atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian(0.0), "sigma must be > 0, got 0"),
        (lambda: gaussian(0.5, samples=0), "samples must be a whole number >= 1, got 0"),
        (lambda: consistency(0.5, samples=1), "samples must be a whole number >= 2, got 1"),
        (lambda: consistency(0.5, weight=-1.0), "weight must be >= 0, got -1"),
        (lambda: consistency(0.5, entropy=-1.0), "entropy must be >= 0, got -1"),
        (lambda: smooth_adv(attacks.l2_pgd(0.1), -1.0), "sigma must be > 0, got -1"),
        (lambda: denoising(0.5, classify, mse=-1.0), "mse must be >= 0, got -1"),
        (lambda: denoising(0.5, classify, mse=0.0), "mse or stability must be > 0, got 0.0"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
