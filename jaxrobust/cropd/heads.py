"""The features that a linear head on a defended model sees; `fit_head` then trains the head."""

from functools import partial
from typing import Any

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
    images = check_images(images)
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
