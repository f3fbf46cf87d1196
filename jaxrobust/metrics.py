"""Accuracies per example, and the intervals and errors that a reported number needs.

The accuracies are JAX and jit; the statistics are numpy, on results that are already on the host.
"""

import functools
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Real, Shaped
from jaxtyping import ArrayLike as Values

from jaxrobust import balls

# Resamples are drawn in blocks of about this many indices, to bound the memory (64 MB).
BLOCK = 8_000_000


class Interval(NamedTuple):
    """An estimate with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


class MeanError(NamedTuple):
    """A mean over runs with its standard error (NaN for a single run)."""

    mean: float
    standard_error: float


def accuracy(logits: Float[Array, "b k"], labels: Integer[Array, "b"]) -> Float[Array, "b"]:
    """Top-1 accuracy of each example; the mean is the accuracy.

    correct_i = 1 if argmax_k z_ik = y_i else 0

    Args:
        logits: [b, k] class scores z; the first of tied classes is the prediction.
        labels: [b] true classes in [0, k).

    Returns:
        [b] float32, 1 where right and 0 where wrong. A row with a NaN is wrong: a model that
        breaks down must not pass for a robust one.

    Raises:
        ValueError: the shapes do not match.
    """
    return topk_accuracy(logits, labels, k=1)


def misclassified(logits: Float[Array, "b k"], labels: Integer[Array, "b"]) -> Bool[Array, "b"]:
    """Where `accuracy` is 0, as attacks ask for it in every iteration: [b]."""
    return (logits.argmax(1) != labels) | jnp.isnan(logits).any(1)


def perturbation_norms(
    logits_fn: Callable[..., Array],
    x: Shaped[Values, "b ..."],
    x_adv: Shaped[Values, "b ..."],
    labels: Shaped[Values, "b"],
    norm: str,
    *,
    args: tuple = (),
) -> Float[Array, "b"]:
    """What it took to have each example misclassified: the summary of a minimum-norm attack.

    The median is the usual figure, and the share above eps the accuracy at that radius.

    Args:
        logits_fn: (x, *args) -> [b, classes]. Pass the same function object every time, and what
            changes through `args`: then it compiles once.
        x: [b, ...] float images.
        x_adv: [b, ...] what the attack made of them.
        labels: [b] true classes.
        norm: "linf", "l2" or "l1".
        args: arrays that `logits_fn` takes besides x.

    Returns:
        [b] norms of x_adv - x, in the unit of the images; inf where x_adv is classified rightly,
        and 0 where x is not.

    Raises:
        ValueError: the shapes do not match, or an unknown norm.
    """
    balls.ball(norm)
    x, x_adv, labels = (jnp.asarray(values) for values in (x, x_adv, labels))
    if x_adv.shape != x.shape or labels.shape != x.shape[:1]:
        raise ValueError(
            "x and x_adv must be [b, ...] of one shape and labels [b], "
            f"got {x.shape}, {x_adv.shape} and {labels.shape}"
        )
    return _perturbation_norms(logits_fn, norm, x, x_adv, labels, args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _perturbation_norms(logits_fn, norm, x, x_adv, labels, args):
    wrong, fooled = (misclassified(logits_fn(images, *args), labels) for images in (x, x_adv))
    return jnp.where(wrong, 0, jnp.where(fooled, balls.norms(x_adv - x, norm), jnp.inf))


def topk_accuracy(
    logits: Float[Array, "b classes"], labels: Integer[Array, "b"], *, k: int
) -> Float[Array, "b"]:
    """Top-k accuracy of each example: is the label among the k largest scores?

    Args:
        logits: [b, classes] class scores; of tied classes the first ones rank higher.
        labels: [b] true classes.
        k: 1 <= k <= classes.

    Returns:
        [b] float32, 1 where the label is among the k best, else 0; rows with a NaN count 0.

    Raises:
        ValueError: the shapes do not match, or k is out of range.
    """
    if jnp.ndim(logits) != 2 or jnp.shape(labels) != jnp.shape(logits)[:1]:
        raise ValueError(
            "logits must be [batch, classes] and labels [batch], "
            f"got {jnp.shape(logits)} and {jnp.shape(labels)}"
        )
    classes = jnp.shape(logits)[1]
    if not 1 <= k <= classes:
        raise ValueError(f"k must lie in [1, {classes}], got {k}")
    # The rank by counting: a label is among the k best if fewer than k classes stand before it.
    own = labels[:, None] == jnp.arange(classes)
    score = jnp.sum(jnp.where(own, logits, 0), axis=1, keepdims=True)
    earlier = jnp.arange(classes) < labels[:, None]
    before = (logits > score) | ((logits == score) & earlier)
    right = (jnp.sum(before, axis=1) < k) & jnp.any(own, axis=1)
    return (right & ~jnp.any(jnp.isnan(logits), axis=1)).astype(jnp.float32)


def per_class_accuracy(
    correct: Real[Array, "n"] | Bool[Array, "n"], labels: Integer[Array, "n"], *, classes: int
) -> Float[Array, "classes"]:
    """Mean of per-example correctness within each class.

    Args:
        correct: [n] 0 or 1 (or False, True), for instance from `accuracy`, or a worst case.
        labels: [n] true classes in [0, classes).
        classes: number of classes, >= 1.

    Returns:
        [classes] accuracies in [0, 1]; NaN for a class without examples.

    Raises:
        ValueError: the shapes do not match, or classes < 1.
    """
    if jnp.shape(correct) != jnp.shape(labels) or jnp.ndim(labels) != 1:
        raise ValueError(
            "correct and labels must both have shape [n], "
            f"got {jnp.shape(correct)} and {jnp.shape(labels)}"
        )
    if classes < 1:
        raise ValueError(f"classes must be >= 1, got {classes}")
    member = labels == jnp.arange(classes)[:, None]
    count = jnp.sum(member, axis=1)
    hits = jnp.sum(jnp.where(member, jnp.asarray(correct, jnp.float32), 0.0), axis=1)
    return jnp.where(count > 0, hits / jnp.maximum(count, 1), jnp.nan)


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: honest also near 0 and 1 and for few examples.

    centre = (p + z^2 / 2n) / (1 + z^2 / n)
    half width = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2),  p = successes / n

    Args:
        successes: number of successes, 0 <= successes <= n.
        n: number of independent trials, >= 1.
        confidence: coverage in (0, 1).

    Returns:
        p with the bounds of its interval, all in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Source: Wilson 1927.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, {n}], got {successes}")
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, shrink = successes / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    half = z / shrink * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    # At p = 0 and p = 1 the bound is p itself; rounding would put it a hair to either side.
    low = 0.0 if successes == 0 else max(centre - half, 0.0)
    high = 1.0 if successes == n else min(centre + half, 1.0)
    return Interval(p, low, high)


def bootstrap_interval(
    values: Shaped[Values, "..."],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    resample_seeds: bool = False,
) -> Interval:
    """Percentile bootstrap of a mean over test images, pooled over seeds.

    One resample draws n images with replacement, the same ones for every seed: a hard image is
    hard for all seeds, so that seeds do not multiply the evidence of the images.

    Args:
        values: [n] or [seeds, n] per-image numbers, for instance correctness; column j is the
            same image in every row.
        confidence: coverage in (0, 1).
        resamples: number of bootstrap resamples, >= 1.
        seed: of numpy's generator; the same seed gives the same interval.
        resample_seeds: also draw the rows anew, so that the interval covers other training seeds
            too; with three seeds this is coarse and wide.

    Returns:
        The mean over everything, with the percentile interval.

    Raises:
        ValueError: `values` is empty, not finite or of another rank, or an argument out of range.

    Source: Efron & Tibshirani 1993, chapter 13; crossed resampling as in Owen 2007.
    """
    values = _seeds_by_images(values, "values")
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples must be >= 1, got {resamples}")
    rng = np.random.default_rng(seed)
    seeds, n = values.shape
    pooled, means = values.mean(axis=0), np.empty(resamples)
    block = max(1, BLOCK // n)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(n, size=(size, n))
        if resample_seeds:
            rows = rng.integers(seeds, size=(size, seeds))
            means[start : start + size] = [
                values[r][:, d].mean() for r, d in zip(rows, drawn, strict=True)
            ]
        else:
            means[start : start + size] = pooled[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(
    first: Shaped[Values, "..."],
    second: Shaped[Values, "..."],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    resample_seeds: bool = False,
) -> Interval:
    """Mean difference of two methods on the same images, with its bootstrap interval.

    difference = mean(first - second); the first is better beyond doubt if low > 0

    Args:
        first: [n] or [seeds, n] per-image numbers (correctness) of one method.
        second: the same of the other, same shape; entry [s, j] belongs to the same image and
            the same seed in both.
        confidence: coverage in (0, 1).
        resamples: number of bootstrap resamples, >= 1.
        seed: of numpy's generator.
        resample_seeds: as in `bootstrap_interval`.

    Returns:
        The mean difference with its percentile interval, paired over images and pooled over seeds.

    Raises:
        ValueError: the shapes differ, or as in `bootstrap_interval`.
    """
    first, second = _seeds_by_images(first, "first"), _seeds_by_images(second, "second")
    if first.shape != second.shape:
        raise ValueError(
            f"first and second must have the same shape, got {first.shape} and {second.shape}"
        )
    return bootstrap_interval(
        first - second,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
        resample_seeds=resample_seeds,
    )


def mean_and_standard_error(values: Shaped[Values, "runs"] | Sequence[float]) -> MeanError:
    """Mean over independent runs (seeds) with its standard error.

    standard error = sample standard deviation / sqrt(runs)

    Args:
        values: [runs] one number per run.

    Returns:
        The mean, and the standard error, which is NaN for a single run: its spread is unknown.

    Raises:
        ValueError: `values` is empty or not one-dimensional.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values must have shape [runs] with runs >= 1, got {values.shape}")
    error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
    return MeanError(float(values.mean()), float(error))


def _seeds_by_images(values, name):
    """Return float64 [seeds, n], from [n] or [seeds, n]."""
    values = np.asarray(values, np.float64)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"{name} must have shape [n] or [seeds, n], not empty, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return np.atleast_2d(values)


def _check_confidence(confidence):
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
