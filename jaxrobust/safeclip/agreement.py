"""Whether similar images have similar captions: a score of pairs that needs no image-text training.

    scores = agreement(image_embeddings, caption_embeddings)      # [n], the higher the safer

Embeddings of the unimodal phase will do: no poison has ever tied its image to its caption in them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxrobust import inference
from jaxrobust.attacks.inputs import check_steps

# Similarities that a device holds at a time, in each modality: 1 GiB.
_AT_ONCE = 2**28


def agreement(
    images: Any,
    captions: Any,
    *,
    neighbours: int = 8,
    alike: float = 0.995,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "n"]:
    """How well a pair agrees with the pairs around it.

    a_i = mean over the k images nearest to image i of cosine(caption_i, their captions)
    b_i = mean over the k captions nearest to caption i of cosine(image_i, their images)
    score_i = (standardised a_i + standardised b_i) / 2

    The similarity of an image with its own caption, by which SAFECLIP goes, has to be learned from
    pairs that may be poisoned. Neighbours are known before: a poisoned image lies among others of
    its true class, whose captions say so. Copies would vouch for each other and are not asked.

    Args:
        images: [n, d] embeddings, of any length; centred here.
        captions: [n, d'] likewise; row i is the caption of image i.
        neighbours: k >= 1, fewer than n.
        alike: cosine in (0, 1] above which a neighbour counts as a copy and is not asked; 1 asks
            them all.
        mesh: this process's devices, which share the pairs; one device by default. With several
            processes each one compares its share with all, and all get all scores.

    Returns:
        [n] scores of mean 0, in standard deviations. A pair without a neighbour that is no copy
        has the score of one that does not agree at all.

    Raises:
        ValueError: embeddings that are not [n, d] of one length with n > neighbours, or an argument
            out of its range.
    """
    check_steps(neighbours, "neighbours")
    if not 0 < alike <= 1:
        raise ValueError(f"alike must be in (0, 1], got {alike}")
    images, captions = (np.asarray(x, np.float32) for x in (images, captions))
    shapes = images.shape, captions.shape
    if any(len(shape) != 2 for shape in shapes) or len(images) != len(captions):
        raise ValueError(f"images and captions must be [n, d] of one length, got {shapes}")
    if len(images) <= neighbours:
        raise ValueError(f"neighbours must be fewer than the {len(images)} pairs, got {neighbours}")
    x, y = _centred(images), _centred(captions)
    asked = _Asked(neighbours, float(alike))
    one, other = (_standardised(_over(asked, *pair, mesh)) for pair in ((x, y), (y, x)))
    return (one + other) / 2


@jax.jit
def _centred(embeddings: Array) -> Array:
    """Unit rows around the mean: embeddings lie in a narrow cone, whose axis says nothing."""
    x = embeddings - embeddings.mean(0)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _over(asked: "_Asked", near: Array, told: Array, mesh: Mesh | None) -> np.ndarray:
    """[n] mean similarity in one modality to those who are near in the other."""
    count, devices = len(near), 1 if mesh is None else mesh.size
    at_once = devices * max(1, _AT_ONCE // count)
    found = inference.over_set(
        asked, (near, told), lambda rows: rows, count, batch_size=at_once, mesh=mesh
    )
    return found.astype(np.float64)


class _Asked(NamedTuple):
    """What is compiled for."""

    neighbours: int
    alike: float

    def __call__(self, everyone: tuple[Array, Array], rows: Array, axis_name: str | None) -> Array:
        """[b] for some of the rows."""
        near, told = everyone
        closeness = jnp.matmul(near[rows], near.T, precision=jax.lax.Precision.HIGHEST)
        if self.alike < 1:  # a copy's cosine is 1 up to rounding, above it too
            closeness = jnp.where(closeness > self.alike, -jnp.inf, closeness)
        closeness = closeness.at[jnp.arange(len(rows)), rows].set(-jnp.inf)
        closeness, places = jax.lax.top_k(closeness, self.neighbours)
        is_asked = jnp.isfinite(closeness)
        similarity = jnp.einsum("bd,bkd->bk", told[rows], told[places], precision="highest")
        return jnp.where(is_asked, similarity, 0).sum(1) / jnp.maximum(is_asked.sum(1), 1)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(values.std(), 1e-12)
