"""Scores of pairs against the same by hand, whatever the batch and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import parallel, safeclip
from jaxrobust.attacks import example_keys
from jaxrobust.keys import fold
from tests.test_safeclip_fit import fit, noisy, recipe
from tests.tiny_clip import SHAPE, WORDS, tiny_clip

N = 21
RANDOM = np.random.default_rng(4)
IMAGES = RANDOM.random((N, *SHAPE), dtype=np.float32)
TOKENS = RANDOM.integers(0, WORDS, (N, 4, 6)).astype(np.int32)
CLIP = tiny_clip()
VARIABLES = CLIP.init(jax.random.key(0), SHAPE)
KEY = jax.random.key(5)


def scores(**options):
    return safeclip.similarities(CLIP, VARIABLES, IMAGES, TOKENS, **options)


def cosine(images, tokens):
    """Of each pair, in numpy."""
    image, text = CLIP.encode_image(VARIABLES, images), CLIP.encode_text(VARIABLES, tokens)
    return np.einsum("nd,nd->n", np.asarray(image, np.float64), np.asarray(text, np.float64))


def test_clean_scores_are_cosines_of_the_pairs_as_they_are():
    np.testing.assert_allclose(scores(), cosine(IMAGES, TOKENS[:, 0]), atol=1e-6)


def test_augmented_scores_are_means_over_drawn_views_of_both():
    keys, expected = example_keys(KEY, N), 0
    for number in range(3):
        own = fold(keys, number)
        texts = safeclip.caption_views(own, jnp.asarray(TOKENS))[0]
        # One of the views, not the caption itself.
        assert (np.asarray(texts)[:, None] == TOKENS[:, 1:]).all(-1).any(-1).all()
        expected = expected + cosine(noisy(fold(own, 0), IMAGES), texts) / 3
    found = scores(scoring="augmented", draws=3, views=noisy, key=KEY)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - scores()).max() > 0.01


@pytest.mark.parametrize("scoring", ["clean", "augmented", "agreement"])
def test_batches_and_devices_change_no_score(scoring):
    options = {"scoring": scoring, "views": noisy, "key": KEY, "draws": 2}
    whole = scores(**options)
    np.testing.assert_allclose(scores(**options, batch_size=4), whole, atol=1e-6)
    many = scores(**options, batch_size=5, mesh=parallel.data_mesh(8))
    np.testing.assert_allclose(many, whole, atol=1e-5)


def test_memory_is_a_running_average_over_epochs():
    # At rate 0 the network stays, and scores differ by their views alone.
    still = {"peak": 0.0, "slow_rate": 0.0, "scoring": "augmented"}
    seen = {}
    for memory in (0.0, 0.3):
        each = seen[memory] = []
        keep = lambda epoch, _, trust, each=each: each.append(trust.scores) or {}  # noqa: E731
        fit(recipe(**still, memory=memory), views=noisy, evaluate=keep)
    expected = seen[0.0][2]
    for fresh, found in zip(seen[0.0][2:], seen[0.3][2:], strict=True):
        expected = 0.3 * expected + 0.7 * fresh
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(seen[0.0][3] - seen[0.3][3]).max() > 1e-3


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"scoring must be one of .* got 'cosine'"):
        scores(scoring="cosine")
    for options in ({"views": noisy}, {"key": KEY}):
        with pytest.raises(ValueError, match="scoring='augmented' needs views and key"):
            scores(scoring="augmented", **options)
