"""Models by name: a saved `config` becomes the same model again."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxrobust.models.autoencoder import AutoEncoder, autoencoder
from jaxrobust.models.clip import Clip, clip
from jaxrobust.models.clip_resnet import clip_resnet
from jaxrobust.models.cnn import small_cnn
from jaxrobust.models.defended import defend
from jaxrobust.models.efficientnet import efficientnet_lite, efficientnet_lite0
from jaxrobust.models.filters import jpeg, total_variation
from jaxrobust.models.layers import check_choice
from jaxrobust.models.model import Model
from jaxrobust.models.resnet import preact_resnet, preact_resnet18, wide_resnet
from jaxrobust.models.text import text_encoder
from jaxrobust.models.vit import vit, vit_preset


def _defended(preprocessor: Mapping | None, foundation: Mapping, **options: Any) -> Model:
    """A defended model from the configurations of its parts."""
    built = None if preprocessor is None else build(**preprocessor)
    return defend(built, foundation=build(**foundation), **options)


def _clip(tower: Mapping, **options: Any) -> Clip:
    """A dual encoder from the configuration of its image tower."""
    return clip(build(**tower), **options)


FACTORIES: Mapping[str, Callable[..., Model | AutoEncoder | Clip]] = {
    "autoencoder": autoencoder,
    "clip": _clip,
    "clip_resnet": clip_resnet,
    "defended": _defended,
    "efficientnet_lite": efficientnet_lite,
    "efficientnet_lite0": efficientnet_lite0,
    "jpeg": jpeg,
    "preact_resnet": preact_resnet,
    "preact_resnet18": preact_resnet18,
    "small_cnn": small_cnn,
    "text_encoder": text_encoder,
    "total_variation": total_variation,
    "vit": vit,
    "vit_preset": vit_preset,
    "wide_resnet": wide_resnet,
}


def build(name: str, **config: Any) -> Model | AutoEncoder | Clip:
    """The model called `name`; `build(**model.config)` makes `model` again, after JSON too.

    Args:
        name: a factory of this package, such as "wide_resnet".
        config: the factory's arguments; those left out take its defaults.

    Returns:
        The model.

    Raises:
        ValueError: the name is unknown, or the factory refuses an argument.
    """
    check_choice("name", name, tuple(FACTORIES))
    return FACTORIES[name](**config)
