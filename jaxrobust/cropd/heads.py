"""The features that a linear head on a defended model sees; `fit_head` then trains the head."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from tqdm import tqdm

from jaxrobust import parallel
from jaxrobust.attacks.inputs import check_steps
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
    check_steps(batch_size, "batch_size")
    if defended.config.get("name") != "defended":
        raise ValueError(f"defended must be made by models.defend, got {defended.config}")
    images = check_images(images)
    count = len(images)
    mine = parallel.own_rows(count)
    size = parallel.rounded(min(batch_size, len(mine)), mesh)
    batches = list(parallel.filled(mine, size))
    variables, look = parallel.replicate(variables, mesh), _Look(Features(defended))
    found = [
        np.asarray(_run(look, mesh, variables, images[rows]))
        for rows in tqdm(batches, "features", disable=not progress)
    ]
    return parallel.all_rows(found, count)


class _Look(NamedTuple):
    """What is compiled for."""

    features: Features

    def __call__(self, variables: Any, x: jax.Array, axis_name: str | None) -> jax.Array:
        """[b, d] features."""
        return self.features(variables, x)


@partial(jax.jit, static_argnums=(0, 1))
def _run(look, mesh, variables, x):
    return parallel.map_examples(look, mesh)(variables, x)
