"""A linear head on frozen features: features once for all, then a convex problem to its optimum."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.sharding import Mesh
from jaxtyping import Float
from tqdm import tqdm

from jaxrobust import losses, parallel
from jaxrobust.attacks.inputs import check_number, check_steps
from jaxrobust.models import Model
from jaxrobust.models.defended import Features


def features(
    defended: Model,
    variables: Any,
    images: Any,
    *,
    batch_size: int = 250,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "n d"]:
    """What the head of a defended model sees, for a whole set.

    Args:
        defended: of `models.defend`.
        variables: its variables; a head is not looked at.
        images: [n, h, w, c] float32 in [0, 1].
        batch_size: images at a time, rounded up to a multiple of the devices.
        mesh: spreads each batch over devices; one device by default.
        progress: show a progress bar.

    Returns:
        [n, d] float32.

    Raises:
        ValueError: the model is not one of `models.defend`, or batch_size < 1.
    """
    check_steps(batch_size, "batch_size")
    if defended.config.get("name") != "defended":
        raise ValueError(f"defended must be made by models.defend, got {defended.config}")
    images = np.asarray(images)
    devices = 1 if mesh is None else mesh.size
    size = -(-min(batch_size, max(len(images), 1)) // devices) * devices
    place = jax.device_put if mesh is None else lambda x: parallel.shard_batch(x, mesh)
    found = []
    for start in tqdm(range(0, len(images), size), "features", disable=not progress):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        found.append(np.asarray(_run(Features(defended), variables, place(images[rows]))))
    return np.concatenate(found)[: len(images)]


@partial(jax.jit, static_argnums=0)
def _run(features, variables, x):
    return features(variables, x)


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
