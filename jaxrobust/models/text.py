"""CLIP's text transformer: token ids to one vector per text, read at the end-of-text token.

    encoder = text_encoder(vocabulary=49408)
    variables = encoder.init(jax.random.key(0), (77,))
    features = encoder.apply(variables, tokens)          # [b, t] int32, t <= 77

Attention is causal, so what follows the end of a text, its padding above all, changes nothing.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxrobust.models.layers import (
    INFERENCE,
    LayerNorm,
    Mode,
    Point,
    Stack,
    check_common,
    check_counts,
)
from jaxrobust.models.model import Inputs, Model, from_linen
from jaxrobust.models.vit import Draws, EncoderBlock, check_transformer, hidden_width


class TextTransformer(nn.Module):
    """`token_embed`, `pos_embed`, `blocks` ("0", "1", ...), `norm`, `features`."""

    vocabulary: int
    length: int
    width: int
    depth: int
    heads: int
    projection: int
    mlp_ratio: float
    activation: str
    end: int | None
    norm_eps: float
    remat: bool

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"], mode: Mode = INFERENCE) -> Float[Array, "b d"]:
        """Features of a batch of texts."""
        x = self._embedded(tokens, mode)
        block = {
            "heads": self.heads,
            "hidden": hidden_width(self.width, self.mlp_ratio),
            "activation": self.activation,
            "norm_eps": self.norm_eps,
            "causal": True,
            "draws": _draws(self.width, self.depth),
        }
        x = Stack(EncoderBlock, (block,) * self.depth, self.remat, name="blocks")(x, mode)
        last = end_position(tokens, self.end)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        x = LayerNorm(self.norm_eps, name="norm")(x, mode)
        start = nn.initializers.normal(self.width**-0.5)
        kernel = self.param("proj", start, (self.width, self.projection), jnp.float32)
        x, kernel = mode.cast(x, kernel)
        return Point(name="features")(x @ kernel)

    def _embedded(self, tokens: Int[Array, "b t"], mode: Mode) -> Float[Array, "b t d"]:
        t = tokens.shape[1]
        if t > self.length:
            raise ValueError(f"tokens must have at most {self.length} columns, got {t}")
        normal = nn.initializers.normal
        shape = (self.vocabulary, self.width)
        embedding = self.param("token_embed", normal(0.02), shape, jnp.float32)
        shape = (self.length, self.width)
        position = self.param("pos_embed", normal(0.01), shape, jnp.float32)
        # An id that the table lacks becomes NaN: clamped to the last one, it would be the end of
        # the text, and a tokenizer of another vocabulary would go unnoticed.
        rows = jnp.take(embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        rows, position = mode.cast(rows, position[:t])
        return rows + position


def _draws(width: int, depth: int) -> Draws:
    """What CLIP's own code starts from: branches that add up to a variance of one at the end."""
    branch = nn.initializers.normal((2 * depth * width) ** -0.5)
    qkv, fc1 = nn.initializers.normal(width**-0.5), nn.initializers.normal((2 * width) ** -0.5)
    return Draws(qkv=qkv, proj=branch, fc1=fc1, fc2=branch, uniform_bias=True)


def end_position(tokens: Int[Array, "b t"], end: int | None = None) -> Int[Array, " b"]:
    """The column at which each text is read.

    Args:
        tokens: [b, t] ids.
        end: id of the end-of-text token, whose first place counts, or the last column where it does
            not occur; None takes the first place of a row's largest id, as CLIP does, whose
            vocabulary has the end of a text last.

    Returns:
        [b] columns.
    """
    if end is None:
        return tokens.argmax(1)
    found = tokens == end
    return jnp.where(found.any(1), found.argmax(1), tokens.shape[1] - 1)


def texts(tokens: ArrayLike, name: str = "tokens") -> Array:
    """Return the tokens as an array, or an error where they are not a batch of ids."""
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integer ids, got {tokens.dtype}")
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"{name} must be [b, t], got shape {tokens.shape}")
    return tokens


TOKENS = Inputs(texts, ("t",), jnp.int32)


def text_encoder(
    *,
    vocabulary: int,
    projection: int = 512,
    length: int = 77,
    width: int = 512,
    depth: int = 12,
    heads: int = 8,
    mlp_ratio: float = 4.0,
    activation: str = "quick_gelu",
    end: int | None = None,
    norm_eps: float = 1e-5,
    remat: bool = False,
) -> Model:
    """CLIP's text transformer; the defaults are those of its ViT-B models.

    Weights start as in CLIP's own code: N(0, s^2) with s = 0.02 (tokens), 0.01 (positions),
    width^-1/2 (attention's input and the projection), (2 depth width)^-1/2 (ends of branches) and
    (2 width)^-1/2 (the MLP's first layer).

    Args:
        vocabulary: number of token ids.
        projection: width of the output.
        length: of the longest text in tokens, both its ends included; shorter rows are fine.
        width: of a token; a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: the MLP's hidden width over `width`.
        activation: of the MLPs: OpenAI's "quick_gelu", or "gelu" as in most of OpenCLIP's.
        end: see `end_position`.
        norm_eps: of the layer normalisations, > 0.
        remat: compute blocks again in the backward pass instead of keeping their inside.

    Returns:
        A Model of tokens [b, t] int in place of images, whose `init` takes (key, (t,)); its output
        is [b, projection], not normalised, and NaN where an id is not below `vocabulary`. Taps:
        blocks.0, blocks.0.attn.maps [b, heads, t, t], ..., norm, features.

    Raises:
        ValueError: a count is not an integer >= 1, `width` is not a multiple of `heads`, `end` is
            no id of the vocabulary, or mlp_ratio or norm_eps is not finite and > 0.

    Source: Radford et al. 2021, section 2.4.
    """
    check_common(mean=(0.0,), std=(1.0,), activation=activation)
    check_counts(vocabulary=vocabulary, projection=projection, length=length)
    check_counts(width=width, depth=depth, heads=heads)
    check_transformer(width, heads, mlp_ratio, norm_eps)
    if end is not None and end not in range(vocabulary):
        raise ValueError(f"end must be an id below vocabulary = {vocabulary}, got {end}")
    module = TextTransformer(
        vocabulary=vocabulary,
        length=length,
        width=width,
        depth=depth,
        heads=heads,
        projection=projection,
        mlp_ratio=mlp_ratio,
        activation=activation,
        end=end,
        norm_eps=norm_eps,
        remat=remat,
    )
    return from_linen(module, name="text_encoder", inputs=TOKENS)
