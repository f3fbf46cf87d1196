"""Models as pure functions: `init`, `apply` and `train`, with normalisation inside."""

from jaxrobust.models import convert
from jaxrobust.models.autoencoder import AutoEncoder, autoencoder
from jaxrobust.models.clip import LOGIT_SCALE, MAX_LOGIT_SCALE, Clip, ZeroShot, clip, zero_shot
from jaxrobust.models.clip_files import LoadedClip, load_clip
from jaxrobust.models.clip_resnet import clip_resnet
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
from jaxrobust.models.text import text_encoder
from jaxrobust.models.towers import Tower, load_image_tower
from jaxrobust.models.vit import vit, vit_preset

__all__ = [
    "LOGIT_SCALE",
    "MAX_LOGIT_SCALE",
    "AutoEncoder",
    "Clip",
    "LoadedClip",
    "Mode",
    "Model",
    "Tower",
    "ZeroShot",
    "autoencoder",
    "build",
    "clip",
    "clip_resnet",
    "conv2d",
    "convert",
    "defend",
    "efficientnet_lite",
    "efficientnet_lite0",
    "from_linen",
    "join",
    "jpeg",
    "load_clip",
    "load_efficientnet_lite0",
    "load_image_tower",
    "normalise",
    "part",
    "preact_resnet",
    "preact_resnet18",
    "small_cnn",
    "text_encoder",
    "total_variation",
    "vit",
    "vit_preset",
    "wide_resnet",
    "zero_shot",
]
