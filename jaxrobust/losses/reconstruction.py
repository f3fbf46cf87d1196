"""Per-example reconstruction errors of images or any other arrays."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrobust.losses._checks import at_least_float32, check_same_shape


def squared_error(
    reconstruction: Float[Array, "b ..."], target: Float[Array, "b ..."]
) -> Float[Array, "b"]:
    """Mean squared error of each example.

    loss_i = mean over all other axes of (reconstruction_i - target_i)^2

    Args:
        reconstruction: [b, ...] output of a decoder, for instance images in [0, 1].
        target: [b, ...] what it should have been, same shape and unit.

    Returns:
        [b] errors in the squared unit, >= 0.

    Raises:
        ValueError: the shapes differ.
    """
    return _mean_per_example(jnp.square(_difference(reconstruction, target)))


def absolute_error(
    reconstruction: Float[Array, "b ..."], target: Float[Array, "b ..."]
) -> Float[Array, "b"]:
    """Mean absolute error of each example.

    loss_i = mean over all other axes of |reconstruction_i - target_i|

    Args:
        reconstruction: [b, ...] output of a decoder, for instance images in [0, 1].
        target: [b, ...] what it should have been, same shape and unit.

    Returns:
        [b] errors in the same unit, >= 0; the gradient is 0 where both agree exactly.

    Raises:
        ValueError: the shapes differ.
    """
    difference = _difference(reconstruction, target)
    # The gradient of jnp.abs at 0 is 1; a pixel without error shall pull nowhere.
    return _mean_per_example(difference * jnp.sign(difference))


def _difference(reconstruction, target):
    check_same_shape(reconstruction, target, ("reconstruction", "target"))
    if jnp.ndim(target) < 1:
        raise ValueError("target must have a batch axis, got a scalar")
    return at_least_float32(reconstruction) - at_least_float32(target)


def _mean_per_example(values):
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))
