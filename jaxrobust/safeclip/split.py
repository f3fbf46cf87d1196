"""Which pairs may be trusted: a similarity of image and caption turned into a split of the data.

A splitter is a function scores [n] -> weights [n], the larger the safer, below 0 where a pair is
known to be bad; `first_split` and `largest` turn weights into the safe set.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real

from jaxrobust.attacks.inputs import check_number
from jaxrobust.data.packages import require

Scores = Real[np.ndarray, " n"]
Weights = Float[np.ndarray, " n"]
COVARIANCES = ("full", "tied")


class Mixture(NamedTuple):
    """Two normal distributions fitted to similarities, the lower mean first.

    Attributes:
        means: (low, high).
        deviations: standard deviations.
        shares: of the two, adding up to 1.
        bic: Bayesian information criterion of this fit, the smaller the better.
        bic_one: that of a single normal distribution.
    """

    means: tuple[float, float]
    deviations: tuple[float, float]
    shares: tuple[float, float]
    bic: float
    bic_one: float

    @property
    def is_bimodal(self) -> bool:
        """Whether two distributions explain the scores better than one, and lie apart.

        Apart means Ashman's D > 2: sqrt(2) |m1 - m2| / sqrt(s1^2 + s2^2).
        """
        low, high = self.means
        spread = np.hypot(*self.deviations)
        return self.bic < self.bic_one and bool(np.sqrt(2) * (high - low) > 2 * spread)


def fit_mixture(scores: Scores, *, covariance: str = "full") -> tuple[Mixture, Weights]:
    """A two-component Gaussian mixture by scikit-learn, with scikit-learn's own stopping rule.

    That rule matters: on one mode alone it stops early and reports two, and the share of safe pairs
    is 10 to 80 times smaller if the fit is carried to its end.

    Args:
        scores: [n] similarities.
        covariance: "full", one width per component as in the authors' code; "tied", one width for
            both, with which weights rise with the score.

    Returns:
        The mixture, and [n] posterior probabilities of the component with the higher mean.

    Raises:
        ValueError: fewer than two scores, one that is not finite, or an unknown covariance.

    Source: SafeCLIP (arXiv:2310.05862); scikit-learn's defaults as in the authors' code.
    """
    scores = _checked(scores)
    if covariance not in COVARIANCES:
        raise ValueError(f"covariance must be one of {COVARIANCES}, got {covariance!r}")
    model = require("sklearn.mixture", "scikit-learn", "safeclip").GaussianMixture
    column = scores[:, None]
    two = model(2, covariance_type=covariance, random_state=0).fit(column)
    one = model(1, random_state=0).fit(column)
    order = np.argsort(two.means_[:, 0], kind="stable")
    variances = np.broadcast_to(two.covariances_.reshape(-1), (2,))
    pair = lambda values: tuple(float(value) for value in values[order])  # noqa: E731
    mixture = Mixture(
        pair(two.means_[:, 0]), pair(np.sqrt(variances)), pair(two.weights_),
        float(two.bic(column)), float(one.bic(column)),
    )  # fmt: skip
    return mixture, two.predict_proba(column)[:, order[1]]


def gaussian_mixture(
    *, covariance: str = "full", monotone: bool = False
) -> Callable[[Scores], Weights]:
    """The splitter of the authors' code: posterior of the more similar of two components.

    Args:
        covariance: as for `fit_mixture`.
        monotone: let weights never fall as the score rises. With two widths the posterior rises
            again far below the lower mean, where poisons may lie; the published form lets it.
    """
    return functools.partial(_mixture_weights, covariance=covariance, monotone=monotone)


def _mixture_weights(scores: Scores, *, covariance: str, monotone: bool) -> Weights:
    mixture, weights = fit_mixture(scores, covariance=covariance)
    if not monotone:
        return weights
    # A narrow upper component's posterior falls to 0 far above it too.
    return running_maximum(scores, weights, below=mixture.means[1])


def running_maximum(scores: Scores, weights: Weights, *, below: float = np.inf) -> Weights:
    """Weights that are 0 left of their lowest point and never fall to the right of it.

    Args:
        scores: [n] similarities.
        weights: [n] of a splitter.
        below: the lowest point is looked for among scores that are not above this.
    """
    order = np.argsort(scores, kind="stable")
    sorted_ = weights[order]
    within = max(1, int(np.searchsorted(scores[order], below, side="right")))
    lowest = within - 1 - int(np.argmin(sorted_[:within][::-1]))
    sorted_ = np.where(np.arange(len(sorted_)) < lowest, 0.0, sorted_)
    out = np.empty_like(weights)
    out[order] = np.maximum.accumulate(sorted_)
    return out


def by_rank(scores: Scores) -> Weights:
    """The splitter without a model: the share of the scores that are not above one's own.

    `first_split(weights, scores, threshold=0.85)` is then the authors' first version, the best
    15 %.
    """
    scores = _checked(scores)
    return np.searchsorted(np.sort(scores), scores, side="right") / len(scores)


def conformal(bad: Any) -> Callable[[Scores], Weights]:
    """The splitter with a promise: how few of known bad pairs are as similar as this one.

    weight_i = 1 - (1 + #{j in bad : score_j >= score_i}) / (1 + m), and -1 for the known ones

    With threshold = 1 - alpha, a bad pair that is exchangeable with the known ones enters the first
    safe set with probability alpha at most; no weight is above m / (1 + m). A safe set that grows
    later leaves the promise behind.

    Args:
        bad: [m] rows of the pairs that are known to be bad, among those that are scored: canaries,
            or pairs with shuffled captions.

    Raises:
        ValueError: no rows, rows that are not whole numbers >= 0 and all different; when it is
            called, fewer scores than the rows need.

    Source: Vovk et al. 2005, conformal p-values.
    """
    rows = np.asarray(bad)
    if rows.ndim != 1 or not len(rows) or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"bad must be [m] rows with m >= 1, got {bad!r}")
    if rows.min() < 0 or len(np.unique(rows)) < len(rows):
        raise ValueError(f"bad must be different rows >= 0, got {bad!r}")
    return functools.partial(_conformal_weights, np.sort(rows))


def _conformal_weights(rows: np.ndarray, scores: Scores) -> Weights:
    scores = _checked(scores)
    if rows[-1] >= len(scores):
        raise ValueError(f"bad must be rows of the {len(scores)} scores, got {rows[-1]}")
    bad = np.sort(scores[rows])
    above = len(bad) - np.searchsorted(bad, scores, side="left")
    weights = 1 - (1 + above) / (1 + len(bad))
    weights[rows] = -1  # below all others, however many are taken
    return weights


class Split(NamedTuple):
    """A safe set.

    Attributes:
        safe: [n]; the others are risky.
        fallback: why the weights were not used, or "".
    """

    safe: Bool[np.ndarray, " n"]
    fallback: str = ""


def first_split(
    weights: Weights,
    scores: Scores,
    *,
    threshold: float = 0.9,
    bounds: tuple[float, float] = (0.02, 0.5),
    fallback: float = 0.15,
    bimodal: bool = False,
) -> Split:
    """The first safe set: all whose weight reaches the threshold, unless a guard objects.

    Args:
        weights: [n] of a splitter.
        scores: [n] similarities, by which the fallback goes.
        threshold: >= 0; above 1 no weight reaches it, and the fallback decides.
        bounds: smallest and largest share of the data that is believed; (0, 1) believes any.
        fallback: share of the most similar pairs that is taken instead: the authors' first version.
        bimodal: object if the scores do not have two modes (`Mixture.is_bimodal`).

    Raises:
        ValueError: a share outside [0, 1].
    """
    check_number("threshold", threshold, low=0)
    for value in (*bounds, fallback):
        if not 0 <= value <= 1:
            raise ValueError(f"bounds and fallback must be shares in [0, 1], got {value}")
    safe = np.asarray(weights) >= threshold
    share = safe.mean()
    reason = ""
    if not bounds[0] <= share <= bounds[1]:
        reason = f"{100 * share:.2f} % of the pairs reach {threshold}, outside {bounds}"
    elif bimodal and not (mixture := fit_mixture(scores)[0]).is_bimodal:
        low, high = (
            f"{mean:.3f} +- {width:.3f}"
            for mean, width in zip(mixture.means, mixture.deviations, strict=True)
        )
        reason = f"the scores do not have two modes: {low} and {high}"
    if not reason:
        return Split(safe)
    return Split(most_similar(weights, scores, int(fallback * len(scores))), reason)


def most_similar(weights: Weights, scores: Scores, count: int) -> Bool[np.ndarray, " n"]:
    """Marks `count` pairs of the largest scores, but last those whose weight is below 0."""
    return largest(np.where(np.asarray(weights) < 0, -np.inf, _checked(scores)), scores, count)


def largest(weights: Weights, scores: Scores, count: int) -> Bool[np.ndarray, " n"]:
    """Marks exactly `count` pairs of the largest weights; ties go to the larger score, then first.

    Raises:
        ValueError: count outside [0, n].
    """
    if not 0 <= count <= len(weights):
        raise ValueError(f"count must be in [0, {len(weights)}], got {count}")
    order = np.lexsort((np.arange(len(weights)), -np.asarray(scores), -np.asarray(weights)))
    safe = np.zeros(len(weights), bool)
    safe[order[:count]] = True
    return safe


def _checked(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or len(scores) < 2:
        raise ValueError(f"scores must be [n] with n >= 2, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {scores[~np.isfinite(scores)][0]}")
    return scores
