"""Similarities between all pairs of rows, with the candidates of all devices."""

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def similarities(anchors, candidates):
    """[a, c] inner products of rows, in full float32."""
    # Accelerators round float32 products to about three digits by default; divided by a
    # temperature of 0.07 that is a visible error in the loss.
    return jnp.matmul(anchors, candidates.T, precision=jax.lax.Precision.HIGHEST)


def without_self(logits, own):
    """Rule out each row's own column."""
    return jnp.where(own[:, None] == jnp.arange(logits.shape[1]), -jnp.inf, logits)


def gather(x, axis_name):
    """Candidates of all devices along the leading axis, in the order of the device index."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def global_index(batch, axis_name):
    """Where the local rows stand among the gathered ones."""
    offset = 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch
    return offset + jnp.arange(batch)
