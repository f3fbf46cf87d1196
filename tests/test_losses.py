"""Tests of the per-example losses: slow numpy twins, degenerate points, invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrobust import losses

# Float32 results against float64 twins: a few hundred roundings of 6e-8.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
BATCH, CLASSES, DIM = 8, 5, 6


def drawn(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


LOGITS, LOGITS_ADV = drawn(BATCH, CLASSES, seed=1, scale=3), drawn(BATCH, CLASSES, seed=2, scale=3)
LABELS = np.array([0, 1, 2, 3, 4, 0, 1, 1], np.int32)
TARGETS = np.array([1, 0, 4, 2, 3, 4, 0, 3], np.int32)
LOGITS[np.arange(3), LABELS[:3]] += 8  # Some examples are classified correctly.
Z1, Z2 = drawn(BATCH, DIM, seed=3), drawn(BATCH, DIM, seed=4, scale=5)


# Slow twins: one example, one class, one pair at a time, in float64.


def slow_probabilities(z):
    e = [np.exp(float(v) - float(max(z))) for v in z]
    return [v / sum(e) for v in e]


def slow_cross_entropy(z, y, smoothing=0.0):
    p = slow_probabilities(z)
    mean = sum(-np.log(v) for v in p) / len(p)
    return (1 - smoothing) * -np.log(p[y]) + smoothing * mean


def slow_margin(z, y):
    return max(float(v) for k, v in enumerate(z) if k != y) - float(z[y])


def slow_dlr(z, y):
    order = sorted((float(v) for v in z), reverse=True)
    return slow_margin(z, y) / (order[0] - order[2] + 1e-12)


def slow_targeted_dlr(z, y, t):
    order = sorted((float(v) for v in z), reverse=True)
    return -(float(z[y]) - float(z[t])) / (order[0] - (order[2] + order[3]) / 2 + 1e-12)


def slow_kl(z, z_adv):
    p, q = slow_probabilities(z), slow_probabilities(z_adv)
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))


def slow_mart_bce(z_adv, y):
    q = slow_probabilities(z_adv)
    wrong = max(v for k, v in enumerate(q) if k != y)
    return -np.log(q[y]) - np.log(1.0001 - wrong + 1e-12)


def slow_mart_kl(z, z_adv, y):
    return slow_kl(z, z_adv) * (1.0000001 - slow_probabilities(z)[y])


def slow_cosine(u, v):
    u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
    return u @ v / np.sqrt((u @ u) * (v @ v))


def slow_info_nce(anchors, positives, t=0.1):
    return np.array(
        [
            -np.log(
                np.exp(slow_cosine(u, positives[i]) / t)
                / sum(np.exp(slow_cosine(u, v) / t) for v in positives)
            )
            for i, u in enumerate(anchors)
        ]
    )


def slow_adversarial_contrastive(adversarial, clean, t=0.5):
    losses = []
    for i, (a, z) in enumerate(zip(adversarial, clean, strict=True)):
        others = [np.exp(slow_cosine(z, w) / t) for j, w in enumerate(clean) if j != i]
        losses.append(-np.log(np.exp(slow_cosine(a, z) / t) / sum(others)))
    return np.array(losses)


def slow_supervised_contrastive(views, labels, t=0.1):
    rows = [(i, u) for view in views for i, u in enumerate(view)]
    result = np.zeros(len(labels))
    for a, (i, u) in enumerate(rows):
        others = [(j, v) for b, (j, v) in enumerate(rows) if b != a]
        total = sum(np.exp(slow_cosine(u, v) / t) for _, v in others)
        terms = [slow_cosine(u, v) / t - np.log(total) for j, v in others if labels[j] == labels[i]]
        if terms:
            result[i] -= sum(terms) / len(terms) / len(views)
    return result


def slow_nt_xent(z1, z2, t=0.5):
    n, rows = len(z1), [*z1, *z2]
    result = np.zeros(n)
    for a in range(2 * n):
        twin = (a + n) % (2 * n)
        total = sum(np.exp(slow_cosine(rows[a], rows[b]) / t) for b in range(2 * n) if b != a)
        result[a % n] -= (slow_cosine(rows[a], rows[twin]) / t - np.log(total)) / 2
    return result


def slow_clip_loss(images, texts, scale=1 / 0.07):
    return (slow_info_nce(images, texts, 1 / scale) + slow_info_nce(texts, images, 1 / scale)) / 2


def by_row(slow):
    return lambda *rows: np.array([slow(*row) for row in zip(*rows, strict=True)])


# name: (loss of the differentiable arguments, its twin, the arguments)
CLASSIFICATION = {
    "cross_entropy": (
        lambda z: losses.cross_entropy(z, jnp.asarray(LABELS)),
        lambda z: by_row(slow_cross_entropy)(z, LABELS),
        (LOGITS,),
    ),
    "smoothed_cross_entropy": (
        lambda z: losses.cross_entropy(z, jnp.asarray(LABELS), label_smoothing=0.1),
        lambda z: by_row(lambda r, y: slow_cross_entropy(r, y, 0.1))(z, LABELS),
        (LOGITS,),
    ),
    "margin": (
        lambda z: losses.margin(z, jnp.asarray(LABELS)),
        lambda z: by_row(slow_margin)(z, LABELS),
        (LOGITS,),
    ),
    "dlr": (
        lambda z: losses.dlr(z, jnp.asarray(LABELS)),
        lambda z: by_row(slow_dlr)(z, LABELS),
        (LOGITS,),
    ),
    "targeted_dlr": (
        lambda z: losses.targeted_dlr(z, jnp.asarray(LABELS), jnp.asarray(TARGETS)),
        lambda z: by_row(slow_targeted_dlr)(z, LABELS, TARGETS),
        (LOGITS,),
    ),
    "trades_kl": (losses.trades_kl, by_row(slow_kl), (LOGITS, LOGITS_ADV)),
    "mart_bce": (
        lambda z: losses.mart_bce(z, jnp.asarray(LABELS)),
        lambda z: by_row(slow_mart_bce)(z, LABELS),
        (LOGITS_ADV,),
    ),
    "mart_kl": (
        lambda z, a: losses.mart_kl(z, a, jnp.asarray(LABELS)),
        lambda z, a: by_row(slow_mart_kl)(z, a, LABELS),
        (LOGITS, LOGITS_ADV),
    ),
}
CONTRASTIVE = {
    "adversarial_contrastive": (
        losses.adversarial_contrastive,
        slow_adversarial_contrastive,
        (Z1, Z2),
    ),
    "info_nce": (losses.info_nce, slow_info_nce, (Z1, Z2)),
    "nt_xent": (losses.nt_xent, slow_nt_xent, (Z1, Z2)),
    "clip_loss": (losses.clip_loss, slow_clip_loss, (Z1, Z2)),
    "supervised_contrastive": (
        lambda z: losses.supervised_contrastive(z, jnp.asarray(LABELS)),
        lambda z: slow_supervised_contrastive([z], LABELS),
        (Z1,),
    ),
    "supervised_contrastive_two_views": (
        lambda z, w: losses.supervised_contrastive(z, jnp.asarray(LABELS), second_view=w),
        lambda z, w: slow_supervised_contrastive([z, w], LABELS),
        (Z1, Z2),
    ),
}
IMAGES = drawn(3, 2, 2, 1), drawn(3, 2, 2, 1, seed=9)
RECONSTRUCTION = {
    "squared_error": (losses.squared_error, by_row(lambda a, b: np.mean((a - b) ** 2)), IMAGES),
    "absolute_error": (losses.absolute_error, by_row(lambda a, b: np.mean(abs(a - b))), IMAGES),
}
ALL = {**CLASSIFICATION, **CONTRASTIVE, **RECONSTRUCTION}


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(loss, *arguments):
    """Losses [b], and the gradients of their sum with respect to every argument."""
    values, pull = jax.vjp(loss, *arguments)
    return values, pull(jnp.ones_like(values))


def slow_gradients(slow, *arguments, step=1e-5):
    """Central differences of the twin's sum, in float64."""
    arguments = [np.asarray(a, np.float64) for a in arguments]
    gradients = [np.zeros_like(a) for a in arguments]
    for argument, gradient in zip(arguments, gradients, strict=True):
        for index in np.ndindex(argument.shape):
            start = argument[index]
            argument[index] = start + step
            above = slow(*arguments).sum()
            argument[index] = start - step
            gradient[index] = (above - slow(*arguments).sum()) / (2 * step)
            argument[index] = start
    return gradients


@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_equal_the_slow_twin(name):
    loss, slow, arguments = ALL[name]
    values, gradients = value_and_gradients(loss, *arguments)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, slow(*arguments), **TOLERANCE)
    for ours, twin in zip(gradients, slow_gradients(slow, *arguments), strict=True):
        # Gradients cancel down from terms of size 1 / temperature.
        np.testing.assert_allclose(ours, twin, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_inputs_are_computed_in_float32(name):
    loss, slow, arguments = ALL[name]
    rounded = [a.astype(jnp.bfloat16) for a in arguments]
    values = jax.jit(loss)(*rounded)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, slow(*[np.float64(a) for a in rounded]), **TOLERANCE)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_logit_losses_are_finite_at_equal_and_at_huge_logits(name):
    loss, _, arguments = CLASSIFICATION[name]
    equal = [np.ones_like(a) for a in arguments]
    huge = [np.where(np.arange(CLASSES) == 1, 1e30, -1e30) * np.ones_like(a) for a in arguments]
    # DLR divides by a gap that is 0 for tied wrong logits of 1e30: unbounded by definition.
    points = [equal] if "dlr" in name else [equal, [h.astype(np.float32) for h in huge]]
    for point in points:
        values, gradients = value_and_gradients(loss, *point)
        assert np.isfinite(values).all()
        assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_losses_are_finite_at_zero_and_at_equal_rows(name):
    loss, _, arguments = CONTRASTIVE[name]
    collapsed = [np.ones_like(a) for a in arguments]
    zero_row = [
        np.where(np.arange(BATCH)[:, None] == 2, 0, a).astype(np.float32) for a in arguments
    ]
    for point in (collapsed, zero_row, [np.zeros_like(a) for a in arguments]):
        values, gradients = value_and_gradients(loss, *point)
        assert np.isfinite(values).all()
        assert all(np.isfinite(g).all() for g in gradients)
    assert any((g[2] != 0).any() for g in value_and_gradients(loss, *zero_row)[1])


def test_cross_entropy_keeps_its_gradient_where_softmax_rounds_to_one():
    logits = jnp.array([[60.0, 0.0, 10.0]])
    labels = jnp.array([0])
    values, (gradient,) = value_and_gradients(lambda z: losses.cross_entropy(z, labels), logits)
    tail = np.exp(-50.0) + np.exp(-60.0)
    np.testing.assert_allclose(values, [tail], rtol=1e-5)
    np.testing.assert_allclose(gradient, [[-tail, np.exp(-60.0), np.exp(-50.0)]], rtol=1e-5, atol=0)


def test_classes_ruled_out_by_minus_infinity_do_not_count():
    logits = np.array([[1.0, -np.inf, 0.5], [0.0, -np.inf, 2.0]], np.float32)
    without = logits[:, [0, 2]]
    for loss, slow in (
        (lambda z: losses.cross_entropy(z, jnp.array([0, 2])), [slow_cross_entropy, [0, 1]]),
        (lambda z: losses.trades_kl(z, z[::-1]), [slow_kl, without[::-1]]),
    ):
        values, (gradient,) = value_and_gradients(loss, logits)
        np.testing.assert_allclose(values, by_row(slow[0])(without, slow[1]), rtol=1e-6)
        assert np.isfinite(gradient).all()


def test_divergence_and_its_gradient_vanish_at_equal_logits():
    values, gradients = value_and_gradients(losses.trades_kl, LOGITS, LOGITS)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    np.testing.assert_allclose(gradients[1], 0, atol=1e-6)


def test_margin_is_positive_exactly_where_misclassified():
    wrong = LOGITS.argmax(1) != LABELS
    assert wrong.any()
    assert not wrong.all()
    values = jax.jit(losses.margin)(LOGITS, LABELS)
    np.testing.assert_array_equal(np.asarray(values) > 0, wrong)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.floats(-20, 20), log_scale=st.floats(-2, 2))
def test_logit_losses_ignore_a_shift_and_dlr_a_scale(seed, shift, log_scale):
    # On a grid of 1/8 the shift is exact, so that no rounding stands between the two sides, and
    # distinct entries keep DLR away from its poles.
    rng = np.random.default_rng(seed)
    grid = rng.permuted(np.arange(BATCH * CLASSES).reshape(BATCH, CLASSES) / 8, axis=1)
    arguments = {1: (grid,), 2: (grid, grid[:, ::-1])}
    for name, (loss, _, given_arguments) in JITTED.items():
        plain = [a.astype(np.float32) for a in arguments[len(given_arguments)]]
        shifted = [a + np.float32(round(shift * 8) / 8) for a in plain]
        np.testing.assert_allclose(loss(*shifted), loss(*plain), err_msg=name, **TOLERANCE)
        if "dlr" in name:
            scaled = [a * np.float32(10**log_scale) for a in plain]
            np.testing.assert_allclose(loss(*scaled), loss(*plain), err_msg=name, **TOLERANCE)


JITTED = {name: (jax.jit(loss), slow, a) for name, (loss, slow, a) in CLASSIFICATION.items()}


@pytest.mark.parametrize("name", ["adversarial_contrastive", "info_nce", "nt_xent", "clip_loss"])
def test_contrastive_losses_follow_a_permutation_and_ignore_row_lengths(name):
    loss = jax.jit(CONTRASTIVE[name][0])
    order = np.random.default_rng(5).permutation(BATCH)
    np.testing.assert_allclose(loss(Z1[order], Z2[order]), loss(Z1, Z2)[order], **TOLERANCE)
    lengths = np.logspace(-30, 30, BATCH, dtype=np.float32)[:, None]
    np.testing.assert_allclose(loss(Z1 * lengths, Z2), loss(Z1, Z2), **TOLERANCE)


def test_supervised_contrastive_follows_a_permutation_and_names_of_labels_do_not_matter():
    loss = jax.jit(losses.supervised_contrastive)
    order = np.random.default_rng(5).permutation(BATCH)
    plain = loss(Z1, LABELS)
    np.testing.assert_allclose(loss(Z1[order], LABELS[order]), plain[order], **TOLERANCE)
    np.testing.assert_array_equal(loss(Z1, -7 * LABELS + 100), plain)


def test_supervised_contrastive_of_distinct_labels_and_two_views_is_nt_xent():
    own = jnp.arange(BATCH)
    two_views = lambda z, w: losses.supervised_contrastive(z, own, second_view=w, temperature=0.5)  # noqa: E731
    np.testing.assert_allclose(jax.jit(two_views)(Z1, Z2), slow_nt_xent(Z1, Z2), **TOLERANCE)


def test_an_anchor_without_positives_costs_nothing():
    loss = jax.jit(losses.supervised_contrastive)
    values = np.asarray(loss(Z1[:3], np.array([0, 0, 1])))
    assert values[2] == 0
    assert (values[:2] > 0).all()
    np.testing.assert_array_equal(loss(Z1[:1], np.array([4])), [0])


def test_what_raises_the_reported_loss_of_an_example_does_not_depend_on_the_batch():
    """Its gradient by the attacked code is that of -cosine / t, whoever else is there."""
    gradient = jax.jit(jax.grad(lambda a, z: losses.adversarial_contrastive(a, z).sum()))
    whole, pair = gradient(Z1, Z2), gradient(Z1[:2], Z2[:2])
    np.testing.assert_array_equal(whole[:2], pair)


def test_the_reported_loss_is_bounded_below_and_may_be_negative():
    same = jnp.eye(BATCH, 2 * BATCH)
    opposite = jnp.concatenate([same[:1], -same[:1]])
    np.testing.assert_allclose(losses.adversarial_contrastive(opposite, opposite), -4, rtol=1e-6)
    np.testing.assert_allclose(
        losses.adversarial_contrastive(same, same), np.log(BATCH - 1) - 2, rtol=1e-5
    )


def test_a_batch_of_one_pair_has_no_negatives():
    for loss in (losses.info_nce, losses.nt_xent, losses.clip_loss):
        np.testing.assert_allclose(jax.jit(loss)(Z1[:1], Z2[:1]), [0], atol=1e-7)


def test_a_perfect_reconstruction_pulls_nowhere():
    x = jnp.asarray(drawn(2, 3, 3, 1))
    for loss in (losses.squared_error, losses.absolute_error):
        values, gradients = value_and_gradients(loss, x, x)
        np.testing.assert_array_equal(values, 0)
        assert all((g == 0).all() for g in gradients)
