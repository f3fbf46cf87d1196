"""CLIP: an image tower and a text transformer that meet on one sphere.

clip = models.clip(models.vit(8, 192, 6, 3, classes=None), vocabulary=tokenizer.vocabulary)
variables = clip.init(jax.random.key(0), (32, 32, 3))
images, texts, batch_stats = clip.train(variables, x, tokens)
logits = zero_shot(clip, class_prototypes)(variables, x)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jaxrobust.losses import unit_rows
from jaxrobust.models.bound import Bound
from jaxrobust.models.layers import check_counts
from jaxrobust.models.model import Model, Variables, jsonable, shown
from jaxrobust.models.text import text_encoder

LOGIT_SCALE = math.log(1 / 0.07)  # where training starts, Radford et al. 2021, section 2.5
MAX_LOGIT_SCALE = math.log(100.0)  # where training clips it, ibid.


class Clip(NamedTuple):
    """A dual encoder as pure functions; all embeddings are float32 rows of length one.

    Attributes:
        init: (key, image_shape=(h, w, c)) -> variables: {"params": {"image", "text", "logit_scale",
            and "projection" if there is one}, "batch_stats": {"image"} or, without BatchNorm, {}}.
        encode_image: (variables, x [b, h, w, c] in [0, 1], taps=()) -> [b, d], or ([b, d],
            {name: activation}) when taps of the image tower are asked for. Inference mode.
        encode_text: (variables, tokens [b, t], taps=()) -> [b, d], likewise.
        train: (variables, images [n, h, w, c], tokens [m, t], *, axis_name=None, dtype=None) ->
            (images [n, d], texts [m, d], batch_stats). Training mode, as `Model.train`.
        config: JSON-able; `models.build(**config)` makes the same model again.
    """

    init: Callable[..., dict]
    encode_image: Callable[..., Any]
    encode_text: Callable[..., Any]
    train: Callable[..., Any]
    config: dict[str, Any]

    def __repr__(self) -> str:
        return shown(self)

    def __hash__(self) -> int:
        return hash(self.encode_image)


def clip(
    tower: Model,
    *,
    vocabulary: int,
    dim: int = 512,
    projection: bool = True,
    length: int = 77,
    width: int = 512,
    depth: int = 12,
    heads: int = 8,
    mlp_ratio: float = 4.0,
    activation: str = "quick_gelu",
    end: int | None = None,
    remat: bool = False,
) -> Clip:
    """A dual encoder of an image tower and CLIP's text transformer.

    Any model whose output is one vector per image is a tower: `vit(classes=None, ...)`,
    `clip_resnet(...)`, or a small CNN, `small_cnn(classes=dim, norm="group", ...)`, whose last
    layer then is the projection.

    Args:
        tower: the image tower.
        vocabulary: number of token ids, of the tokenizer.
        dim: of the joint space.
        projection: a linear map, without bias, from the tower's output to the joint space; False
            where the tower's output has `dim` entries already, as in published models.
        length: of the longest text in tokens.
        width: of the text transformer.
        depth: of the text transformer.
        heads: of the text transformer.
        mlp_ratio: of the text transformer.
        activation: of the text transformer, "quick_gelu" or "gelu".
        end: id of the end-of-text token; None is the largest id in a row, as in CLIP.
        remat: of the text transformer: less memory, about a third more work.

    Returns:
        The model. Its scale, exp(logit_scale), starts at 1 / 0.07; training must keep logit_scale
        within [0, MAX_LOGIT_SCALE].

    Raises:
        ValueError: as `text_encoder`; and at `init`, if the tower's output does not fit.

    Source: Radford et al. 2021, section 2 and figure 3.
    """
    check_counts(dim=dim)
    options = {
        "vocabulary": vocabulary,
        "length": length,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": mlp_ratio,
        "activation": activation,
        "end": end,
        "remat": remat,
    }
    parts = _Parts(tower, text_encoder(projection=dim, **options), dim, projection, length)
    own = {"name": "clip", "tower": tower.config, "dim": int(dim), "projection": projection}
    return Clip(
        init=Bound(_init, parts),
        encode_image=Bound(_encode_image, parts),
        encode_text=Bound(_encode_text, parts),
        train=Bound(_train, parts),
        config={**own, **{name: jsonable(value) for name, value in options.items()}},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroShot:
    """A classifier by the likeness to a prototype per class; called as (variables, x, taps=()).

    Equal for the same model and equal prototypes, so that what is compiled for one serves the
    other. Made by `zero_shot`.

    Attributes:
        clip: the dual encoder.
        prototypes: [classes, d], one embedding per class; None takes variables["prototypes"].
    """

    clip: Clip
    prototypes: np.ndarray | None

    def __call__(self, variables: Variables, x: ArrayLike, taps: Sequence[str] = ()) -> Any:
        """[b, classes] logits of x, [b, h, w, c] images in [0, 1]; and {name: activation}."""
        found = self.clip.encode_image(variables, x, taps)
        images, values = found if taps else (found, {})
        prototypes = variables["prototypes"] if self.prototypes is None else self.prototypes
        # A hundred times a cosine shows every rounded digit of it.
        cosines = jnp.matmul(images, jnp.asarray(prototypes).T, precision="highest")
        logits = jnp.exp(variables["params"]["logit_scale"]) * cosines
        return (logits, values) if taps else logits

    def __hash__(self) -> int:
        """By the model and the prototypes' shape."""
        return hash((self.clip, np.shape(self.prototypes)))

    def __eq__(self, other: object) -> bool:
        """Whether both are the same model with the same prototypes."""
        if not isinstance(other, ZeroShot):
            return False
        same = self.clip == other.clip
        return same and np.array_equal(self.prototypes, other.prototypes)


def zero_shot(clip: Clip, prototypes: ArrayLike | None = None) -> ZeroShot:
    """The classifier that attacks and reports see.

    logits = exp(logit_scale) * encode_image(x) @ prototypes.T

    Args:
        clip: the dual encoder.
        prototypes: [classes, d] one embedding per class, of length one as a rule: the mean over
            prompts of `encode_text`, scaled to length one again. They become constants of what is
            compiled. None reads them from variables["prototypes"] instead: other prototypes then
            cost no new compilation, and attacks may get them as data.

    Returns:
        (variables, x, taps=()) -> [b, classes] logits; inference mode.

    Raises:
        ValueError: prototypes are not [classes, d] with d of the model.
    """
    if prototypes is None:
        return ZeroShot(clip, None)
    prototypes = np.array(prototypes)
    if prototypes.ndim != 2 or prototypes.shape[1] != clip.config["dim"]:
        wanted = f"[classes, {clip.config['dim']}]"
        raise ValueError(f"prototypes must be {wanted}, got shape {prototypes.shape}")
    prototypes.setflags(write=False)
    return ZeroShot(clip, prototypes)


class _Parts(NamedTuple):
    tower: Model
    text: Model
    dim: int
    projection: bool
    length: int


def _init(parts: _Parts, key: Array, image_shape: Sequence[int]) -> dict:
    """Fresh variables for images of `image_shape` (h, w, c), from a typed key."""
    keys = jax.random.split(key, 3)
    image = parts.tower.init(keys[0], image_shape)
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    out = jax.eval_shape(parts.tower.apply, image, x)
    if len(out.shape) != 2:
        raise ValueError(f"tower must give one vector per image, got shape {out.shape[1:]}")
    params = {
        "image": image["params"],
        "text": parts.text.init(keys[1], (parts.length,))["params"],
        "logit_scale": jnp.float32(LOGIT_SCALE),
    }
    if parts.projection:
        features = out.shape[1]
        # As CLIP's own projections: N(0, 1 / width).
        params["projection"] = jax.random.normal(keys[2], (features, parts.dim)) * features**-0.5
    elif out.shape[1] != parts.dim:
        raise ValueError(
            f"dim must be the width of the tower's output, {out.shape[1]}, without a projection, "
            f"got {parts.dim}"
        )
    return {"params": params, "batch_stats": _stats(image.get("batch_stats"))}


def _stats(image: Mapping | None) -> dict:
    return {"image": image} if image else {}


def _image_variables(variables: Variables) -> dict:
    stats = variables.get("batch_stats", {}).get("image", {})
    return {"params": variables["params"]["image"], "batch_stats": stats}


def _joint(params: Mapping, features: Float[Array, "b f"]) -> Float[Array, "b d"]:
    """Features of the image tower as rows of length one in the joint space."""
    return unit_rows(features @ params["projection"] if "projection" in params else features)


def _encode_image(
    parts: _Parts, variables: Variables, x: ArrayLike, taps: Sequence[str] = ()
) -> Any:
    """Embeddings of images; see `Clip`."""
    found = parts.tower.apply(_image_variables(variables), x, taps)
    features, values = found if taps else (found, {})
    rows = _joint(variables["params"], features)
    return (rows, values) if taps else rows


def _encode_text(
    parts: _Parts, variables: Variables, tokens: ArrayLike, taps: Sequence[str] = ()
) -> Any:
    """Embeddings of texts; see `Clip`."""
    found = parts.text.apply({"params": variables["params"]["text"]}, tokens, taps)
    features, values = found if taps else (found, {})
    return (unit_rows(features), values) if taps else unit_rows(features)


def _train(
    parts: _Parts,
    variables: Variables,
    images: ArrayLike,
    tokens: ArrayLike,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Array, dict]:
    """Both embeddings in training mode, and the running statistics; see `Clip`."""
    params, mode = variables["params"], {"axis_name": axis_name, "dtype": dtype}
    features, stats = parts.tower.train(_image_variables(variables), images, **mode)
    texts, _ = parts.text.train({"params": params["text"]}, tokens, **mode)
    return _joint(params, features), unit_rows(texts), _stats(stats)
