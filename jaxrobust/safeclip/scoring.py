"""How far a pair is to be trusted, by the network as it stands."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxrobust import inference
from jaxrobust.attacks.inputs import check_steps
from jaxrobust.keys import example_keys, fold
from jaxrobust.models import Clip
from jaxrobust.safeclip.agreement import agreement
from jaxrobust.safeclip.steps import Views, caption_views

SCORINGS = ("clean", "augmented", "agreement")


def similarities(
    clip: Clip,
    variables: Any,
    images: Any,
    tokens: Any,
    *,
    scoring: str = "clean",
    draws: int = 1,
    neighbours: int = 8,
    views: Views | None = None,
    key: jax.Array | None = None,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float[np.ndarray, " n"]:
    """One score for each pair: the cosine of image and caption, or their neighbours' agreement.

    With several processes each one embeds its share on its own devices; all get all scores.

    Args:
        clip: the dual encoder, in inference mode.
        variables: its variables.
        images: [n, h, w, c] float32 in [0, 1], an array or `data.StoredImages`.
        tokens: [n, 1 + v, t]: the caption, then views of it.
        scoring: "clean" is the cosine of the pair as it is; "augmented" that of one random view of
            both, as in the authors' code, which adds noise; "agreement" asks the pairs around it.
        draws: how many random views are averaged.
        neighbours: that `agreement` asks.
        views: as of the training step; needed for "augmented".
        key: one typed key, likewise; a pair's views do not depend on the other pairs.
        batch_size: pairs at a time, rounded up to a multiple of the devices.
        mesh: this process's devices, over which a batch is spread; one device by default.
        progress: show a progress bar.

    Returns:
        [n], cosines in [-1, 1]; of "agreement", standard deviations.

    Raises:
        ValueError: an unknown name, or "augmented" without views or key.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {SCORINGS}, got {scoring!r}")
    if scoring == "augmented" and (views is None or key is None):
        raise ValueError("scoring='augmented' needs views and key")
    check_steps(draws, "draws")
    look = _Look((clip.encode_image, clip.encode_text), views, draws, scoring)
    keys = example_keys(jax.random.key(0) if key is None else key, len(images))

    def read(rows: np.ndarray) -> tuple:
        return np.asarray(images[rows]), tokens[rows], keys[rows]

    found = inference.over_set(
        look, variables, read, len(images), batch_size=batch_size, mesh=mesh, progress=progress,
        label="scores",
    )  # fmt: skip
    if scoring == "agreement":
        return agreement(*found, neighbours=neighbours, mesh=mesh)
    return found.astype(np.float64)


class _Look(NamedTuple):
    """What is compiled for."""

    encoders: tuple[Callable, Callable]
    views: Views | None
    draws: int
    scoring: str

    def __call__(self, variables: Any, batch: tuple, axis_name: str | None) -> Any:
        """[b] cosines; of "agreement", the [b, d] embeddings of images and of captions."""
        images, tokens, keys = batch
        if self.scoring == "agreement":
            return self.embeddings(variables, images, tokens[:, 0])
        if self.scoring == "clean":
            return self.cosine(variables, images, tokens[:, 0])

        def one(number: int) -> jax.Array:
            own = fold(keys, number)
            return self.cosine(
                variables, self.views(fold(own, 0), images), caption_views(own, tokens)[0]
            )

        return sum(one(number) for number in range(self.draws)) / self.draws

    def embeddings(self, variables: Any, images: jax.Array, tokens: jax.Array) -> tuple:
        """[b, d] of each modality."""
        encode_image, encode_text = self.encoders
        return encode_image(variables, images), encode_text(variables, tokens)

    def cosine(self, variables: Any, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """[b] cosines of images and captions, row by row."""
        image, caption = self.embeddings(variables, images, tokens)
        return (image * caption).sum(1)
