"""Certificates and predictions of the smoothed classifier, from counts on the host.

logits_fn = lambda x, variables: model.apply(variables, x)
certificate = certify(logits_fn, images, key, sigma=0.5, args=(variables,))
certified_accuracy(certificate, labels, radii=(0, 0.25, 0.5))
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxrobust.attacks.inputs import check_steps
from jaxrobust.smoothing import sampling
from jaxrobust.smoothing.sampling import LogitsFn

ABSTAIN = -1


class Prediction(NamedTuple):
    """What `predict` says of n examples, on the host.

    Attributes:
        label: [n] int32, the class of the smoothed classifier, or -1 where it abstains.
        p_value: [n] of the hypothesis that the two most frequent classes are equally likely.
        counts: [n, classes] how often each class was returned.
    """

    label: Int[np.ndarray, "n"]
    p_value: Float[np.ndarray, "n"]
    counts: Int[np.ndarray, "n classes"]


class Certificate(NamedTuple):
    """What `certify` says of n examples, on the host.

    Attributes:
        label: [n] int32, the class of the smoothed classifier, or -1 where it abstains.
        radius: [n] l2 radius, in the unit of the images, within which no perturbation changes
            `label`; 0 where it abstains.
        p_lower: [n] lower confidence bound of the probability of `selected`.
        selected: [n] int32, the class that was tested, abstained or not.
    """

    label: Int[np.ndarray, "n"]
    radius: Float[np.ndarray, "n"]
    p_lower: Float[np.ndarray, "n"]
    selected: Int[np.ndarray, "n"]


def certify(
    logits_fn: LogitsFn,
    x: ArrayLike,
    key: Array,
    *,
    sigma: float,
    samples0: int = 100,
    samples: int = 10_000,
    alpha: float = 0.001,
    chunk: int | None = None,
    args: tuple = (),
    mesh: Mesh | None = None,
    batch_size: int = 250,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = False,
) -> Certificate:
    """The radius around each example within which the smoothed classifier cannot change.

    radius = sigma * Phi^-1(p_lower),  p_lower <= P(logits_fn(x + noise) = label)

    The class is selected on the first `samples0` samples, and p_lower is the Clopper-Pearson bound
    on `samples` others; where it is not above 1/2, the classifier abstains. A certificate is wrong
    with probability of at most `alpha`, example by example: of 1,000 certified examples at the
    default, one wrong one is to be expected at worst.

    Args:
        logits_fn: (x, *args) -> [b, classes]. Pass the same function object every time, and what
            changes through `args`: then it compiles once.
        x: [n, ...] float in `bounds`; any number of examples.
        key: one typed key, or one per example [n].
        sigma: standard deviation of the noise, > 0, in the unit of x.
        samples0: noise samples per example to select the class, >= 1.
        samples: noise samples per example to bound its probability, >= 1. No radius is above
            sigma * Phi^-1(alpha^(1 / samples)): 3.2 sigma at the default.
        alpha: probability of a wrong certificate, in (0, 1).
        chunk: noisy images in one forward pass of one device. None fits it to the images: on a CPU
            to its caches, 128 at most; elsewhere 222 of ImageNet's and 4,096 of small ones. On a
            GPU double it until the time or the memory says no. It never changes the noise.
        args: arrays, or trees of them, that `logits_fn` takes besides x.
        mesh: spreads the examples over devices (`parallel.data_mesh()`); one device by default.
        batch_size: examples per call to the device, at most.
        bounds: the box that x must lie in; None for any finite x. The noise leaves it.
        progress: show a progress bar.

    Returns:
        The certificates.

    Raises:
        TypeError: x is not floating point, or the key is not typed.
        ValueError: another argument is out of range, or logits_fn returns NaN.

    Source: Cohen et al. 2019, theorem 1 and algorithm CERTIFY.
    """
    check_steps(samples0, "samples0")
    check_steps(samples, "samples")
    _check_alpha(alpha)
    first, rest = sampling.count_in_batches(
        logits_fn, x, key, sigma, samples0, samples, chunk, args, mesh, batch_size, bounds, progress
    )
    selected = first.argmax(1).astype(np.int32)
    hits = np.take_along_axis(rest, selected[:, None], 1)[:, 0]
    p_lower = lower_bound(hits, samples, alpha)
    certain = p_lower > 0.5
    return Certificate(
        label=np.where(certain, selected, ABSTAIN).astype(np.int32),
        radius=_radius(sigma, np.where(certain, p_lower, 0.5)),
        p_lower=p_lower,
        selected=selected,
    )


def predict(
    logits_fn: LogitsFn,
    x: ArrayLike,
    key: Array,
    *,
    sigma: float,
    samples: int = 100,
    alpha: float = 0.001,
    chunk: int | None = None,
    args: tuple = (),
    mesh: Mesh | None = None,
    batch_size: int = 250,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = False,
) -> Prediction:
    """The class of the smoothed classifier, or an abstention where the samples do not tell.

    The two most frequent classes are compared by a two-sided binomial test; a p-value above
    `alpha` is an abstention. A class that is returned is another than the smoothed classifier's
    with probability of at most `alpha`.

    Args:
        logits_fn: as for `certify`.
        x: as for `certify`.
        key: as for `certify`.
        sigma: standard deviation of the noise, > 0, in the unit of x.
        samples: noise samples per example, >= 1.
        alpha: probability of a wrong class, in (0, 1).
        chunk: as for `certify`, like all that follow.
        args: arrays that `logits_fn` takes besides x.
        mesh: spreads the examples over devices.
        batch_size: examples per call to the device, at most.
        bounds: the box that x must lie in, or None.
        progress: show a progress bar.

    Returns:
        The predictions.

    Raises:
        TypeError, ValueError: as for `certify`.

    Source: Cohen et al. 2019, algorithm PREDICT; the test is Hung and Fithian 2019.
    """
    check_steps(samples, "samples")
    _check_alpha(alpha)
    _, counted = sampling.count_in_batches(
        logits_fn, x, key, sigma, 0, samples, chunk, args, mesh, batch_size, bounds, progress
    )
    top = np.sort(counted, 1)[:, ::-1]
    runner_up = top[:, 1] if counted.shape[1] > 1 else np.zeros_like(top[:, 0])
    p_value = _equal_odds_p_value(top[:, 0], runner_up)
    label = np.where(p_value <= alpha, counted.argmax(1), ABSTAIN).astype(np.int32)
    return Prediction(label, p_value, counted)


def lower_bound(hits: ArrayLike, samples: int, alpha: float) -> Float[np.ndarray, "..."]:
    """One-sided Clopper-Pearson bound: p is above it with probability of at least 1 - alpha.

    P(Binomial(samples, bound) >= hits) = alpha

    Args:
        hits: successes, whole numbers in [0, samples].
        samples: independent trials, >= 1.
        alpha: probability that p lies below the bound, in (0, 1).

    Returns:
        Bounds in [0, 1), of the shape of `hits`; 0 where there was no success.

    Raises:
        ValueError: an argument is out of range.

    Source: Clopper and Pearson 1934.
    """
    from scipy.special import betaincinv

    check_steps(samples, "samples")
    _check_alpha(alpha)
    hits = np.asarray(hits)
    if hits.size and not (hits.min() >= 0 and hits.max() <= samples):
        raise ValueError(
            f"hits must lie in [0, {samples}], got values in [{hits.min()}, {hits.max()}]"
        )
    bound = betaincinv(np.maximum(hits, 1), samples - hits + 1.0, alpha)
    return np.where(hits > 0, bound, 0.0)


def certified(
    certificate: Certificate, labels: ArrayLike, radii: ArrayLike | Sequence[float]
) -> Bool[np.ndarray, "*radii n"]:
    """Which examples are classified rightly, and certified to be so, at each radius.

    Args:
        certificate: of n examples.
        labels: [n] true classes, whole numbers.
        radii: l2 radii >= 0, or one.

    Returns:
        [len(radii), n], of one radius [n]; an abstention is wrong at every radius.

    Raises:
        ValueError: labels of another shape, a negative radius, or a table of radii.
    """
    labels, radii = np.asarray(labels), np.asarray(radii, np.float64)
    if labels.shape != certificate.label.shape:
        raise ValueError(f"labels must have shape {certificate.label.shape}, got {labels.shape}")
    if radii.ndim > 1 or not (radii >= 0).all():
        raise ValueError(f"radii must be one or a list, all >= 0, got {radii.tolist()}")
    # Some sets give -1 to what has no label.
    right = (certificate.label == labels) & (certificate.label != ABSTAIN)
    return right & (certificate.radius >= radii[..., None])


def certified_accuracy(
    certificate: Certificate, labels: ArrayLike, radii: ArrayLike | Sequence[float]
) -> Float[np.ndarray, "*radii"] | np.floating:
    """Share of the examples that are right and certified at each radius; as `certified`."""
    return certified(certificate, labels, radii).mean(-1)


def average_radius(certificate: Certificate, labels: ArrayLike) -> float:
    """Average certified radius: the mean of the radius, 0 where the class is wrong.

    Source: Zhai et al. 2020 (MACER), section 5.
    """
    right = certified(certificate, labels, 0.0)
    return float(np.where(right, certificate.radius, 0.0).mean())


def _radius(sigma, p):
    from scipy.special import ndtri

    return float(sigma) * ndtri(p)


def _equal_odds_p_value(most, second):
    """Two-sided p-value of `most` successes in most + second tosses of a fair coin."""
    from scipy.special import betainc

    # P(Binomial(n, 1/2) >= k) is the incomplete beta function I_1/2(k, n - k + 1).
    tail = betainc(np.maximum(most, 1), second + 1.0, 0.5)
    return np.where(most > second, np.minimum(2 * tail, 1.0), 1.0)


def _check_alpha(alpha):
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
