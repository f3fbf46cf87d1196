"""Vision transformer: patches, a class token or a mean, attention maps as taps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


class Draws(NamedTuple):
    """What the matrices of a block start from; its biases start at zero, or the MLP's as PyTorch's.

    Attributes:
        qkv: initialiser of the attention's input matrix.
        proj: of its output matrix.
        fc1: of the MLP's first matrix.
        fc2: of its second.
        uniform_bias: whether the MLP's biases start from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
    """

    qkv: Callable[..., Array] = XAVIER
    proj: Callable[..., Array] = XAVIER
    fc1: Callable[..., Array] = XAVIER
    fc2: Callable[..., Array] = XAVIER
    uniform_bias: bool = False


class Attention(nn.Module):
    """Multi-head self-attention; its maps are the tap `maps`, [b, heads, n, n], rows sum to one.

    With `causal`, a token sees itself and those before it.
    """

    heads: int
    causal: bool = False
    draws: Draws = Draws()

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], mode: Mode = INFERENCE) -> Float[Array, "b n d"]:
        """softmax(q k^T / sqrt(d / heads)) v, projected."""
        b, n, d = x.shape
        qkv = Dense(3 * d, self.draws.qkv, name="qkv")(x, mode).reshape(b, n, 3, self.heads, -1)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (d // self.heads) ** 0.5
        # In float32 at least: bfloat16 has three digits, too few for a sum over the tokens.
        wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        if self.causal:
            wide = jnp.where(jnp.tri(n, dtype=bool), wide, -jnp.inf)
        maps = Point(name="maps")(jax.nn.softmax(wide, axis=-1))
        out = jnp.einsum("bhqk,bkhd->bqhd", maps.astype(value.dtype), value)
        return Dense(d, self.draws.proj, name="proj")(out.reshape(b, n, d), mode)


class MLP(nn.Module):
    """Two dense layers with an activation between."""

    hidden: int
    activation: str = "gelu"
    draws: Draws = Draws()

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], mode: Mode = INFERENCE) -> Float[Array, "b n d"]:
        """fc2(act(fc1(x)))."""
        draws = self.draws
        y = Dense(self.hidden, draws.fc1, draws.uniform_bias, name="fc1")(x, mode)
        y = activate(y, self.activation)
        return Dense(x.shape[-1], draws.fc2, draws.uniform_bias, name="fc2")(y, mode)


class LayerScale(nn.Module):
    """A learned factor per channel at the end of a branch (Touvron et al. 2021, CaiT)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Gamma * x."""
        gamma = self.param("gamma", nn.initializers.constant(1e-5), (x.shape[-1],), jnp.float32)
        return x * gamma.astype(x.dtype)


class EncoderBlock(nn.Module):
    """x <- x + ls1(attn(norm1(x))); x <- x + ls2(mlp(norm2(x))); ls is 1 without `layer_scale`."""

    heads: int
    hidden: int
    activation: str = "gelu"
    norm_eps: float = 1e-6
    layer_scale: bool = False
    causal: bool = False
    draws: Draws = Draws()

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], mode: Mode = INFERENCE) -> Float[Array, "b n d"]:
        """One transformer block."""
        y = LayerNorm(self.norm_eps, name="norm1")(x, mode)
        y = Attention(self.heads, self.causal, self.draws, name="attn")(y, mode)
        x = x + (LayerScale(name="ls1")(y) if self.layer_scale else y)
        y = LayerNorm(self.norm_eps, name="norm2")(x, mode)
        y = MLP(self.hidden, self.activation, self.draws, name="mlp")(y, mode)
        return x + (LayerScale(name="ls2")(y) if self.layer_scale else y)


class ViT(nn.Module):
    """`patch_embed`, `blocks` ("0", "1", ...), `norm`, `features`, `head`, named as in timm."""

    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    pool: str
    classes: int | None
    activation: str
    norm_eps: float
    pre_norm: bool
    patch_bias: bool
    layer_scale: bool
    registers: int
    embed_class: bool
    projection: int | None
    remat: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b classes"]:
        """Logits of a batch of images in [0, 1], or features without classes."""
        _check_patches(x.shape, self.patch)
        x = normalise(x, self.mean, self.std)
        shape = (self.width, self.patch, self.patch, "VALID")
        x = Conv(*shape, use_bias=self.patch_bias, name="patch_embed")(x, mode)
        x = Point(name="tokens")(self._tokens(x.reshape(x.shape[0], -1, self.width)))
        if self.pre_norm:
            x = LayerNorm(self.norm_eps, name="norm_pre")(x, mode)
        block: dict[str, Any] = {
            "heads": self.heads,
            "hidden": hidden_width(self.width, self.mlp_ratio),
            "activation": self.activation,
            "norm_eps": self.norm_eps,
            "layer_scale": self.layer_scale,
        }
        x = Stack(EncoderBlock, (block,) * self.depth, self.remat, name="blocks")(x, mode)
        x = LayerNorm(self.norm_eps, name="norm")(x, mode)
        x = x[:, 0] if self.pool == "cls" else x[:, self.registers :].mean(1)
        if self.projection is not None:
            kernel = self.param("proj", XAVIER, (self.width, self.projection), jnp.float32)
            x, kernel = mode.cast(x, kernel)
            x = x @ kernel
        x = Point(name="features")(x)
        if self.classes is None:
            return x
        return Dense(self.classes, SMALL_NORMAL, name="head")(x, mode)

    def _tokens(self, patches: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        """Class token, registers, patches; positions on all but the registers."""
        b, count, width = patches.shape
        zeros = nn.initializers.zeros
        row = lambda v: jnp.broadcast_to(v.astype(patches.dtype), (b, *v.shape[1:]))  # noqa: E731
        first = self.pool == "cls"
        length = count + (first and self.embed_class)
        if self.has_variable("params", "pos_embed"):
            built = self.get_variable("params", "pos_embed").shape[1]
            if built != length:
                raise ValueError(
                    f"x must have the size of `init`, which gives {built} positions, "
                    f"got {length} from {count} patches"
                )
        position = self.param("pos_embed", SMALL_NORMAL, (1, length, width), jnp.float32)
        position = position.astype(patches.dtype)
        parts = [patches + position[:, length - count :]]
        if self.registers:
            shape = (1, self.registers, width)
            parts.insert(0, row(self.param("reg_token", SMALL_NORMAL, shape, jnp.float32)))
        if first:
            token = row(self.param("cls_token", zeros, (1, 1, width), jnp.float32))
            parts.insert(0, token + position[:, : length - count].sum(1, keepdims=True))
        return jnp.concatenate(parts, axis=1)


def hidden_width(width: int, mlp_ratio: float) -> int:
    """The MLP's hidden width: rounded down, as timm's, but not for the last digit of a quotient."""
    return math.floor(width * mlp_ratio + 1e-6)


def check_transformer(width: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
    """Raise ValueError where the numbers of a transformer do not fit."""
    if width % heads:
        raise ValueError(f"width must be a multiple of heads = {heads}, got {width}")
    if not 1 <= width * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio must be >= 1 / width and finite, got {mlp_ratio}")
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps must be > 0 and finite, got {norm_eps}")


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
    classes: int | None = 10,
    activation: str = "gelu",
    norm_eps: float = 1e-6,
    pre_norm: bool = False,
    patch_bias: bool = True,
    layer_scale: bool = False,
    registers: int = 0,
    embed_class: bool = True,
    projection: int | None = None,
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
        classes: number of classes; None ends at the features.
        activation: of the MLPs: "gelu", or CLIP's "quick_gelu".
        norm_eps: of the layer normalisations, > 0.
        pre_norm: a layer normalisation before the first block, as CLIP's.
        patch_bias: whether the patch embedding has a bias; CLIP's has none.
        layer_scale: a learned factor per channel at the end of each branch, as DINOv2's.
        registers: further tokens that only the attention sees, as in DINOv2 "with registers".
        embed_class: whether the class token has a position of its own.
        projection: width of a last linear map of the features, as CLIP's; None for none.
        remat: compute blocks again in the backward pass instead of keeping their inside.
        mean: subtracted from the image, one number or one per channel.
        std: divides it, likewise.

    Returns:
        A Model; taps: tokens, blocks.0, blocks.0.attn.maps [b, heads, n, n], ..., features, head.

    Raises:
        ValueError: a count is not an integer >= 1 (registers: >= 0), `width` is not a multiple of
            `heads`, or mlp_ratio or norm_eps is not finite and > 0.

    Source: Dosovitskiy et al. 2021.
    """
    check_common(mean=mean, std=std, activation=activation)
    check_choice("pool", pool, ("cls", "mean"))
    check_counts(patch=patch, width=width, depth=depth, heads=heads)
    optional = {"classes": classes, "projection": projection}
    check_counts(**{name: n for name, n in optional.items() if n is not None})
    if not isinstance(registers, int | np.integer) or registers < 0:
        raise ValueError(f"registers must be an integer >= 0, got {registers!r}")
    check_transformer(width, heads, mlp_ratio, norm_eps)
    module = ViT(
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        pool=pool,
        classes=classes,
        activation=activation,
        norm_eps=norm_eps,
        pre_norm=pre_norm,
        patch_bias=patch_bias,
        layer_scale=layer_scale,
        registers=registers,
        embed_class=embed_class,
        projection=projection,
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
