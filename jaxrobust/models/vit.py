"""Vision transformer: patches, a class token or a mean, attention maps as taps."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxrobust.models.layers import (
    INFERENCE,
    Conv,
    Dense,
    LayerNorm,
    Mode,
    Point,
    Stack,
    activate,
    check_choice,
    check_common,
    check_counts,
    normalise,
)
from jaxrobust.models.model import Model, from_linen

XAVIER = nn.initializers.xavier_uniform()
SMALL_NORMAL = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Multi-head self-attention; its maps are the tap `maps`, [b, heads, n, n], rows sum to one."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], mode: Mode = INFERENCE) -> Float[Array, "b n d"]:
        """softmax(q k^T / sqrt(d / heads)) v, projected."""
        b, n, d = x.shape
        qkv = Dense(3 * d, XAVIER, name="qkv")(x, mode).reshape(b, n, 3, self.heads, -1)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (d // self.heads) ** 0.5
        # In float32 at least: bfloat16 has three digits, too few for a sum over the tokens.
        wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        maps = Point(name="maps")(jax.nn.softmax(wide, axis=-1))
        out = jnp.einsum("bhqk,bkhd->bqhd", maps.astype(value.dtype), value)
        return Dense(d, XAVIER, name="proj")(out.reshape(b, n, d), mode)


class MLP(nn.Module):
    """Two dense layers with a GELU between."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], mode: Mode = INFERENCE) -> Float[Array, "b n d"]:
        """fc2(gelu(fc1(x)))."""
        y = activate(Dense(self.hidden, XAVIER, name="fc1")(x, mode), "gelu")
        return Dense(x.shape[-1], XAVIER, name="fc2")(y, mode)


class EncoderBlock(nn.Module):
    """x <- x + attn(norm1(x)); x <- x + mlp(norm2(x))."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], mode: Mode = INFERENCE) -> Float[Array, "b n d"]:
        """One transformer block."""
        x = x + Attention(self.heads, name="attn")(LayerNorm(name="norm1")(x, mode), mode)
        return x + MLP(self.hidden, name="mlp")(LayerNorm(name="norm2")(x, mode), mode)


class ViT(nn.Module):
    """`patch_embed`, `blocks` ("0", "1", ...), `norm`, `features`, `head`, named as in timm."""

    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    pool: str
    classes: int
    remat: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b classes"]:
        """Logits of a batch of images in [0, 1]."""
        _check_patches(x.shape, self.patch)
        x = normalise(x, self.mean, self.std)
        shape = (self.width, self.patch, self.patch, "VALID")
        x = Conv(*shape, use_bias=True, name="patch_embed")(x, mode)
        x = x.reshape(x.shape[0], -1, self.width)
        if self.pool == "cls":
            token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width), jnp.float32)
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        position = self.param("pos_embed", SMALL_NORMAL, (1, *x.shape[1:]), jnp.float32)
        x = Point(name="tokens")(x + position.astype(x.dtype))
        block: dict[str, Any] = {"heads": self.heads, "hidden": int(self.width * self.mlp_ratio)}
        x = Stack(EncoderBlock, (block,) * self.depth, self.remat, name="blocks")(x, mode)
        x = LayerNorm(name="norm")(x, mode)
        x = Point(name="features")(x[:, 0] if self.pool == "cls" else x.mean(1))
        return Dense(self.classes, SMALL_NORMAL, name="head")(x, mode)


def _check_patches(shape: tuple[int, ...], patch: int) -> None:
    if shape[1] % patch or shape[2] % patch:
        raise ValueError(f"x must have sides divisible by patch = {patch}, got {shape[1:3]}")


def vit(
    patch: int = 16,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    *,
    mlp_ratio: float = 4.0,
    pool: str = "cls",
    classes: int = 10,
    remat: bool = False,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Model:
    """Vision transformer; its learned position embedding ties it to the image size of its `init`.

    The defaults are ViT-B/16. The head starts small but not at zero, as the paper's does: an
    untrained model should have an input gradient.

    Args:
        patch: side of a patch, in pixels; must divide both sides of the image.
        width: of a token; a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: the MLP's hidden width over `width`.
        pool: "cls" (a class token) or "mean" (of all tokens; there is no class token then).
        classes: number of classes.
        remat: compute blocks again in the backward pass instead of keeping their inside.
        mean: subtracted from the image, one number or one per channel.
        std: divides it, likewise.

    Returns:
        A Model; taps: tokens, blocks.0, blocks.0.attn.maps [b, heads, n, n], ..., features, head.

    Raises:
        ValueError: a count is not an integer >= 1, or `width` is not a multiple of `heads`.

    Source: Dosovitskiy et al. 2021.
    """
    check_common(mean=mean, std=std)
    check_choice("pool", pool, ("cls", "mean"))
    check_counts(patch=patch, width=width, depth=depth, heads=heads, classes=classes)
    if width % heads:
        raise ValueError(f"width must be a multiple of heads = {heads}, got {width}")
    if width * mlp_ratio < 1:
        raise ValueError(f"mlp_ratio must be >= 1 / width, got {mlp_ratio}")
    module = ViT(
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        pool=pool,
        classes=classes,
        remat=remat,
        mean=tuple(mean),
        std=tuple(std),
    )
    return from_linen(module, name="vit")


# Dosovitskiy et al. 2021, table 1; Ti and S are DeiT's (Touvron et al. 2021, table 1).
_SIZES = {
    "Ti": {"width": 192, "depth": 12, "heads": 3},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
}


def vit_preset(size: str, **options: Any) -> Model:
    """ViT of a published size, "Ti/16", "S/16", "B/16", "B/32", "L/16", ...; options as `vit`'s."""
    letter, _, patch = size.partition("/")
    if letter not in _SIZES or not patch.isdigit():
        raise ValueError(f"size must be one of {', '.join(_SIZES)} and a patch, B/16; got {size!r}")
    return vit(**{**_SIZES[letter], "patch": int(patch), **options})
