"""Tests of randomized smoothing: closed forms, coverage, equal counts on any devices, bad input."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxrobust import parallel, smoothing

KEY = jax.random.key(0)
SIGMA = 0.5
COUNT, SHAPE = 13, (2, 3, 2)
RANDOM = np.random.default_rng(0)
X = RANDOM.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
W = RANDOM.normal(size=12).astype(np.float32)
LENGTH = float(np.linalg.norm(W))


def linear(x, w, bias):
    """Two classes on either side of a plane."""
    score = (x.reshape(len(x), -1) - 0.5) @ w + bias
    return jnp.stack([-score, score], axis=1)


LINEAR = (W, np.float32(0.1))
DISTANCE = ((X.reshape(COUNT, -1) - 0.5) @ W + 0.1) / LENGTH


def on_line(x):
    """Three classes of a one-pixel image; the third one never wins."""
    return jnp.stack([-x[:, 0], x[:, 0], jnp.full(len(x), -1e9)], axis=1)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    # The functions are tiny: nearly all of the time here is the compiler's.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def certify(**options):
    return smoothing.certify(
        linear, X, KEY, **{"sigma": SIGMA, "samples": 500, "args": LINEAR, **options}
    )


# ---- closed forms -------------------------------------------------------------------------------


def test_the_radius_of_a_linear_classifier_is_its_distance_from_the_plane():
    samples, alpha = 100_000, 0.001
    got = certify(samples=samples, alpha=alpha)
    np.testing.assert_array_equal(got.label, DISTANCE > 0)
    # sigma Phi^-1(p) is the distance; the certified radius is the same at a bound below p, which
    # is off by the error of the count (4 standard errors) and by the bound's own margin.
    p = stats.norm.cdf(np.abs(DISTANCE) / SIGMA)
    error = np.sqrt(p * (1 - p) / samples)
    lowest = SIGMA * stats.norm.ppf(p - (4 + 3.3) * error - 5 / samples)
    assert (got.radius > lowest).all()
    assert (got.radius <= np.abs(DISTANCE) + 1e-6).all()
    assert np.abs(got.radius - np.abs(DISTANCE)).max() < 0.02


def test_one_class_everywhere_has_the_largest_radius_there_is():
    got = smoothing.certify(
        lambda x: jnp.tile(jnp.array([0.0, 1.0]), (len(x), 1)), X, KEY, sigma=2.0, samples=1000
    )
    expected = 2.0 * stats.norm.ppf(0.001 ** (1 / 1000))
    np.testing.assert_allclose(got.radius, expected, rtol=1e-12)
    assert (got.label == 1).all()


def test_a_point_on_the_boundary_is_abstained_from():
    x = np.zeros((200, 1), np.float32)
    options = {"sigma": SIGMA, "bounds": None, "alpha": 0.001}
    got = smoothing.certify(on_line, x, KEY, samples=1000, **options)
    # Each of the 200 may be certified in error with a probability of 0.001.
    assert (got.label != smoothing.ABSTAIN).sum() <= 3
    assert (got.radius[got.label == smoothing.ABSTAIN] == 0).all()
    assert set(got.selected.tolist()) == {0, 1}
    answered = smoothing.predict(on_line, x, KEY, samples=1000, **options)
    assert (answered.label != smoothing.ABSTAIN).sum() <= 3


def test_predict_answers_where_the_samples_tell():
    near, far = 0.05, 2.0
    x = np.array([[-far], [-near], [near], [far]], np.float32)
    got = smoothing.predict(on_line, x, KEY, sigma=1.0, samples=100, bounds=None)
    assert got.label.tolist() == [0, -1, -1, 1]
    expected = [stats.binomtest(int(c.max()), 100).pvalue for c in got.counts]
    np.testing.assert_allclose(got.p_value, expected, rtol=1e-9)
    assert got.counts.sum(1).tolist() == [100] * 4
    # A stricter alpha abstains more, a laxer one less.
    strict = smoothing.predict(on_line, x, KEY, sigma=1.0, samples=10, bounds=None, alpha=1e-6)
    assert strict.label.tolist() == [-1] * 4


@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("distance", [0.1, 0.6])
def test_no_more_certificates_are_wrong_than_stated(alpha, distance):
    # 3,000 independent repetitions at once: rows of one batch have noise of their own.
    x = np.full((3000, 1), distance, np.float32)
    got = smoothing.certify(
        on_line, x, KEY, sigma=1.0, samples0=20, samples=100, alpha=alpha, bounds=None
    )
    wrong = int(((got.label == 0) | (got.radius > distance)).sum())
    # Wrong more often than this with a probability of 1e-6 if the error rate is alpha.
    assert wrong <= stats.binom.ppf(1 - 1e-6, 3000, alpha)
    # And not far more careful than it must be: the bound moves in steps of one hit.
    assert wrong >= 0.2 * alpha * 3000


def test_predictions_are_wrong_no_more_often_than_stated():
    x = np.full((4000, 1), 0.02, np.float32)
    got = smoothing.predict(on_line, x, KEY, sigma=1.0, samples=50, alpha=0.2, bounds=None)
    wrong = int((got.label == 0).sum())
    assert 0 < wrong <= stats.binom.ppf(1 - 1e-6, 4000, 0.2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.data(), st.floats(1e-4, 0.5))
def test_the_bound_is_scipys_clopper_pearson(samples, data, alpha):
    hits = data.draw(st.integers(0, samples))
    exact = stats.binomtest(hits, samples, alternative="greater").proportion_ci(
        1 - alpha, method="exact"
    )
    got = smoothing.lower_bound(hits, samples, alpha)
    np.testing.assert_allclose(got, exact.low, rtol=1e-8, atol=1e-12)


def test_the_bound_of_no_hit_is_zero_and_of_all_hits_a_root_of_alpha():
    got = smoothing.lower_bound(np.array([0, 40]), 40, 0.01)
    np.testing.assert_allclose(got, [0.0, 0.01 ** (1 / 40)], rtol=1e-12)


# ---- noise and counts ---------------------------------------------------------------------------


def slow_counts(samples, start=0):
    """One example and one sample at a time, by the documented keys."""
    table = np.zeros((COUNT, 2), int)
    draw = jax.jit(
        lambda i, s: jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), s), SHAPE)
    )
    for i in range(COUNT):
        for s in range(start, start + samples):
            noisy = X[i] + SIGMA * np.asarray(draw(i, s))
            table[i, int((noisy.ravel() - 0.5) @ W + 0.1 > 0)] += 1
    return table


def test_counts_equal_a_slow_loop_over_examples_and_samples():
    got = smoothing.counts(linear, X, KEY, sigma=SIGMA, samples=20, start=5, args=LINEAR)
    np.testing.assert_array_equal(got, slow_counts(20, start=5))


def test_counts_are_those_of_the_noise_that_is_handed_out():
    drawn = smoothing.noise(KEY, X.shape, sigma=SIGMA, samples=30, start=2)
    flat = smoothing.merge(X[:, None] + drawn)
    votes = linear(flat, *LINEAR).argmax(1).reshape(COUNT, 30)
    got = smoothing.counts(linear, X, KEY, sigma=SIGMA, samples=30, start=2, args=LINEAR)
    np.testing.assert_array_equal(got[:, 1], votes.sum(1))


def test_noise_is_standard_normal_and_independent():
    drawn = np.asarray(smoothing.noise(KEY, (40, 5, 5, 1), sigma=2.0, samples=50)) / 2.0
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 0.01
    rows = drawn.reshape(2000, 25)
    # Over examples, over samples and over pixels: all rows and columns are draws of their own.
    for matrix in (rows[:60], rows[::50], rows.T):
        correlation = np.corrcoef(matrix)
        limit = 5.5 / np.sqrt(matrix.shape[1])
        assert np.abs(correlation - np.eye(len(matrix))).max() < limit


def test_parts_of_the_samples_add_up():
    count = lambda **o: smoothing.counts(linear, X, KEY, sigma=SIGMA, args=LINEAR, **o)  # noqa: E731
    whole = count(samples=70)
    np.testing.assert_array_equal(count(samples=30) + count(samples=40, start=30), whole)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 1},
        {"chunk": 100_000},
        {"batch_size": 5, "chunk": 64},
    ],
    ids=str,
)
def test_chunks_and_batches_change_nothing(options):
    samples = {"samples0": 20, "samples": 60}
    assert same(certify(**samples, **options), certify(**samples))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_one_two_and_eight_devices_agree_and_share_the_work(devices):
    seen = []

    def spied(x, w, bias):
        seen.append(len(x))
        return linear(x, w, bias)

    mesh = parallel.data_mesh(devices)
    options = {"sigma": SIGMA, "samples0": 10, "samples": 40, "args": LINEAR}
    got = smoothing.certify(spied, X, KEY, mesh=mesh, chunk=5000, **options)
    assert same(got, certify(samples0=10, samples=40))
    # 13 examples of 50 samples each: what a device sees at once is its share of them.
    assert max(seen) == -(-COUNT // devices) * 50


def test_an_examples_certificate_does_not_depend_on_its_neighbours():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(COUNT))
    order = RANDOM.permutation(COUNT)[:6]
    alone = smoothing.certify(linear, X[order], keys[order], sigma=SIGMA, samples=500, args=LINEAR)
    assert same(alone, [part[order] for part in certify()])


def test_new_numbers_cost_no_new_trace():
    traces = []

    def counted(x, w, bias):
        traces.append(x.shape)
        return linear(x, w, bias)

    run = lambda **o: smoothing.certify(counted, X, KEY, args=LINEAR, chunk=64, **o)  # noqa: E731
    run(sigma=0.5, samples=200)
    before = len(traces)
    run(sigma=0.25, samples=300, samples0=50, alpha=0.01)
    smoothing.predict(counted, X, KEY, args=LINEAR, chunk=64, sigma=1.0, samples=77)
    assert len(traces) == before


def test_counts_may_be_traced():
    run = jax.jit(lambda x, s: smoothing.counts(linear, x, KEY, sigma=s, samples=40, args=LINEAR))
    expected = smoothing.counts(linear, X, KEY, sigma=SIGMA, samples=40, args=LINEAR)
    np.testing.assert_array_equal(run(X, SIGMA), expected)


def test_an_empty_batch_gives_an_empty_certificate():
    got = smoothing.certify(linear, X[:0], KEY, sigma=SIGMA, args=LINEAR)
    assert [part.shape for part in got] == [(0,)] * 4
    counts = smoothing.counts(linear, X[:0], KEY, sigma=SIGMA, samples=3, args=LINEAR)
    assert counts.shape == (0, 2)


def test_bfloat16_images_stay_bfloat16():
    seen = []

    def spied(x):
        seen.append(x.dtype)
        return x.reshape(len(x), -1)[:, :2].astype(jnp.float32)

    smoothing.predict(spied, jnp.asarray(X, jnp.bfloat16), KEY, sigma=SIGMA, samples=5)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


# ---- what is made of it -------------------------------------------------------------------------


def test_certified_accuracy_counts_what_is_right_and_wide_enough():
    certificate = smoothing.Certificate(
        label=np.array([1, 0, -1, 1], np.int32),
        radius=np.array([0.5, 0.9, 0.0, 0.1]),
        p_lower=np.zeros(4),
        selected=np.array([1, 0, 1, 1], np.int32),
    )
    labels = np.array([1, 1, 1, 1])
    got = smoothing.certified_accuracy(certificate, labels, (0.0, 0.1, 0.3, 0.6))
    assert got.tolist() == [0.5, 0.5, 0.25, 0.0]
    assert smoothing.average_radius(certificate, labels) == pytest.approx((0.5 + 0.1) / 4)
    assert smoothing.certified_accuracy(certificate, labels, 0.3) == 0.25
    assert smoothing.certified(certificate, labels, 0.3).tolist() == [True, False, False, False]
    # An abstention is wrong also where there is no label.
    assert not smoothing.certified(certificate, -labels, 0.0).any()


def test_smoothed_logits_are_the_log_of_the_mean_softmax():
    drawn = np.asarray(smoothing.noise(KEY, X.shape, sigma=SIGMA, samples=6))
    got = smoothing.smoothed_logits(linear, jnp.asarray(X), jnp.asarray(drawn), LINEAR)
    expected = np.zeros((COUNT, 2))
    for j in range(6):
        z = np.asarray(linear(X + drawn[:, j], *LINEAR), np.float64)
        expected += np.exp(z) / np.exp(z).sum(1, keepdims=True) / 6
    np.testing.assert_allclose(np.exp(got), expected, rtol=1e-4)


def test_a_denoised_classifier_is_one_function_and_a_value():
    denoise = lambda gain, x: gain * x  # noqa: E731
    classify = lambda w, x: linear(x, w, 0.1)  # noqa: E731
    defended = smoothing.Denoised(denoise, classify)
    np.testing.assert_allclose(defended(X, np.float32(0.5), W), linear(0.5 * X, *LINEAR), rtol=1e-6)
    assert defended == smoothing.Denoised(denoise, classify)
    assert hash(defended) == hash(dataclasses.replace(defended))
    # Half the gain moves the plane: the closed form knows where to.
    got = smoothing.certify(
        defended, X, KEY, sigma=SIGMA, samples=100_000, args=(np.float32(0.5), W)
    )
    score = (0.5 * X.reshape(COUNT, -1) - 0.5) @ W + 0.1
    distance = np.abs(score) / (0.5 * LENGTH)
    reachable = distance < 3 * SIGMA
    assert reachable.sum() > 5
    assert np.abs(got.radius - distance)[reachable].max() < 0.03


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sigma": 0.0}, ValueError, r"sigma must be > 0, got 0"),
        ({"sigma": -1.0}, ValueError, r"sigma must be > 0, got -1"),
        ({"sigma": float("nan")}, ValueError, r"sigma must be > 0, got nan"),
        ({"sigma": float("inf")}, ValueError, r"sigma must be finite, got inf"),
        ({"alpha": 0.0}, ValueError, r"alpha must lie in \(0, 1\), got 0.0"),
        ({"alpha": 1.0}, ValueError, r"alpha must lie in \(0, 1\), got 1.0"),
        ({"samples": 0}, ValueError, r"samples must be a whole number >= 1, got 0"),
        ({"samples": True}, ValueError, r"samples must be a whole number >= 1, got True"),
        ({"chunk": 0}, ValueError, r"chunk must be a whole number >= 1, got 0"),
        ({"batch_size": 0}, ValueError, r"batch_size must be a whole number >= 1, got 0"),
        ({"samples": 2**31}, ValueError, r"samples times examples per device must be below 2\^31"),
        ({"x": (X * 255).astype(np.uint8)}, TypeError, "x must be floating point .*got uint8"),
        ({"x": X * 255}, ValueError, r"x must lie in \(0.0, 1.0\), got values in"),
        ({"x": X * np.nan}, ValueError, r"x must lie in \(0.0, 1.0\), got values in \[nan, nan\]"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, r"key must be typed"),
        ({"key": jax.random.split(KEY, 3)}, ValueError, r"one per example \(13,\), got \(3,\)"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_is_traced(changes, error, message):
    traces = []

    def spied(x, w, bias):
        traces.append(x.shape)
        return linear(x, w, bias)

    given = {"x": X, "key": KEY, "sigma": SIGMA, "args": LINEAR, **changes}
    for run in (smoothing.certify, smoothing.predict):
        with pytest.raises(error, match=message):
            run(spied, **given)
    # Only a number of samples that does not fit is seen with the number of classes known.
    assert not traces or changes.get("samples") == 2**31


def test_too_few_selection_samples_are_refused():
    with pytest.raises(ValueError, match="samples0 must be a whole number >= 1, got 0"):
        certify(samples0=0)
    with pytest.raises(ValueError, match="start must be a whole number >= 0, got -1"):
        smoothing.counts(linear, X, KEY, sigma=SIGMA, samples=3, start=-1, args=LINEAR)


def test_counts_may_be_numpys():
    five, drawn = np.int64(5), inspect.unwrap(smoothing.counts)
    got = drawn(linear, X, KEY, sigma=SIGMA, samples=five, args=LINEAR, chunk=np.int64(7))
    np.testing.assert_array_equal(
        got, smoothing.counts(linear, X, KEY, sigma=SIGMA, samples=5, args=LINEAR)
    )
    assert inspect.unwrap(smoothing.noise)(KEY, X.shape, sigma=SIGMA, samples=five).shape[1] == 5
    for samples in (True, 0, 2.0):
        with pytest.raises(ValueError, match="samples must be a whole number >= 1"):
            inspect.unwrap(smoothing.noise)(KEY, X.shape, sigma=SIGMA, samples=samples)


def test_a_model_that_returns_nan_is_refused_and_a_traced_one_counts_it_for_no_class():
    def broken(x):
        return jnp.where(x[:, :1] > 0, jnp.nan, jnp.array([0.0, 1.0]))

    x = np.zeros((4, 1), np.float32)
    options = {"sigma": 1.0, "samples": 50, "bounds": None}
    for run in (smoothing.certify, smoothing.predict, smoothing.counts):
        with pytest.raises(
            ValueError, match=r"logits_fn must not return NaN, got it for \d+ noisy"
        ):
            run(broken, x, KEY, **options)
    traced = jax.jit(lambda x: smoothing.counts(broken, x, KEY, **options))(x)
    assert (traced[:, 0] == 0).all()
    assert (np.abs(np.asarray(traced[:, 1]) - 25) < 20).all()


@pytest.mark.parametrize("shape", [(), (3, 4)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"logits_fn must return \[b, classes\], got shape"):
        smoothing.predict(lambda x: jnp.zeros((len(x), *shape)), X, KEY, sigma=SIGMA)
    with pytest.raises(ValueError, match=r"logits_fn must return \[b, classes\], got a tuple"):
        smoothing.predict(lambda x: (x[:, :2], x), X, KEY, sigma=SIGMA)


def test_bad_labels_hits_and_radii_are_refused():
    got = certify(samples=10)
    with pytest.raises(ValueError, match=r"labels must have shape \(13,\), got \(2,\)"):
        smoothing.certified_accuracy(got, np.zeros(2, int), (0.0,))
    with pytest.raises(ValueError, match=r"radii must be one or a list, all >= 0, got \[-0.1\]"):
        smoothing.certified_accuracy(got, np.zeros(COUNT, int), (-0.1,))
    with pytest.raises(ValueError, match=r"hits must lie in \[0, 5\], got values in \[6, 6\]"):
        smoothing.lower_bound(6, 5, 0.1)
