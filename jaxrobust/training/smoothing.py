"""Training for randomized smoothing: Gaussian noise, consistency, SmoothAdv, and denoisers.

All of them make `samples` noisy copies of an image, [b, m, h, w, c], which pass the network as one
batch of b * m; a step with m copies costs m times a plain one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrobust import losses, smoothing
from jaxrobust.attacks.inputs import check_number, check_steps
from jaxrobust.keys import fold
from jaxrobust.training.objectives import (
    Objective,
    Schedule,
    accuracy_of,
    check_attack,
    described,
    scaled_attack,
)

# The two uses of an example's key.
_NOISE, _ATTACK = 0, 1


@described
def gaussian(sigma: float, *, samples: int = 1, label_smoothing: float = 0.0) -> Objective:
    """Ordinary training on images with Gaussian noise.

    Args:
        sigma: standard deviation of the noise, > 0; that of the certificate.
        samples: noisy copies of an image per step, >= 1.
        label_smoothing: of the training loss, in [0, 1).

    Source: Cohen et al. 2019, section 3.3 (one copy).
    """
    _check(sigma, samples)

    def perturb(context, images, labels):
        return _noisy(context, images, sigma, samples), context.extra, {}

    def loss(context, forward, images, x_adv, labels):
        logits, stats = _forward_copies(forward, x_adv)
        each = _each_copy(logits, labels, label_smoothing)
        return each.mean(1), accuracy_of(_votes(logits), labels), stats

    return Objective(perturb, loss)


@described
def consistency(
    sigma: float, *, samples: int = 2, weight: float = 10.0, entropy: float = 0.5
) -> Objective:
    """Gaussian training whose predictions must agree between the noisy copies of an image.

    loss = mean_j CE(p_j, y) + weight * mean_j KL(q || p_j) + entropy * H(q),  q = mean_j p_j

    Args:
        sigma: standard deviation of the noise, > 0.
        samples: m, noisy copies of an image per step, >= 2.
        weight: of the agreement, >= 0; 10 or 20 in the paper. Larger ones give more radius for
            less clean accuracy.
        entropy: of the mean prediction's entropy, >= 0.

    Source: Jeong and Shin 2020 (Consistency regularization for certified robustness of smoothed
    classifiers), eq. 8.
    """
    _check(sigma, samples, low=2)
    check_number("weight", weight, low=0)
    check_number("entropy", entropy, low=0)

    def perturb(context, images, labels):
        return _noisy(context, images, sigma, samples), context.extra, {}

    def loss(context, forward, images, x_adv, labels):
        logits, stats = _forward_copies(forward, x_adv)
        log_p = jax.nn.log_softmax(logits)
        log_q = _log_mean(log_p)
        q = jnp.exp(log_q)
        # mean_j KL(q || p_j) = -sum q mean_j log p_j - H(q)
        disorder = -(q * log_q).sum(1)
        apart = -(q * log_p.mean(1)).sum(1) - disorder
        fit = _each_copy(logits, labels, 0.0).mean(1)
        total = fit + weight * apart + entropy * disorder
        return total, accuracy_of(log_q, labels), stats

    return Objective(perturb, loss)


@described
def smooth_adv(
    attack: Any, sigma: float, *, samples: int = 2, eps_schedule: Schedule | None = None
) -> Objective:
    """SmoothAdv: adversarial training of the smoothed classifier.

    x_adv climbs -log( mean_j softmax(z(x_adv + noise_j))_y ); the noise stays the same through the
    attack, and the loss is the mean cross entropy at x_adv + noise_j, the same noise again.

    Args:
        attack: a gradient attack, such as `l2_pgd(0.5, steps=2)`; in the paper 2 to 10 steps of
            2 eps / steps at eps of 0.25 to 2.
        sigma: standard deviation of the noise, > 0.
        samples: m, noise draws per image, >= 1.
        eps_schedule: step -> factor on the attack's `eps`, as for `adversarial`.

    Source: Salman et al. 2019 (Provably robust deep learning via adversarially trained smoothed
    classifiers), eq. 6 and algorithm SmoothAdv-ersarial training.
    """
    _check(sigma, samples)
    check_attack(attack, eps_schedule)

    def perturb(context, images, labels):
        drawn = _noise(context, images, sigma, samples)

        def loss_fn(x, drawn, labels):
            logits = smoothing.smoothed_logits(context.apply, x, drawn)
            return losses.cross_entropy(logits, labels)

        x_adv = scaled_attack(attack, eps_schedule, context.step)(
            loss_fn, images, fold(context.keys, _ATTACK), mask=context.mask, args=(drawn, labels)
        )
        return x_adv[:, None] + drawn, context.extra, {}

    def loss(context, forward, images, x_adv, labels):
        logits, stats = _forward_copies(forward, x_adv)
        return _each_copy(logits, labels, 0.0).mean(1), accuracy_of(_votes(logits), labels), stats

    return Objective(perturb, loss)


@described
def denoising(
    sigma: float,
    classify: Callable[[Array], Array] | None = None,
    *,
    mse: float = 1.0,
    stability: float = 0.0,
) -> Objective:
    """Trains a denoiser to stand in front of a classifier, which `smoothing.Denoised` certifies.

    loss = mse * ||D(x + noise) - x||^2 / pixels + stability * CE(f(D(x + noise)), argmax f(x))

    The trained model is the denoiser D: its output has the shape of an image. The metric "accuracy"
    is the classifier's, behind the denoiser. Without a classifier it is a denoising auto-encoder.

    Args:
        sigma: standard deviation of the noise, > 0.
        classify: f, x -> [b, classes] logits with its weights inside; nothing flows into them. None
            trains for the reconstruction alone.
        mse: weight of the reconstruction, >= 0.
        stability: weight of the agreement with the classifier's own answer at x, >= 0. The paper
            begins with mse alone and goes on with stability alone.

    Source: Salman et al. 2020 (Denoised smoothing), eq. 5 to 7.
    """
    _check(sigma, 1)
    check_number("mse", mse, low=0)
    check_number("stability", stability, low=0)
    if not mse + stability > 0:
        raise ValueError(f"mse or stability must be > 0, got {mse} and {stability}")
    if stability and classify is None:
        raise ValueError(f"stability needs a classifier, got {stability} without one")

    def perturb(context, images, labels):
        return _noisy(context, images, sigma, 1)[:, 0], context.extra, {}

    def loss(context, forward, images, x_adv, labels):
        restored, stats = forward(x_adv)
        total = mse * losses.squared_error(restored, images)
        if classify is None:
            return total, {}, stats
        logits = classify(restored)
        if stability:
            own = jax.lax.stop_gradient(classify(images).argmax(1))
            total += stability * losses.cross_entropy(logits, own)
        return total, accuracy_of(logits, labels), stats

    return Objective(perturb, loss)


def _check(sigma, samples, low=1):
    check_number("sigma", sigma, low=0, strict=True)
    check_steps(samples, "samples", low=low)


def _noise(context, images, sigma, samples):
    return smoothing.noise(
        fold(context.keys, _NOISE), images.shape, sigma=sigma, samples=samples
    ).astype(images.dtype)


def _noisy(context, images, sigma, samples):
    return images[:, None] + _noise(context, images, sigma, samples)


def _forward_copies(forward, copies: Float[Array, "b m ..."]):
    """[b, m, classes] logits of all copies, in one pass."""
    logits, stats = forward(smoothing.merge(copies))
    return logits.reshape(*copies.shape[:2], -1), stats


def _each_copy(logits, labels, label_smoothing):
    """[b, m] cross entropies."""
    repeated = jnp.repeat(labels, logits.shape[1])
    each = losses.cross_entropy(smoothing.merge(logits), repeated, label_smoothing=label_smoothing)
    return each.reshape(logits.shape[:2])


def _votes(logits):
    """[b, classes]: the mean prediction of the copies, by which accuracy is counted."""
    return _log_mean(jax.nn.log_softmax(logits))


def _log_mean(log_p):
    return jax.nn.logsumexp(log_p, axis=1) - math.log(log_p.shape[1])
