"""Convolutional auto-encoder: an image to a latent code and back to an image in [0, 1]."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxrobust.models.bound import Bound
from jaxrobust.models.layers import (
    INFERENCE,
    Conv,
    Mode,
    Point,
    activate,
    check_choice,
    check_common,
    check_counts,
    norm_layer,
    normalise,
)
from jaxrobust.models.model import MISFITS, Variables, from_linen, images, misfit, shown
from jaxrobust.models.resnet import PreActBlock


class AutoEncoder(NamedTuple):
    """An auto-encoder as pure functions: a `Model` whose output is an image, and its two halves.

    Attributes:
        init: (key, shape=None) -> variables; shape, if given, must be the one it was built for.
        apply: (variables, x, taps=(), perturbations=None, dtype=None) -> [b, h, w, c]
            reconstruction in [0, 1], with the tap "latent" among others. Inference mode.
        train: as `Model.train`, the reconstruction in place of the logits.
        config: JSON-able; `models.build(**config)` makes the same auto-encoder again.
        encode: (variables, x) -> latent, [b, d] or [b, h', w', latent_channels]. Inference mode.
        decode: (variables, latent) -> [b, h, w, c] image in [0, 1]. Inference mode.
    """

    init: Callable[..., dict]
    apply: Callable[..., Any]
    train: Callable[..., Any]
    config: dict[str, Any]
    encode: Callable[..., Array]
    decode: Callable[..., Array]

    def __repr__(self) -> str:
        return shown(self)

    def __hash__(self) -> int:
        return hash(self.apply)


@jax.custom_jvp
def soft_unit(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sigmoid whose derivative is s(z) s(-z), positive for all |z| < 87 in float32.

    The usual s (1 - s) is exactly zero from z = 17 on, where s rounds to one: white pixels would
    then hide their gradient from an attack and the defence look stronger than it is.
    """
    return jax.nn.sigmoid(z)


@soft_unit.defjvp
def _soft_unit_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    return soft_unit(z), jax.nn.sigmoid(z) * jax.nn.sigmoid(-z) * dz


class Encoder(nn.Module):
    """Overlapping patches, a stride-2 residual block per width, norm, 1x1 to the latent."""

    widths: tuple[int, ...]
    patch: int
    latent_channels: int
    latent: str
    latent_norm: bool
    activation: str
    norm: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE) -> Float[Array, "b ..."]:
        """Image (normalised) to latent."""
        stem = Conv(self.widths[0], self.patch + 2, self.patch, padding="SAME", name="stem")
        x = stem(x, mode)
        common = {"activation": self.activation, "norm": self.norm}
        for i, width in enumerate(self.widths, 1):
            x = PreActBlock(width, stride=2, **common, name=f"stage{i}")(x, mode)
        x = activate(norm_layer(self.norm, "bn")(x, mode), self.activation)
        z = Conv(self.latent_channels, 1, use_bias=True, name="to_latent")(x, mode)
        z = _unit_rms(z) if self.latent_norm else z
        return z.reshape(z.shape[0], -1) if self.latent == "flat" else z


def _unit_rms(z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Scale to a root mean square of one per example: sqrt(d) z / norm(z)."""
    wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    power = jnp.square(wide).mean((1, 2, 3), keepdims=True)
    # Under the root, so that an all-zero code has a finite gradient.
    return (wide * jax.lax.rsqrt(power + 1e-12)).astype(z.dtype)


class Decoder(nn.Module):
    """1x1 from the latent, then per stage nearest x2, 3x3, norm, activation; 3x3 to the patches.

    Nearest-neighbour doubling and a convolution instead of a transposed convolution, which leaves
    checkerboards (Odena et al. 2016).
    """

    widths: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    shape: tuple[int, int, int]
    patch: int
    latent_channels: int
    output: str
    activation: str
    norm: str

    @nn.compact
    def __call__(self, z: Float[Array, "b ..."], mode: Mode = INFERENCE) -> Float[Array, "b h w c"]:
        """Latent to image."""
        x = z.reshape(z.shape[0], *self.sizes[-1], self.latent_channels)
        x = Conv(self.widths[-1], 1, use_bias=True, name="from_latent")(x, mode)
        widths = (*self.widths[:-1][::-1], self.widths[0])
        for i, (width, size) in enumerate(zip(widths, self.sizes[:-1][::-1], strict=True), 1):
            x = Conv(width, 3, name=f"conv{i}")(_double(x, size), mode)
            x = activate(norm_layer(self.norm, f"bn{i}")(x, mode), self.activation)
        height, width, channels = self.shape
        x = Conv(channels * self.patch**2, 3, use_bias=True, name="to_image")(x, mode)
        x = _unfold(x, self.patch)[:, :height, :width]
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return soft_unit(x) if self.output == "sigmoid" else x


def _double(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Every pixel twice along both sides, cut to `size`: odd sides were rounded up."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return x[:, : size[0], : size[1]]


def _unfold(x: Float[Array, "b h w n"], patch: int) -> Float[Array, "b h2 w2 c"]:
    """The channels of a place as the patch of pixels that they stand for (Shi et al. 2016)."""
    b, h, w, n = x.shape
    channels = n // patch**2
    x = x.reshape(b, h, w, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, channels)


class ConvAutoEncoder(nn.Module):
    """`encoder`, `latent`, `decoder`."""

    shape: tuple[int, int, int]
    widths: tuple[int, ...]
    patch: int
    latent_channels: int
    latent: str
    latent_norm: bool
    output: str
    activation: str
    norm: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def setup(self) -> None:
        """Name the parts."""
        common = {"activation": self.activation, "norm": self.norm}
        width = {
            "widths": self.widths, "patch": self.patch, "latent_channels": self.latent_channels
        }  # fmt: skip
        code = {"latent": self.latent, "latent_norm": self.latent_norm}
        self.encoder = Encoder(**width, **code, **common)
        self.code = Point(name="latent")
        sizes = stage_sizes(self.shape[:2], len(self.widths), self.patch)
        image = {"sizes": sizes, "shape": self.shape, "output": self.output}
        self.decoder = Decoder(**width, **image, **common)

    def encode(self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE) -> Float[Array, "b ..."]:
        """Image in [0, 1] to latent."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must be [b, {_commas(self.shape)}], got shape {x.shape}")
        return self.code(self.encoder(normalise(x, self.mean, self.std), mode))

    def decode(self, z: Float[Array, "b ..."], mode: Mode = INFERENCE) -> Float[Array, "b h w c"]:
        """Latent to image in [0, 1]."""
        return self.decoder(z, mode)

    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b h w c"]:
        """Reconstruction of a batch of images in [0, 1]."""
        return self.decode(self.encode(x, mode), mode)


def stage_sizes(size: Sequence[int], stages: int, patch: int) -> tuple[tuple[int, int], ...]:
    """((h, w), (h / 2, w / 2), ...) rounded up: sides in patches, before and after each stage."""
    sizes = [(-(-int(size[0]) // patch), -(-int(size[1]) // patch))]
    for _ in range(stages):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return tuple(sizes)


def autoencoder(
    shape: Sequence[int] = (32, 32, 3),
    *,
    widths: Sequence[int] = (64, 128, 256),
    patch: int = 1,
    latent_channels: int = 32,
    latent: str = "flat",
    latent_norm: bool = True,
    output: str = "sigmoid",
    activation: str = "silu",
    norm: str = "group",
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> AutoEncoder:
    """A convolutional auto-encoder for images of one shape.

    The output is never clipped, rounded or converted: each would hide its gradient from an attack
    that goes through the auto-encoder. "sigmoid" stays in [0, 1] by itself, with the derivative of
    `soft_unit`; "linear" leaves the range to what comes after.

    Args:
        shape: (h, w, c) of the images; any sides, equal or not.
        widths: channels after each stride-2 stage.
        patch: side of the squares of pixels that the stem and the last convolution work on; at 2
            both halves take between a quarter and a half of the operations that they take at 1.
        latent_channels: channels of the latent map.
        latent: "flat" [b, d] or "spatial" [b, h', w', latent_channels]; d = h' w' latent_channels.
        latent_norm: scale every latent to norm sqrt(d), so that cosine and distance say the same;
            without it what CRoPD's cosines do not see passes by in the latent's length.
        output: "sigmoid" or "linear".
        activation: "relu", "silu", "gelu" or "tanh".
        norm: "group" (per example: clean and attacked inputs do not share statistics), "batch" or
            "none".
        mean: subtracted from the image before the encoder, one number or one per channel.
        std: divides it, likewise.

    Returns:
        An AutoEncoder; taps: encoder.stem, encoder.stage1, ..., latent, decoder.conv1, ...

    Raises:
        ValueError: shape is not (h, w, c), a count is not an integer >= 1, or a name is unknown.
    """
    check_common(mean=mean, std=std, activation=activation, norm=norm)
    check_choice("latent", latent, ("flat", "spatial"))
    check_choice("output", output, ("sigmoid", "linear"))
    if len(shape) != 3 or not widths:
        raise ValueError(f"shape must be (h, w, c) and widths not empty, got {shape} and {widths}")
    counts = {f"shape[{i}]": n for i, n in enumerate(shape)}
    counts |= {f"widths[{i}]": n for i, n in enumerate(widths)}
    check_counts(latent_channels=latent_channels, patch=patch, **counts)
    module = ConvAutoEncoder(
        shape=tuple(shape),
        widths=tuple(widths),
        patch=patch,
        latent_channels=latent_channels,
        latent=latent,
        latent_norm=latent_norm,
        output=output,
        activation=activation,
        norm=norm,
        mean=tuple(mean),
        std=tuple(std),
    )
    model = from_linen(module, name="autoencoder")
    return AutoEncoder(
        init=Bound(_init, model.init, tuple(shape)),
        apply=model.apply,
        train=model.train,
        config=model.config,
        encode=Bound(_encode, module),
        decode=Bound(_decode, module),
    )


def _init(
    init: Callable[..., dict],
    built: tuple[int, ...],
    key: Array,
    shape: Sequence[int] | None = None,
) -> dict:
    if shape is not None and tuple(shape) != built:
        raise ValueError(f"shape must be {built}, for which this was built, got {tuple(shape)}")
    return init(key, built)


def _encode(module: ConvAutoEncoder, variables: Variables, x: ArrayLike) -> Array:
    return _half(module, "encode", variables, images(x))


def _decode(module: ConvAutoEncoder, variables: Variables, latent: ArrayLike) -> Array:
    height, width = stage_sizes(module.shape[:2], len(module.widths), module.patch)[-1]
    expected = (height, width, module.latent_channels)
    if module.latent == "flat":
        expected = (height * width * module.latent_channels,)
    latent = jnp.asarray(latent)
    if latent.shape[1:] != expected or not jnp.issubdtype(latent.dtype, jnp.floating):
        got = f"shape {latent.shape} of {latent.dtype}"
        raise ValueError(f"latent must be float [b, {_commas(expected)}], got {got}")
    return _half(module, "decode", variables, latent)


def _half(module: ConvAutoEncoder, name: str, variables: Variables, x: Array) -> Array:
    try:
        return module.apply(variables, x, method=name)
    except MISFITS as error:
        raise misfit(module, x, error) from error


def _commas(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers)
