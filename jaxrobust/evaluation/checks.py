"""Verdicts of the gradient-masking report card: what a measured figure means, and its limit."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxrobust.evaluation.probes import Probe, flat

# Shares of all examples. BEATEN is AutoAttack's own flag for Square, CONVERGED its neighbour for
# more steps; neither is raised by a couple of examples, which is what another start may give.
BEATEN = 0.002
CONVERGED = 0.005
COUPLE = 2
# Limits set between honest networks and planted defences of experiments/masking_plants.py.
# Honest: 2e-6; noise that hangs on the image: 0.03 and more; bfloat16 rounds at 4e-3.
JUMP = 0.01
# Two programs of one function may round differently.
REPEAT = 1e-4
# Honest: 0.9986 and more; masked: below 0.86, but for a weak plant or two that others catch.
COSINE = 0.9
# Random without harm: 0.998; random enough to stand in the attack's way: 0.963 and less.
AGREEMENT = 0.97
# Accuracy where all is grey: 0 for honest networks; 0.15 to 0.9 where no gradient is left. So many
# standard errors above chance.
SURE = 3.0
# Of a share, which is a float.
ROUNDING = 1e-6

RANDOM = "the model is declared random"


class Check(NamedTuple):
    """One line of the report card.

    Attributes:
        name: of the check.
        figure: what was measured; None where the check does not apply.
        limit: where the flag begins; None likewise.
        passed: False is a flag: the robust accuracy should not be believed.
        meaning: one sentence: what was found, and what to do about a flag.
    """

    name: str
    figure: float | None
    limit: float | None
    passed: bool
    meaning: str

    @property
    def verdict(self) -> str:
        """The verdict: "ok", "flag" or "not applicable"."""
        if self.figure is None:
            return "not applicable"
        return "ok" if self.passed else "flag"


def skipped(name: str, reason: str) -> Check:
    """A check that does not apply, and why."""
    return Check(name, None, None, True, f"Not applicable: {reason}.")


def _judged(name, figure, limit, found, advice, *, least=False):
    figure, limit = float(figure), float(limit)
    # 3 - 1 of 100 examples must not count as more than 2 of 100 for its rounding.
    passed = figure >= limit - ROUNDING if least else figure <= limit + ROUNDING
    return Check(name, figure, limit, passed, f"{found}." if passed else f"{found}: {advice}.")


def _share(least, count):
    """The limit: `least`, or the share that a couple of examples are, whichever is larger."""
    return max(least, COUPLE / count)


def one_step(single: Mapping[float, float], curve: Mapping[float, float], count: int) -> Check:
    """The one-step attack leaves more than the long one, at every radius."""
    ahead = max(curve[radius] - single[radius] for radius in curve)
    return _judged(
        "one step",
        ahead,
        _share(BEATEN, count),
        f"One step breaks at most {max(ahead, 0):.1%} more images than {len(curve)} long attacks",
        "the long attack is led astray, so attack with other losses, BPDA and by queries",
    )


def beaten(name: str, only: np.ndarray, attack: str, advice: str) -> Check:
    """An attack without exact gradients breaks nothing that white-box attacks leave.

    Args:
        name: of the check.
        only: [n] bool, what holds under white-box attacks and falls to this one.
        attack: what to call it.
        advice: what to do.
    """
    found = f"{attack} breaks {only.sum()} of {len(only)} images that white-box attacks leave"
    return _judged(name, only.mean(), _share(BEATEN, len(only)), found, advice)


def black_box(only: np.ndarray) -> Check:
    """An attack by queries breaks nothing that white-box attacks leave; `only` as in `beaten`."""
    advice = "gradients are masked, so believe the lower figure and attack with more queries"
    return beaten("black box", only, "An attack by queries", advice)


def large_radius(curve: Mapping[float, float], classes: int, count: int) -> Check:
    """At a radius where every image can become plain grey, next to nothing is right."""
    radius, chance = max(curve), 1 / classes
    limit = chance + SURE * np.sqrt(chance * (1 - chance) / count)
    return _judged(
        "large radius",
        curve[radius],
        limit,
        f"At eps {radius:g}, which turns every image grey, {curve[radius]:.1%} are right",
        "an attack that cannot win there is no attack, so find what stops the gradient",
    )


def zero_gradient(slope: np.ndarray) -> Check:
    """Every image has a gradient to follow; `slope` [n] is its largest entry."""
    share = flat(slope).mean()
    return _judged(
        "zero gradient",
        share,
        0.0,
        f"The cross entropy's gradient is zero or not finite on {share:.1%} of images",
        "attack the margin or DLR, divide the logits by a constant, and look for rounding, "
        "saturation and stop_gradient",
    )


def repeatable(difference: float | None) -> Check:
    """Two identical calls give the same logits; None for a model that is declared random."""
    name = "repeatable"
    if difference is None:
        return skipped(name, f"{RANDOM}, see 'random gradient'")
    return _judged(
        name,
        difference,
        REPEAT,
        f"Two identical calls differ by {difference:.2g} of the logits' range",
        "the model is random, so pass its keys (random=True) and attack with expected gradients",
    )


def jump(probed: Probe) -> Check:
    """No image's logits leap when its pixels change by a millionth."""
    # In units of what is usual, since a single image's logits may all but agree.
    usual = np.median(np.ptp(np.asarray(probed.logits), axis=1))
    largest = probed.jump.max() / max(usual, np.finfo(np.float32).tiny)
    return _judged(
        "jump",
        largest,
        JUMP,
        f"A change of 1e-6 per pixel moves logits by up to {largest:.2g} of their usual range",
        "randomness derived from the image or rounding is inside, so draw it from keys "
        "(random=True), or differentiate through a smooth stand-in (BPDA)",
    )


def probabilities(logits: np.ndarray) -> Check:
    """Outputs [n, classes] are logits, and not probabilities already."""
    share = np.mean((logits.min(1) >= 0) & (np.abs(logits.sum(1) - 1) < 1e-3))
    return _judged(
        "probabilities",
        share,
        0.5,
        f"Outputs of {share:.0%} of the images are not negative and sum to one",
        "they are probabilities, so give the attacks the logits before the softmax",
    )


def convergence(only: np.ndarray) -> Check:
    """More steps and other starts do not lower the accuracy.

    Args:
        only: [n] bool, what holds under white-box attacks and falls to longer or restarted ones.
    """
    found = f"More steps and restarts lower the robust accuracy by {only.mean():.1%}"
    advice = "the attack had not converged, so raise its steps and restarts until nothing moves"
    return _judged("convergence", only.mean(), _share(CONVERGED, len(only)), found, advice)


def slopes(probed: Probe) -> Check:
    """Gradients agree with finite differences."""
    cosine = probed.cosine.mean()
    return _judged(
        "finite differences",
        cosine,
        COSINE,
        f"Autodiff and finite differences of the margin agree to a cosine of {cosine:.2f}",
        "gradients are wrong, missing or broken by kinks, so use BPDA or attacks by queries",
        least=True,
    )


def monotone(curve: Mapping[float, float], count: int) -> Check:
    """A larger radius leaves no more images right."""
    accuracies = [curve[radius] for radius in sorted(curve)]
    rise = max(np.diff(accuracies).max(), 0.0)
    return _judged(
        "eps curve",
        rise,
        _share(CONVERGED, count),
        f"Independent attacks at rising eps leave up to {rise:.1%} more images at the larger one",
        "the attack fails where it has more room, so tune its step and attack by queries",
    )


def random_gradient(probed: Probe | None) -> Check:
    """One draw's gradient points where the expected one does; None if the model is not random."""
    name = "random gradient"
    if probed is None:
        return skipped(name, "the model is not declared random")
    cosine = probed.agreement.mean()
    return _judged(
        name,
        cosine,
        AGREEMENT,
        f"The gradient of one draw agrees with that of many to a cosine of {cosine:.2f}",
        "attack with expected gradients of at least 20 draws (version 'rand'), and report those",
        least=True,
    )
