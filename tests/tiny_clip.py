"""A dual encoder small enough for tests: one matrix for images, one for words, no compilation."""

import jax
import jax.numpy as jnp

from jaxrobust import losses, models

SHAPE, WORDS, WIDTH = (4, 4, 1), 12, 5


def tiny_clip():
    """Images by a matrix of pixels, captions by the mean of their words' vectors."""

    def encode_image(variables, x, taps=()):
        flat = jnp.asarray(x).reshape(len(x), -1)
        return losses.unit_rows(flat @ variables["params"]["image"])

    def encode_text(variables, tokens, taps=()):
        words = jax.nn.one_hot(tokens, WORDS).mean(1)
        return losses.unit_rows(words @ variables["params"]["text"])

    def train(variables, images, tokens, *, axis_name=None, dtype=None):
        return encode_image(variables, images), encode_text(variables, tokens), {}

    def init(key, shape=SHAPE):
        one, two = jax.random.split(key)
        pixels = shape[0] * shape[1] * shape[2]
        params = {
            "image": jax.random.normal(one, (pixels, WIDTH)),
            "text": jax.random.normal(two, (WORDS, WIDTH)),
            "logit_scale": jnp.full((), jnp.log(1 / 0.07), jnp.float32),
        }
        return {"params": params, "batch_stats": {}}

    return models.Clip(init, encode_image, encode_text, train, {"name": "tiny", "dim": WIDTH})
