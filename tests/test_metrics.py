"""Tests of the accuracies and of the intervals: closed forms, twins and coverage."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import jaxrobust as jr
from jaxrobust import metrics


@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_equals_a_stable_sort(k):
    # Few distinct scores, so that ties are common.
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, size=(200, 4)).astype(np.float32)
    labels = rng.integers(0, 4, size=200)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    ours = jax.jit(metrics.topk_accuracy, static_argnames="k")(logits, labels, k=k)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, (best == labels[:, None]).any(1))


def test_accuracy_is_argmax_equals_label():
    logits = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    labels = np.arange(50) % 3
    ours = jax.jit(metrics.accuracy)(logits, labels)
    np.testing.assert_array_equal(ours, logits.argmax(1) == labels)
    assert 0 < ours.mean() < 1


def test_rows_with_nan_and_labels_out_of_range_are_wrong():
    logits = jnp.array([[jnp.nan, 0.0], [1.0, jnp.nan], [1.0, 0.0], [1.0, 0.0], [jnp.inf, 0.0]])
    labels = jnp.array([0, 0, 0, 7, 0])
    np.testing.assert_array_equal(metrics.accuracy(logits, labels), [0, 0, 1, 0, 1])


def first_pixel(x, threshold):
    """Class 1 where the first pixel is above the threshold."""
    z = x.reshape(len(x), -1)[:, 0] - threshold
    return jnp.stack([-z, z], 1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_perturbation_norms_tell_fooled_held_and_misclassified_apart(norm):
    x = np.array([0.2, 0.2, 0.9], np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1))
    x = x.astype(np.float32)
    x_adv = x + np.array([0.5, 0.1, 0.5], np.float32)[:, None, None, None]
    got = metrics.perturbation_norms(
        first_pixel, x, x_adv, np.zeros(3, int), norm, args=(np.float32(0.5),)
    )
    size = {"linf": 0.5, "l2": 1.0, "l1": 2.0}[norm]
    np.testing.assert_allclose(got, [size, np.inf, 0], rtol=1e-6)


def test_the_radii_of_a_minimum_norm_attack_are_summed_up():
    x, labels = np.full((4, 2, 2, 1), 0.3, np.float32), np.zeros(4, int)
    args = (np.float32(0.5),)
    x_adv = jr.ddn(steps=40)(first_pixel, x, labels, jax.random.key(0), args=args)
    got = metrics.perturbation_norms(first_pixel, x, x_adv, labels, "l2", args=args)
    np.testing.assert_allclose(got, 0.2, atol=0.01)


def test_per_class_accuracy_is_nan_for_an_empty_class():
    correct, labels = jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.array([0, 0, 2, 2])
    ours = metrics.per_class_accuracy(correct, labels, classes=4)
    np.testing.assert_array_equal(ours, [0.5, np.nan, 1.0, np.nan])
    same = metrics.per_class_accuracy(correct > 0, labels, classes=4)
    np.testing.assert_array_equal(same, ours)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 5000), share=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
def test_wilson_interval_equals_scipy(n, share, confidence):
    successes = round(share * n)
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    estimate, low, high = metrics.wilson_interval(successes, n, confidence=confidence)
    assert 0 <= low <= estimate <= high <= 1
    assert estimate == successes / n
    np.testing.assert_allclose([low, high], expected, rtol=1e-9, atol=1e-12)


def test_bootstrap_equals_the_normal_interval_on_many_images():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    estimate, low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert estimate == pytest.approx(values.mean())
    # The quantiles of 10,000 resamples of a normal are known to about 2 % of its spread.
    np.testing.assert_allclose([low, high], estimate + np.array([-half, half]), atol=0.05 * half)


def test_the_same_seed_gives_the_same_interval_whatever_the_block(monkeypatch):
    values = np.random.default_rng(0).normal(size=(3, 40))
    whole = metrics.bootstrap_interval(values, resamples=100, seed=5)
    assert whole == metrics.bootstrap_interval(values, resamples=100, seed=5)
    assert whole != metrics.bootstrap_interval(values, resamples=100, seed=6)
    monkeypatch.setattr(metrics, "BLOCK", 40 * 7)
    assert whole == metrics.bootstrap_interval(values, resamples=100, seed=5)


def test_repeating_a_seed_does_not_narrow_the_interval():
    values = np.random.default_rng(0).integers(0, 2, size=300)
    once = metrics.bootstrap_interval(values, resamples=500)
    assert metrics.bootstrap_interval(np.stack([values] * 4), resamples=500) == once


def test_resampled_seeds_widen_the_interval_where_seeds_differ():
    values = np.random.default_rng(0).normal(size=(3, 400)) + np.array([[0.0], [1.0], [2.0]])
    _, low, high = metrics.bootstrap_interval(values, resamples=2000)
    _, wide_low, wide_high = metrics.bootstrap_interval(values, resamples=2000, resample_seeds=True)
    assert wide_high - wide_low > 3 * (high - low)


def test_pairing_finds_a_difference_that_unpaired_intervals_miss():
    rng = np.random.default_rng(0)
    second = np.tile(rng.integers(0, 2, size=1000), (3, 1))
    first = second.copy()
    first[:, np.flatnonzero(second[0] == 0)[:20]] = 1  # 20 more images right, none wrong.
    difference = metrics.paired_bootstrap(first, second)
    assert difference.estimate == pytest.approx(0.02)
    assert difference.low > 0
    unpaired = [metrics.bootstrap_interval(m) for m in (first, second)]
    assert unpaired[0].low < unpaired[1].high
    swapped = metrics.paired_bootstrap(second, first)
    assert swapped.estimate == -difference.estimate
    assert swapped.high < 0


def test_equal_methods_differ_by_nothing():
    values = np.random.default_rng(0).integers(0, 2, size=(3, 50))
    assert metrics.paired_bootstrap(values, values, resamples=50) == (0.0, 0.0, 0.0)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        values = rng.random(200) < 0.3
        _, low, high = metrics.bootstrap_interval(values, resamples=300, seed=trial)
        hits += low <= 0.3 <= high
    # 95 % of 300 is 285; five standard deviations of the count are 19.
    assert 266 <= hits <= 300


def test_mean_and_standard_error_equal_scipy_and_one_run_has_no_error():
    values = [0.61, 0.64, 0.58]
    mean, error = metrics.mean_and_standard_error(values)
    assert mean == pytest.approx(0.61)
    assert error == pytest.approx(stats.sem(values))
    mean, error = metrics.mean_and_standard_error([0.5])
    assert mean == 0.5
    assert math.isnan(error)


TWO = np.zeros((2, 3), np.float32)
BAD_CALLS = {
    "logits must be \\[batch, classes\\]": (
        metrics.topk_accuracy, (TWO[0], np.arange(3)), {"k": 1}),
    "k must lie in \\[1, 3\\], got 4": (metrics.topk_accuracy, (TWO, np.arange(2)), {"k": 4}),
    "correct and labels must both have shape": (
        metrics.per_class_accuracy, (TWO[0], np.arange(2)), {"classes": 2}),
    "classes must be >= 1, got 0": (
        metrics.per_class_accuracy, (TWO[0], np.arange(3)), {"classes": 0}),
    "of one shape and labels \\[b\\], got \\(2, 3\\), \\(1, 3\\) and \\(2,\\)": (
        metrics.perturbation_norms, (first_pixel, TWO, TWO[:1], np.arange(2), "l2"), {}),
    "norm must be one of .* got 'l3'": (
        metrics.perturbation_norms, (first_pixel, TWO, TWO, np.arange(2), "l3"), {}),
    "n must be >= 1, got 0": (metrics.wilson_interval, (0, 0), {}),
    "successes must lie in \\[0, 5\\], got 6": (metrics.wilson_interval, (6, 5), {}),
    "confidence must lie in \\(0, 1\\), got 95": (
        metrics.wilson_interval, (1, 5), {"confidence": 95}),
    "values must have shape \\[n\\] or \\[seeds, n\\], not empty, got \\(0,\\)": (
        metrics.bootstrap_interval, ([],), {}),
    "values must be finite": (metrics.bootstrap_interval, ([np.nan],), {}),
    "resamples must be >= 1, got 0": (metrics.bootstrap_interval, ([1.0],), {"resamples": 0}),
    "first and second must have the same shape": (metrics.paired_bootstrap, ([1.0], TWO), {}),
    "values must have shape \\[runs\\]": (metrics.mean_and_standard_error, ([],), {}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_raise_one_clear_error(message):
    function, arguments, options = BAD_CALLS[message]
    # Unwrapped: the run-time check of the annotations would speak first, and less clearly.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(function)(*arguments, **options)
