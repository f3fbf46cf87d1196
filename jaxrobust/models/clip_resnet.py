"""CLIP's image ResNet: three-convolution stem, anti-aliased strides, bottlenecks, attention pool.

Names follow the published state dicts but for the shortcut, "downsample.0" and "downsample.1"
there, which is `shortcut` and `shortcut_bn` here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxrobust.models.layers import (
    INFERENCE,
    UNIFORM_FAN_IN,
    Conv,
    Dense,
    Mode,
    Point,
    Stack,
    activate,
    check_common,
    check_counts,
    norm_layer,
    normalise,
)
from jaxrobust.models.model import Model, from_linen

EXPANSION = 4  # of a bottleneck, He et al. 2016a


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut; where there is a stride, both are pooled.

    `bn3` starts at zero, so that a block starts as its shortcut.
    """

    width: int
    stride: int = 1
    norm: str = "batch"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w ci"], mode: Mode = INFERENCE
    ) -> Float[Array, "b oh ow co"]:
        """One residual block."""
        wide = EXPANSION * self.width
        shortcut = x
        if self.stride != 1 or x.shape[-1] != wide:
            shortcut = x if self.stride == 1 else halve(x)
            shortcut = _conv(wide, 1, "shortcut")(shortcut, mode)
            shortcut = norm_layer(self.norm, "shortcut_bn")(shortcut, mode)
        y = _conv(self.width, 1, "conv1")(x, mode)
        y = jax.nn.relu(norm_layer(self.norm, "bn1")(y, mode))
        y = _conv(self.width, 3, "conv2")(y, mode)
        y = jax.nn.relu(norm_layer(self.norm, "bn2")(y, mode))
        y = y if self.stride == 1 else halve(y)
        y = _conv(wide, 1, "conv3")(y, mode)
        return jax.nn.relu(norm_layer(self.norm, "bn3", zero=True)(y, mode) + shortcut)


class AttentionPool(nn.Module):
    """The mean of all pixels asks itself and all pixels; its maps are the tap `maps`.

    out = c_proj( softmax(q k^T / sqrt(d / heads)) v ), q of the mean, k and v of the mean and the
    pixels, positions added to all.
    """

    heads: int
    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], mode: Mode = INFERENCE
    ) -> Float[Array, "b features"]:
        """One vector per image."""
        b, h, w, d = x.shape
        normal = nn.initializers.normal(d**-0.5)
        x = x.reshape(b, h * w, d)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        position = self.param("positional_embedding", normal, (h * w + 1, d), jnp.float32)
        x = x + position.astype(x.dtype)
        split = (-1, self.heads, d // self.heads)
        query = Dense(d, normal, True, name="q_proj")(x[:, 0], mode).reshape(b, *split[1:])
        key = Dense(d, normal, True, name="k_proj")(x, mode).reshape(b, *split)
        value = Dense(d, normal, True, name="v_proj")(x, mode).reshape(b, *split)
        scores = jnp.einsum("bhd,bnhd->bhn", query, key) / split[2] ** 0.5
        wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        maps = Point(name="maps")(jax.nn.softmax(wide, axis=-1))
        out = jnp.einsum("bhn,bnhd->bhd", maps.astype(value.dtype), value)
        return Dense(self.features, normal, True, name="c_proj")(out.reshape(b, d), mode)


class CLIPResNet(nn.Module):
    """`conv1`-`conv3`, `layer1`, `layer2`, ..., `attnpool`, `features`."""

    stages: tuple[int, ...]
    width: int
    heads: int
    projection: int
    norm: str
    remat: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b projection"]:
        """Features of a batch of images in [0, 1]."""
        total = 4 * 2 ** (len(self.stages) - 1)
        if x.shape[1] % total or x.shape[2] % total:
            raise ValueError(f"x must have sides divisible by {total}, got {x.shape[1:3]}")
        x = normalise(x, self.mean, self.std)
        stem = ((self.width // 2, 2), (self.width // 2, 1), (self.width, 1))
        for i, (width, stride) in enumerate(stem, 1):
            x = _conv(width, 3, f"conv{i}", stride)(x, mode)
            x = activate(norm_layer(self.norm, f"bn{i}")(x, mode), "relu")
        x = halve(x)
        for i, blocks in enumerate(self.stages):
            common = {"width": self.width * 2**i, "norm": self.norm}
            first = {**common, "stride": 1 if i == 0 else 2}
            settings = (first, *(common,) * (blocks - 1))
            x = Stack(Bottleneck, settings, self.remat, name=f"layer{i + 1}")(x, mode)
        x = AttentionPool(self.heads, self.projection, name="attnpool")(x, mode)
        return Point(name="features")(x)


def _conv(width: int, kernel: int, name: str, stride: int = 1) -> Conv:
    # PyTorch's default draw, which CLIP's code leaves as it is.
    return Conv(width, kernel, stride, init=UNIFORM_FAN_IN, name=name)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The mean of every 2x2 pixels; both sides must be even."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def clip_resnet(
    stages: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
    heads: int | None = None,
    *,
    projection: int = 1024,
    norm: str = "batch",
    remat: bool = False,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Model:
    """CLIP's "ModifiedResNet"; its learned positions tie it to the image size of its `init`.

    The defaults are RN50; RN101 has stages (3, 4, 23, 3) and projection 512. Published weights were
    trained on 224 pixels; two stages are enough for small images.

    Args:
        stages: bottlenecks of each stage; every stage but the first halves the image.
        width: channels after the stem, an even number; stage i ends at 4 * 2^i * width.
        heads: of the attention pool; None is its width / 64, at least one, as published.
        projection: width of the output.
        norm: "batch" as published, "group" for statistics that do not depend on the batch, or
            "none".
        remat: compute blocks again in the backward pass instead of keeping their inside.
        mean: subtracted from the image, one number or one per channel.
        std: divides it, likewise.

    Returns:
        A Model whose output is [b, projection]; taps: conv1, ..., layer1, layer1.0, ...,
        attnpool.maps [b, heads, 1 + pixels], features.

    Raises:
        ValueError: a count is not an integer >= 1, `width` is odd, there is no stage, or the
            attention pool's width is not a multiple of `heads`.

    Source: Radford et al. 2021, section 2.4; its parts: He et al. 2019 (ResNet-D's stem), Zhang
        2019 (anti-aliasing).
    """
    check_common(mean=mean, std=std, norm=norm)
    check_counts(width=width, projection=projection)
    check_counts(**{f"stages[{i}]": blocks for i, blocks in enumerate(stages)})
    if not stages or width % 2:
        raise ValueError(
            f"stages must not be empty and width be even, got {tuple(stages)} and {width}"
        )
    pooled = EXPANSION * width * 2 ** (len(stages) - 1)
    heads = max(pooled // 64, 1) if heads is None else heads
    check_counts(heads=heads)
    if pooled % heads:
        raise ValueError(f"heads must divide the attention pool's width {pooled}, got {heads}")
    module = CLIPResNet(
        stages=tuple(stages),
        width=width,
        heads=heads,
        projection=projection,
        norm=norm,
        remat=remat,
        mean=tuple(mean),
        std=tuple(std),
    )
    return from_linen(module, name="clip_resnet")
