"""EOT, BPDA, transfer, latent and feature-matching attacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, losses
from jaxrobust.keys import fold
from tests.test_apgd import BATCH, GOLDENS, KEY, LABELS, X, logits_fn

KEYS = attacks.example_keys(jax.random.key(5), BATCH)
PGD = attacks.linf_pgd(0.03, 20)


def ce(x, labels):
    return losses.cross_entropy(logits_fn(x), labels)


def noisy_ce(x, keys, labels):
    """Noise on the logits that is zero on average."""
    noise = jax.vmap(lambda k: jax.random.normal(k, (5,)))(keys)
    return ce(x, labels) + noise.sum(1)


def test_the_expected_loss_is_the_mean_over_draws_and_so_is_its_gradient():
    expected = attacks.eot(noisy_ce, draws=400)(X, KEYS, LABELS)
    np.testing.assert_allclose(expected, ce(X, LABELS), atol=6 * np.sqrt(5 / 400))
    exact = jax.grad(lambda x: ce(x, LABELS).sum())(X)
    drawn = jax.grad(lambda x: attacks.eot(noisy_ce, draws=3)(x, KEYS, LABELS).sum())(X)
    np.testing.assert_allclose(drawn, exact, atol=1e-5)


def test_draws_differ_from_point_to_point_and_repeat_at_the_same_one():
    once = attacks.eot(lambda x, keys: jax.vmap(lambda k: jax.random.normal(k))(keys), draws=1)
    assert (once(X, KEYS) == once(X, KEYS)).all()
    assert (once(X, KEYS) != once(X + 0.01, KEYS)).all()


def shattered(x):
    """Sixteen grey levels: the gradient is zero almost everywhere."""
    return jnp.round(x * 15) / 15


def test_straight_through_breaks_what_exact_gradients_cannot():
    def attacked(preprocess):
        loss_fn = lambda x: ce(preprocess(x), LABELS)  # noqa: E731
        return PGD(loss_fn, X, KEY)

    wrong = lambda x: float((logits_fn(shattered(x)).argmax(1) != LABELS).mean())  # noqa: E731
    through = attacks.bpda(shattered)
    np.testing.assert_allclose(through(X), shattered(X), atol=1e-6)
    assert wrong(attacked(through)) > wrong(attacked(shattered)) + 0.1
    assert attacks.bpda(shattered) == through  # so that an attack on it compiles once


def test_a_backward_of_its_own_gives_the_gradient():
    tripled = attacks.bpda(shattered, lambda x: 3 * x)
    np.testing.assert_allclose(tripled(X), shattered(X), atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: tripled(x).sum())(X), 3 * jnp.ones_like(X))
    with pytest.raises(ValueError, match="backward must return what forward returns"):
        attacks.bpda(shattered, lambda x: x[:, :1])(X)


def shifted(x):
    return logits_fn(x + 0.15)


def darkened(x):
    return logits_fn(x - 0.15)


def masked(x):
    return jax.lax.stop_gradient(logits_fn(x))


def test_transfer_keeps_the_surrogate_that_the_target_takes_worst():
    both = attacks.transfer(PGD, shifted, darkened)(masked, X, LABELS, KEYS)
    singles = []
    for i, surrogate in enumerate((shifted, darkened)):
        own = lambda x, y, f=surrogate: losses.margin(f(x), y)  # noqa: E731
        singles.append(PGD(own, X, fold(KEYS, i), args=(LABELS,)))
    scores = np.stack([losses.margin(logits_fn(x), LABELS) for x in singles])
    best = scores.argmax(0)
    assert 0.1 < best.mean() < 0.9  # each surrogate wins some rows
    np.testing.assert_allclose(both, np.stack(singles)[best, np.arange(BATCH)], atol=1e-6)
    assert scores.max(0).mean() > losses.margin(logits_fn(X), LABELS).mean()


def test_transfer_names_what_is_wrong():
    with pytest.raises(ValueError, match="at least one surrogate"):
        attacks.transfer(PGD)
    attack = attacks.transfer(PGD, shifted, darkened)
    with pytest.raises(ValueError, match="one entry per surrogate, 2, got 1"):
        attack(masked, X, LABELS, KEY, surrogate_args=((),))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\)"):
        attack(masked, X, LABELS + 5, KEY)


def test_transfer_is_a_value_whose_radius_is_no_part_of_the_program():
    traces = []

    def counted(x):
        traces.append(1)
        return shifted(x)

    make = lambda eps: attacks.transfer(attacks.linf_pgd(eps, 2), counted)  # noqa: E731
    assert make(0.1) == make(0.1)
    assert jax.tree.leaves(make(0.1)) == [0.1]
    run = jax.jit(lambda attack: attack(masked, X, LABELS, KEY))
    small, large = run(make(0.01)), run(make(0.03))
    assert jnp.abs(small - X).max() <= 0.01 + 1e-6 < jnp.abs(large - X).max()
    first = len(traces)
    run(make(0.02))
    assert len(traces) == first


def encode(x):
    return jnp.tanh(2 * (x.reshape(x.shape[0], -1) - 0.5) @ GOLDENS["first"])


def test_a_latent_attack_moves_the_embedding_further_than_noise():
    clean = encode(X)
    away = attacks.latent_distance(encode)
    x_adv = PGD(away, X, KEY, args=(clean,))
    noise = jnp.clip(X + 0.03 * jnp.sign(GOLDENS["noise"]), 0, 1)
    assert (away(x_adv, clean) > away(noise, clean)).mean() > 0.95
    np.testing.assert_allclose(away(X, clean), 0, atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: away(x, clean).sum())(X)).all()


def test_feature_matching_reaches_for_another_image():
    target = encode(X[::-1])
    match = attacks.feature_match(encode)
    x_adv = attacks.linf_pgd(0.2, 40)(match, X, KEY, args=(target,))
    assert (match(x_adv, target) > match(X, target)).all()
    np.testing.assert_allclose(match(X[::-1], target), 0, atol=1e-9)


def test_draws_must_be_counted():
    with pytest.raises(ValueError, match="draws must be a whole number >= 1, got 0"):
        attacks.eot(ce, draws=0)
