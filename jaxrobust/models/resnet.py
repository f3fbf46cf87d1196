"""Residual networks with pre-activation: PreActResNet and WideResNet, as robustness is measured on.

Names follow the published state dicts, so that published weights map one to one: take
"block1.layer.0.conv1.weight", drop ".layer", write "shortcut" for "convShortcut" and "shortcut.0",
and the rest is the path of our parameter ("kernel" or "scale" for "weight", "mean" and "var" for
"running_mean" and "running_var"). A normalisation is called `bn1` whichever its kind.
"""

from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float

from jaxrobust.models.layers import (
    INFERENCE,
    Conv,
    Dense,
    Mode,
    Point,
    Stack,
    activate,
    check_choice,
    check_common,
    check_counts,
    norm_layer,
    normalise,
)
from jaxrobust.models.model import Model, from_linen


class PreActBlock(nn.Module):
    """Out = shortcut + conv2(act(bn2(conv1(act(bn1(x)))))), He et al. 2016b, figure 1b.

    A block that keeps the shape has the identity for shortcut. Any other convolves with
    `shortcut_kernel`, from the activated input (TRADES, AWP) or from the raw one (RobustBench's
    PreActBlock).
    """

    width: int
    stride: int = 1
    activation: str = "relu"
    norm: str = "group"
    shortcut_from: str = "activated"
    shortcut_kernel: int = 1
    padding: str = "symmetric"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w ci"], mode: Mode = INFERENCE
    ) -> Float[Array, "b oh ow co"]:
        """One residual block."""
        active = activate(norm_layer(self.norm, "bn1")(x, mode), self.activation)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.width:
            source = active if self.shortcut_from == "activated" else x
            shape = (self.width, self.shortcut_kernel, self.stride, self.padding)
            shortcut = Conv(*shape, name="shortcut")(source, mode)
        y = Conv(self.width, 3, self.stride, self.padding, name="conv1")(active, mode)
        y = activate(norm_layer(self.norm, "bn2")(y, mode), self.activation)
        return shortcut + Conv(self.width, 3, 1, self.padding, name="conv2")(y, mode)


def stage(blocks: int, stride: int, name: str, *, remat: bool, **setting: object) -> Stack:
    """`blocks` blocks of which the first has the stride."""
    settings = tuple({**setting, "stride": stride if i == 0 else 1} for i in range(blocks))
    return Stack(PreActBlock, settings, remat, name=name)


class PreActResNet(nn.Module):
    """`conv1`, `layer1` to `layer4`, `bn` if `final_norm`, `features` (pixel mean), `linear`."""

    stages: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int
    activation: str
    norm: str
    final_norm: bool
    shortcut_from: str
    shortcut_kernel: int
    padding: str
    remat: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b classes"]:
        """Logits of a batch of images in [0, 1]."""
        common = {name: getattr(self, name) for name in _BLOCK_FIELDS}
        x = normalise(x, self.mean, self.std)
        x = Conv(self.widths[0], 3, name="conv1")(x, mode)
        for i, (blocks, width) in enumerate(zip(self.stages, self.widths, strict=True), 1):
            stride = 1 if i == 1 else 2
            x = stage(blocks, stride, f"layer{i}", remat=self.remat, width=width, **common)(x, mode)
        if self.final_norm:
            x = activate(norm_layer(self.norm, "bn")(x, mode), self.activation)
        x = Point(name="features")(x.mean((1, 2)))
        return Dense(self.classes, name="linear")(x, mode)


_BLOCK_FIELDS = ("activation", "norm", "shortcut_from", "shortcut_kernel", "padding")


class WideResNet(nn.Module):
    """`conv1`, `block1` to `block3`, `bn1`, `features` (mean over pixels), `fc`."""

    depth: int
    width: int
    classes: int
    activation: str
    norm: str
    padding: str
    remat: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b classes"]:
        """Logits of a batch of images in [0, 1]."""
        common = {name: getattr(self, name) for name in ("activation", "norm", "padding")}
        blocks = (self.depth - 4) // 6
        x = normalise(x, self.mean, self.std)
        x = Conv(16, 3, name="conv1")(x, mode)
        for i, width in enumerate((16 * self.width, 32 * self.width, 64 * self.width), 1):
            stride = 1 if i == 1 else 2
            x = stage(blocks, stride, f"block{i}", remat=self.remat, width=width, **common)(x, mode)
        x = activate(norm_layer(self.norm, "bn1")(x, mode), self.activation)
        x = Point(name="features")(x.mean((1, 2)))
        return Dense(self.classes, name="fc")(x, mode)


def preact_resnet(
    *,
    stages: Sequence[int] = (2, 2, 2, 2),
    widths: Sequence[int] = (64, 128, 256, 512),
    classes: int = 10,
    activation: str = "relu",
    norm: str = "group",
    final_norm: bool = True,
    shortcut_from: str = "activated",
    shortcut_kernel: int = 1,
    padding: str = "symmetric",
    remat: bool = False,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Model:
    """PreActResNet for small images: a 3x3 stem without pooling, then stages of PreActBlocks.

    Published variants differ; what to set for the usual ones, all with norm="batch":
    AWP: the defaults. RobustBench PreActBlock: final_norm=False, shortcut_from="input"; its
    PreActBlockV2: final_norm as its `bn_before_fc`. DeepMind (Rebuffi 2021, Gowal 2021):
    shortcut_from="input", shortcut_kernel=3, padding="SAME", activation="silu".

    Args:
        stages: blocks in each stage; every stage but the first halves the image.
        widths: channels of each stage; the stem has those of the first.
        classes: number of classes.
        activation: "relu", "silu", "gelu" or "tanh".
        norm: "group" (per example), "batch" or "none".
        final_norm: normalise and activate before the mean over pixels.
        shortcut_from: "activated" or "input": where a block's shortcut convolution reads.
        shortcut_kernel: side of that convolution, in pixels.
        padding: "symmetric" (PyTorch's) or "SAME" (TensorFlow's); differs where the stride is 2.
        remat: compute blocks again in the backward pass instead of keeping their inside.
        mean: subtracted from the image, one number or one per channel.
        std: divides it, likewise.

    Returns:
        A Model; taps: conv1, layer1, layer1.0, layer1.0.conv1, ..., features, linear.

    Raises:
        ValueError: a count is not an integer >= 1, the lengths differ, or a name is unknown.

    Source: He et al. 2016b; Wu et al. 2020 (AWP) for the variant of the defaults.
    """
    check_common(mean=mean, std=std, activation=activation, norm=norm)
    check_choice("shortcut_from", shortcut_from, ("activated", "input"))
    check_choice("padding", padding, ("symmetric", "SAME"))
    check_counts(classes=classes, shortcut_kernel=shortcut_kernel)
    for name, counts in (("stages", stages), ("widths", widths)):
        check_counts(**{f"{name}[{i}]": n for i, n in enumerate(counts)})
    if len(stages) != len(widths) or not stages:
        raise ValueError(f"widths must have {len(stages)} entries, got {tuple(widths)}")
    module = PreActResNet(
        stages=tuple(stages),
        widths=tuple(widths),
        classes=classes,
        activation=activation,
        norm=norm,
        final_norm=final_norm,
        shortcut_from=shortcut_from,
        shortcut_kernel=shortcut_kernel,
        padding=padding,
        remat=remat,
        mean=tuple(mean),
        std=tuple(std),
    )
    return from_linen(module, name="preact_resnet")


def preact_resnet18(**options: object) -> Model:
    """PreActResNet-18, 11.17 M parameters; options as `preact_resnet`'s."""
    return preact_resnet(**{"stages": (2, 2, 2, 2), "widths": (64, 128, 256, 512), **options})


def wide_resnet(
    depth: int = 28,
    width: int = 10,
    *,
    classes: int = 10,
    activation: str = "relu",
    norm: str = "group",
    padding: str = "symmetric",
    remat: bool = False,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Model:
    """WideResNet-`depth`-`width` in the layout of TRADES and RobustBench.

    For published weights norm="batch"; DeepMind's nets besides have padding="SAME" and their own
    mean, std and activation="silu".

    Args:
        depth: 6 n + 4 for n blocks in each of the three stages.
        width: widening factor; the stages have 16, 32 and 64 times as many channels.
        classes: number of classes.
        activation: "relu", "silu", "gelu" or "tanh".
        norm: "group" (per example), "batch" or "none".
        padding: "symmetric" (PyTorch's) or "SAME" (TensorFlow's); differs where the stride is 2.
        remat: compute blocks again in the backward pass instead of keeping their inside.
        mean: subtracted from the image, one number or one per channel.
        std: divides it, likewise.

    Returns:
        A Model; taps: conv1, block1, block1.0, block1.0.conv1, ..., features, fc.

    Raises:
        ValueError: depth is not 6 n + 4, a count is not an integer >= 1, or a name is unknown.

    Source: Zagoruyko and Komodakis 2016; Zhang et al. 2019 (TRADES) for the layout.
    """
    check_common(mean=mean, std=std, activation=activation, norm=norm)
    check_choice("padding", padding, ("symmetric", "SAME"))
    check_counts(depth=depth, width=width, classes=classes)
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 with n >= 1 (10, 16, 28, 34, ...), got {depth}")
    module = WideResNet(
        depth=depth,
        width=width,
        classes=classes,
        activation=activation,
        norm=norm,
        padding=padding,
        remat=remat,
        mean=tuple(mean),
        std=tuple(std),
    )
    return from_linen(module, name="wide_resnet")
