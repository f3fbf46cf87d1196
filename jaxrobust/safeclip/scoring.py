"""How similar the image and the caption of every pair are, by the network as it stands."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from tqdm import tqdm

from jaxrobust import parallel
from jaxrobust.attacks.inputs import check_steps, example_keys, fold
from jaxrobust.models import Clip
from jaxrobust.safeclip.steps import Views, caption_views

SCORINGS = ("clean", "augmented")


def similarities(
    clip: Clip,
    variables: Any,
    images: Any,
    tokens: Any,
    *,
    scoring: str = "clean",
    draws: int = 1,
    views: Views | None = None,
    key: jax.Array | None = None,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float[np.ndarray, " n"]:
    """The cosine of image and caption, pair by pair.

    With several processes each one scores its share on its own devices; all get all scores.

    Args:
        clip: the dual encoder, in inference mode.
        variables: its variables.
        images: [n, h, w, c] float32 in [0, 1], an array or `data.StoredImages`.
        tokens: [n, 1 + v, t]: the caption, then views of it.
        scoring: "clean" looks at the pair as it is; "augmented" at one random view of both, as the
            authors' code does, which adds noise.
        draws: how many random views are averaged.
        views: as of the training step; needed for "augmented".
        key: one typed key, likewise; a pair's views do not depend on the other pairs.
        batch_size: pairs at a time, rounded up to a multiple of the devices.
        mesh: this process's devices, over which a batch is spread; one device by default.
        progress: show a progress bar.

    Returns:
        [n] in [-1, 1].

    Raises:
        ValueError: an unknown name, or "augmented" without views or key.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {SCORINGS}, got {scoring!r}")
    if scoring == "augmented" and (views is None or key is None):
        raise ValueError("scoring='augmented' needs views and key")
    check_steps(draws, "draws")
    check_steps(batch_size, "batch_size")
    count, devices = len(images), 1 if mesh is None else mesh.size
    keys = example_keys(jax.random.key(0) if key is None else key, count)
    processes, mine = jax.process_count(), jax.process_index()
    share, size = -(-count // processes), -(-batch_size // devices) * devices
    chosen = np.minimum(np.arange(mine * share, (mine + 1) * share), count - 1)
    # On the host first: a network that lies on the devices of all processes fits no local batch.
    variables = jax.tree.map(np.asarray, variables)
    look = _Look((clip.encode_image, clip.encode_text), views, draws, scoring == "clean")
    found = []
    for start in tqdm(range(0, share, size), "similarities", disable=not progress):
        rows = chosen[np.minimum(np.arange(start, start + size), share - 1)]
        batch = np.asarray(images[rows]), tokens[rows], keys[rows]
        found.append(np.asarray(_run(look, mesh, variables, batch)))
    own = np.concatenate(found)[:share]
    return parallel.from_all_processes(own)[:count].astype(np.float64)


class _Look(NamedTuple):
    """What is compiled for."""

    encoders: tuple[Any, Any]
    views: Views | None
    draws: int
    is_clean: bool

    def __call__(self, variables: Any, batch: tuple, axis_name: str | None) -> jax.Array:
        """[b] cosines."""
        images, tokens, keys = batch
        if self.is_clean:
            return self.cosine(variables, images, tokens[:, 0])

        def one(number: int) -> jax.Array:
            own = fold(keys, number)
            return self.cosine(
                variables, self.views(fold(own, 0), images), caption_views(own, tokens)[0]
            )

        return sum(one(number) for number in range(self.draws)) / self.draws

    def cosine(self, variables: Any, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """[b] cosines of images and captions, row by row."""
        encode_image, encode_text = self.encoders
        return (encode_image(variables, images) * encode_text(variables, tokens)).sum(1)


@partial(jax.jit, static_argnums=(0, 1))
def _run(look, mesh, variables, batch):
    return parallel.map_examples(look, mesh)(variables, batch)
