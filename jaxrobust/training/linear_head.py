"""A linear head on frozen features: a convex problem, solved to its optimum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from jaxrobust import losses
from jaxrobust.attacks.inputs import check_number, check_steps


def fit_head(
    features: Any,
    labels: Any,
    classes: int,
    *,
    decay: float = 1e-3,
    iterations: int = 1000,
) -> dict[str, Any]:
    """Multinomial logistic regression by L-BFGS: the linear head of least loss (SLF).

    loss = mean cross entropy + decay / 2 |kernel|^2, features standardised first: the optimum is
    one, whatever the start, and the scale of single features does not matter.

    Args:
        features: [n, d] float.
        labels: [n] whole numbers in [0, classes).
        classes: how many; some may be missing among the labels.
        decay: > 0.
        iterations: of L-BFGS at most.

    Returns:
        {"params": {"kernel": [d, classes], "bias": [classes]}}, for `models.join(head=...)`.

    Raises:
        ValueError: shapes that do not fit, labels outside the classes, or decay <= 0.
    """
    check_number("decay", decay, low=0, strict=True)
    check_steps(iterations, "iterations")
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features must be [n, d] with labels [n], got {features.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}), got {labels.min()}..{labels.max()}")
    mean, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1)
    x, y = jnp.asarray((features - mean) / spread), jnp.asarray(labels)
    shape = features.shape[1], classes

    @jax.jit
    def value_and_gradient(flat):
        def loss(flat):
            kernel, bias = jnp.split(flat.reshape(shape[0] + 1, classes), [shape[0]])
            fit = losses.cross_entropy(x @ kernel + bias, y).mean()
            return fit + decay / 2 * jnp.square(kernel).sum()

        return jax.value_and_grad(loss)(flat.astype(jnp.float32))

    def objective(flat):
        value, gradient = value_and_gradient(flat)
        return float(value), np.asarray(gradient, np.float64)

    start = np.zeros((shape[0] + 1) * classes)
    options = {"maxiter": iterations, "maxfun": 4 * iterations}
    found = scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", options=options
    ).x.reshape(shape[0] + 1, classes)
    kernel = found[:-1] / spread[:, None]
    bias = found[-1] - mean @ kernel
    return {"params": {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}}
