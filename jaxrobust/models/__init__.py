"""Models as pure functions: `init`, `apply` and `train`, with normalisation inside."""

from jaxrobust.models import convert
from jaxrobust.models.autoencoder import AutoEncoder, autoencoder
from jaxrobust.models.cnn import small_cnn
from jaxrobust.models.convolution import conv2d
from jaxrobust.models.defended import defend, join, part
from jaxrobust.models.efficientnet import (
    efficientnet_lite,
    efficientnet_lite0,
    load_efficientnet_lite0,
)
from jaxrobust.models.filters import jpeg, total_variation
from jaxrobust.models.layers import Mode, normalise
from jaxrobust.models.model import Model, from_linen
from jaxrobust.models.registry import build
from jaxrobust.models.resnet import preact_resnet, preact_resnet18, wide_resnet
from jaxrobust.models.towers import Tower, load_image_tower
from jaxrobust.models.vit import vit, vit_preset

__all__ = [
    "AutoEncoder",
    "Mode",
    "Model",
    "Tower",
    "autoencoder",
    "build",
    "conv2d",
    "convert",
    "defend",
    "efficientnet_lite",
    "efficientnet_lite0",
    "from_linen",
    "join",
    "jpeg",
    "load_efficientnet_lite0",
    "load_image_tower",
    "normalise",
    "part",
    "preact_resnet",
    "preact_resnet18",
    "small_cnn",
    "total_variation",
    "vit",
    "vit_preset",
    "wide_resnet",
]
