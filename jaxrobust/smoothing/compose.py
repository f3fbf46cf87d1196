"""Classifiers made of parts: soft-smoothed over given noise, or behind a denoiser."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxrobust.smoothing.sampling import LogitsFn


def smoothed_logits(
    logits_fn: LogitsFn, x: Float[Array, "b ..."], noise: Float[Array, "b m ..."], args: tuple = ()
) -> Float[Array, "b classes"]:
    """Logits of the soft-smoothed classifier: the log of the mean softmax over given noise.

    z_k = log( 1/m sum_j softmax_k(logits_fn(x + noise_j)) )

    It is differentiable, and with the noise held fixed it is a function that an attack can climb.

    Args:
        logits_fn: (x, *args) -> [b, classes].
        x: [b, ...] images.
        noise: [b, m, ...] m draws per example.
        args: arrays that `logits_fn` takes besides x.

    Returns:
        [b, classes] log-probabilities.

    Source: Salman et al. 2019 (Provably robust deep learning via adversarially trained smoothed
    classifiers), eq. 6.
    """
    log_p = jax.nn.log_softmax(logits_fn(merge(x[:, None] + noise), *args))
    log_p = log_p.reshape(*noise.shape[:2], -1)
    return jax.nn.logsumexp(log_p, axis=1) - math.log(noise.shape[1])


def merge(x: Array) -> Array:
    """[b, m, ...] as the batch [b * m, ...]."""
    return x.reshape(-1, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class Denoised:
    """A classifier behind a denoiser, as one `logits_fn`; equal for equal parts.

    z = classify(classifier_variables, denoise(denoiser_variables, x))

        certify(Denoised(denoiser.apply, model.apply), x, key, sigma=0.25, args=(ours, theirs))

    Attributes:
        denoise: (variables, x) -> images of x's shape, such as `Model.apply` of an auto-encoder.
        classify: (variables, x) -> [b, classes] logits of the frozen classifier.

    Source: Salman et al. 2020 (Denoised smoothing: a provable defense for pretrained classifiers).
    """

    denoise: Callable[..., Array]
    classify: Callable[..., Array]

    def __call__(self, x: ArrayLike, denoiser_variables: Any, classifier_variables: Any) -> Array:
        """Logits of what the denoiser makes of x."""
        return self.classify(classifier_variables, self.denoise(denoiser_variables, x))
