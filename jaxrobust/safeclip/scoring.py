"""How similar the image and the caption of every pair are, by the network as it stands."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from jaxrobust import parallel
from jaxrobust.attacks.inputs import check_steps, example_keys, fold
from jaxrobust.models import Clip
from jaxrobust.safeclip.steps import Views, text_views

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
    batch_size: int = 250,
    progress: bool = False,
) -> Float[np.ndarray, " n"]:
    """The cosine of image and caption, pair by pair.

    With several processes each one scores its share on its own devices; all get all scores.

    Args:
        clip: the dual encoder, in inference mode.
        variables: its variables.
        images: [n, h, w, c] float32 in [0, 1].
        tokens: [n, 1 + v, t]: the caption, then views of it.
        scoring: "clean" looks at the pair as it is; "augmented" at one random view of both, as the
            authors' code does, which adds noise.
        draws: how many random views are averaged.
        views: as of the training step; needed for "augmented".
        key: one typed key, likewise; a pair's views do not depend on the other pairs.
        batch_size: pairs at a time.
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
    count = len(images)
    keys = None if scoring == "clean" else example_keys(key, count)
    processes, mine = jax.process_count(), jax.process_index()
    share = -(-count // processes)
    chosen = np.minimum(np.arange(mine * share, (mine + 1) * share), count - 1)
    run = partial(_run, clip, views, draws, scoring == "clean")
    found = []
    for start in tqdm(range(0, share, batch_size), "similarities", disable=not progress):
        rows = chosen[np.minimum(np.arange(start, start + batch_size), share - 1)]
        batch = images[rows], tokens[rows], None if keys is None else keys[rows]
        found.append(np.asarray(run(variables, *batch)))
    own = np.concatenate(found)[:share]
    return parallel.from_all_processes(own)[:count].astype(np.float64)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(clip, views, draws, is_clean, variables, images, tokens, keys):
    if is_clean:
        return _cosine(clip, variables, images, tokens[:, 0])

    def one(number):
        own = fold(keys, number)
        texts, _ = text_views(own, tokens)
        return _cosine(clip, variables, views(fold(own, 0), images), texts)

    return sum(one(number) for number in range(draws)) / draws


def _cosine(clip, variables, images, tokens):
    image = clip.encode_image(variables, images)
    return (image * clip.encode_text(variables, tokens)).sum(1)
