"""A linear head on frozen features: a convex problem, solved to its optimum."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from jaxrobust import losses
from jaxrobust.attacks.inputs import check_number, check_steps

SCALES = ("all", "each")


def fit_head(
    features: Any,
    labels: Any,
    classes: int,
    *,
    decay: float = 1e-3,
    scale: str = "all",
    iterations: int = 1000,
) -> dict[str, Any]:
    """Multinomial logistic regression by L-BFGS: the linear head of least loss (SLF).

    loss = mean cross entropy + decay / 2 |kernel|^2, of features that are centred and scaled: the
    optimum is one, whatever the start, and the features' unit does not matter.

    Args:
        features: [n, d] float.
        labels: [n] whole numbers in [0, classes).
        classes: how many; some may be missing among the labels.
        decay: > 0.
        scale: what features are divided by: "all" by one number, the root mean square of their
            spreads; "each" by its own spread. A feature that hardly ever moves then has a large
            weight, which an attacker who moves it can use.
        iterations: of L-BFGS at most; fewer than the optimum takes give a warning.

    Returns:
        {"params": {"kernel": [d, classes], "bias": [classes]}}, for `models.join(head=...)`.

    Raises:
        ValueError: shapes that do not fit, features that are no finite numbers, labels outside the
            classes, decay <= 0, or another scale.
    """
    check_number("decay", decay, low=0, strict=True)
    check_steps(iterations, "iterations")
    check_steps(classes, "classes")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features must be [n, d] with labels [n], got {features.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}), got {labels.min()}..{labels.max()}")
    if not np.isfinite(features).all():
        raise ValueError(f"features must be finite, {(~np.isfinite(features)).sum()} are not")
    mean = features.mean(0, dtype=np.float64)
    spread = _spread(features - mean, scale)
    x, y = jnp.asarray((features - mean) / spread, jnp.float32), jnp.asarray(labels)
    shape = features.shape[1] + 1, classes

    def objective(flat):
        weights = jnp.asarray(flat.reshape(shape), jnp.float32)
        value, gradient = _value_and_gradient(weights, x, y, decay)
        return float(value), np.asarray(gradient, np.float64).ravel()

    options = {"maxiter": iterations, "maxfun": 4 * iterations}
    found = scipy.optimize.minimize(
        objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options
    )
    if found.nit >= iterations:
        warnings.warn(
            f"the head is not at its optimum after {iterations} iterations: the gradient's "
            f"largest entry is {np.abs(found.jac).max():.1g}",
            stacklevel=2,
        )
    weights = found.x.reshape(shape)
    kernel = weights[:-1] / spread[:, None]
    bias = weights[-1] - mean @ kernel
    return {"params": {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}}


def _spread(centred, scale):
    """What each feature is divided by [d]; a constant one stays as it is."""
    spread = np.sqrt(np.square(centred).mean(0))
    typical = np.sqrt(np.square(spread).mean())
    if scale == "all":
        return np.full_like(spread, typical or 1)
    # Not to zero: the mean of equal numbers is rounded.
    return np.where(spread > 1e-6 * typical, spread, 1)


@jax.jit
@jax.value_and_grad
def _value_and_gradient(weights, x, y, decay):
    """The loss of a kernel [d, classes] with its bias as a last row."""
    kernel, bias = weights[:-1], weights[-1]
    logits = jnp.matmul(x, kernel, precision="highest") + bias  # an optimum asks for exact slopes
    fit = losses.cross_entropy(logits, y).mean()
    return fit + decay / 2 * jnp.square(kernel).sum()
