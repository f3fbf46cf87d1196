"""Salience from input gradients: the plain gradient, SmoothGrad and integrated gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxrobust.attacks.inputs import check_number, check_steps
from jaxrobust.attacks.pgd import input_gradient
from jaxrobust.keys import example_keys, fold

Apply = Callable[..., Array]
Images = Float[Array, "b h w c"]
Labels = Int[Array, " b"]
Keys = Key[Array, " b"] | None
Scores = Float[Array, "b h w 1"]


def gradient(apply: Apply, x: Images, labels: Labels, keys: Keys = None) -> Scores:
    """How strongly the label's logit reacts to a pixel: sum_c |d z_y / d x_c|.

    Args:
        apply: x -> [b, classes] logits.
        x: [b, h, w, c] images in [0, 1].
        labels: [b] the classes that are explained.
        keys: unused; all methods are called alike.

    Returns:
        [b, h, w, 1] scores >= 0.

    Source: Simonyan et al. 2014, section 3, with the channels summed as in SIP-AT's estimator.
    """
    return _magnitude(_label_gradient(apply, x, labels))


def smooth_grad(
    apply: Apply, x: Images, labels: Labels, keys: Keys, *, samples: int = 16, sigma: float = 0.15
) -> Scores:
    """SmoothGrad: the gradient averaged over noisy copies of the image.

    sum_c | 1/m sum_j d z_y / d x_c (x + sigma n_j) |,  n_j ~ N(0, 1)

    Args:
        apply: x -> [b, classes] logits.
        x: [b, h, w, c] images in [0, 1]; the copies may leave that range, as in the source.
        labels: [b] the classes that are explained.
        keys: [b] typed keys, one per image.
        samples: m, copies per image, >= 1.
        sigma: standard deviation of the noise in the unit of x, >= 0.

    Returns:
        [b, h, w, 1] scores >= 0.

    Raises:
        TypeError: there are no keys.
        ValueError: samples < 1 or sigma < 0.

    Source: Smilkov et al. 2017, section 2; noise of 10 to 20 % of the image's range.
    """
    check_steps(samples, "samples")
    check_number("sigma", sigma, low=0)
    keys = example_keys(keys, len(x))

    def add(total, number):
        own = fold(keys, number)
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(own)
        return total + _label_gradient(apply, x + sigma * noise, labels), None

    total, _ = jax.lax.scan(add, 0 * x, jnp.arange(samples))
    return _magnitude(total / samples)


def integrated_gradients(
    apply: Apply,
    x: Images,
    labels: Labels,
    keys: Keys = None,
    *,
    steps: int = 32,
    baseline: float = 0.0,
) -> Scores:
    """The magnitude of `integrated_attributions`, summed over the channels: [b, h, w, 1]."""
    attributions = integrated_attributions(apply, x, labels, steps=steps, baseline=baseline)
    return _magnitude(attributions)


def integrated_attributions(
    apply: Apply, x: Images, labels: Labels, *, steps: int = 32, baseline: float = 0.0
) -> Images:
    """What each pixel adds to the label's logit on the way from the baseline to the image.

    a = (x - x') mean_k d z_y / d x (x' + (k - 1/2) / m (x - x')),  k = 1 .. m

    Over all pixels and channels they add up to z_y(x) - z_y(x'), but for the error of the midpoint
    rule.

    Args:
        apply: x -> [b, classes] logits.
        x: [b, h, w, c] images in [0, 1].
        labels: [b] the classes that are explained.
        steps: m, gradients per image, >= 1; the source uses 20 to 300.
        baseline: x', a grey value in [0, 1]; black in the source.

    Returns:
        [b, h, w, c] attributions, signed.

    Raises:
        ValueError: steps < 1.

    Source: Sundararajan et al. 2017, eq. 1 and 3.
    """
    check_steps(steps)
    way = x - baseline

    def add(total, share):
        return total + _label_gradient(apply, baseline + share * way, labels), None

    shares = (jnp.arange(steps, dtype=x.dtype) + 0.5) / steps
    total, _ = jax.lax.scan(add, 0 * x, shares)
    return way * total / steps


def label_logit(logits: Float[Array, "b classes"], labels: Labels) -> Float[Array, " b"]:
    """Each row's logit of its label."""
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _label_gradient(apply, x, labels):
    return input_gradient(lambda x: label_logit(apply(x), labels), x)


def _magnitude(attributions):
    return jnp.abs(attributions).sum(-1, keepdims=True)
