"""Randomized smoothing: predictions and l2 certificates of any classifier under Gaussian noise.

The smoothed classifier g(x) is the class that logits_fn returns most often at x + N(0, sigma^2 I).
"""

from jaxrobust.smoothing.certificates import (
    ABSTAIN,
    Certificate,
    Prediction,
    average_radius,
    certified,
    certified_accuracy,
    certify,
    lower_bound,
    predict,
)
from jaxrobust.smoothing.compose import Denoised, merge, smoothed_logits
from jaxrobust.smoothing.sampling import counts, noise

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Denoised",
    "Prediction",
    "average_radius",
    "certified",
    "certified_accuracy",
    "certify",
    "counts",
    "lower_bound",
    "merge",
    "noise",
    "predict",
    "smoothed_logits",
]
