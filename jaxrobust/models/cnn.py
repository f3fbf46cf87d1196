"""Small convolutional classifiers: strided convolutions, then dense layers."""

from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float

from jaxrobust.models.layers import (
    INFERENCE,
    Conv,
    Dense,
    Mode,
    Point,
    activate,
    check_common,
    check_counts,
    norm_layer,
    normalise,
)
from jaxrobust.models.model import Model, from_linen


class SmallCNN(nn.Module):
    """`conv1`, `conv2`, ..., flatten, `fc1`, ..., `logits`."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    kernel: int
    dense: tuple[int, ...]
    classes: int
    activation: str
    norm: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b classes"]:
        """Logits of a batch of images in [0, 1]."""
        x = normalise(x, self.mean, self.std)
        # A convolution before a normalisation needs no bias of its own.
        bias = self.norm == "none"
        for i, (width, stride) in enumerate(zip(self.channels, self.strides, strict=True), 1):
            x = Conv(width, self.kernel, stride, "SAME", use_bias=bias, name=f"conv{i}")(x, mode)
            x = activate(norm_layer(self.norm, f"bn{i}")(x, mode), self.activation)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.dense, 1):
            x = activate(Dense(width, name=f"fc{i}")(x, mode), self.activation)
        x = Point(name="features")(x)
        return Dense(self.classes, name="logits")(x, mode)


def small_cnn(
    *,
    channels: Sequence[int] = (16, 32),
    strides: Sequence[int] = (2, 2),
    kernel: int = 4,
    dense: Sequence[int] = (100,),
    classes: int = 10,
    activation: str = "relu",
    norm: str = "none",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Model:
    """A strided CNN for small images; any image size, which the dense layers are then tied to.

    Args:
        channels: filters of each convolution.
        strides: stride of each convolution.
        kernel: side of every kernel, in pixels.
        dense: widths of the dense layers between the convolutions and the logits; () for none.
        classes: number of classes.
        activation: "relu", "silu", "gelu" or "tanh".
        norm: "none", "group" or "batch", after every convolution.
        mean: subtracted from the image, one number or one per channel.
        std: divides it, likewise.

    Returns:
        A Model; its taps are conv1, conv2, ..., fc1, ..., before their activation, and features.

    Raises:
        ValueError: a width is not an integer >= 1, `strides` has another length than `channels`, or
            a name is unknown.

    Source: the defaults are the small MNIST net of Wong and Kolter 2018 (166,406 parameters on
        28x28x1).
    """
    check_common(mean=mean, std=std, activation=activation, norm=norm)
    check_counts(kernel=kernel, classes=classes)
    for name, widths in (("channels", channels), ("strides", strides), ("dense", dense)):
        check_counts(**{f"{name}[{i}]": width for i, width in enumerate(widths)})
    if len(channels) != len(strides):
        raise ValueError(f"strides must have {len(channels)} entries, got {tuple(strides)}")
    module = SmallCNN(
        channels=tuple(channels),
        strides=tuple(strides),
        kernel=kernel,
        dense=tuple(dense),
        classes=classes,
        activation=activation,
        norm=norm,
        mean=tuple(mean),
        std=tuple(std),
    )
    return from_linen(module, name="small_cnn")
