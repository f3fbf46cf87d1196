"""The features that a linear head on a defended model sees; `fit_head` then trains the head."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxrobust import inference
from jaxrobust.data import check_images
from jaxrobust.models import Model
from jaxrobust.models.defended import Features
from jaxrobust.training.linear_head import fit_head

__all__ = ["features", "fit_head"]


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
        mesh: this process's devices, over which a batch is spread; one device by default. With
            several processes each one looks at its share, and all get all features.
        progress: show a progress bar.

    Returns:
        [n, d] float32.

    Raises:
        ValueError: the model is not one of `models.defend`, or batch_size < 1.
    """
    if defended.config.get("name") != "defended":
        raise ValueError(f"defended must be made by models.defend, got {defended.config}")
    images = check_images(images)
    return inference.over_set(
        _Look(Features(defended)), variables, lambda rows: images[rows], len(images),
        batch_size=batch_size, mesh=mesh, progress=progress, label="features",
    )  # fmt: skip


class _Look(NamedTuple):
    """What is compiled for."""

    features: Features

    def __call__(self, variables: Any, x: jax.Array, axis_name: str | None) -> jax.Array:
        """[b, d] features."""
        return self.features(variables, x)
