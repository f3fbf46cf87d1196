"""A defended model is one function: pre-processor, resize, foundation model and head composed.

    defended = defend(autoencoder, (96, 96), foundation, head=8)
    variables = join(preprocessor=ours, foundation=published, head=fitted)
    logits = defended.apply(variables, x)

Attacks, certificates and reports see this `apply` and nothing of what is inside.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jaxrobust.models.autoencoder import AutoEncoder
from jaxrobust.models.bound import Bound
from jaxrobust.models.layers import check_choice, check_counts
from jaxrobust.models.model import Model, Variables, images

PARTS = ("preprocessor", "foundation", "head")
_KINDS = ("params", "batch_stats")
_HEAD = "head"


def defend(
    preprocessor: Model | AutoEncoder | None,
    resize: int | Sequence[int] | None,
    foundation: Model,
    head: int | None = None,
    *,
    tap: str = "features",
    frozen: Sequence[str] = ("preprocessor", "foundation"),
) -> Model:
    """Composes z = head( features( resize( preprocessor(x) ) ) ) into one model.

    Args:
        preprocessor: images [b, h, w, c] in [0, 1] to images; None for none.
        resize: (height, width) that the foundation model wants, bilinear, with antialiasing where
            it shrinks; (height, width, 3) to give it grey images as three equal channels too; one
            number for squares; None to leave images as they are.
        foundation: a classifier.
        head: classes of a new linear head on the foundation's features; None keeps the
            foundation's own answer ("swap-in").
        tap: the foundation's activation that a new head stands on; averaged over pixels if it is
            [b, h, w, d]. Models of this package call it "features"; in a module of one's own it is
            the path of a submodule, such as "Dense_0".
        frozen: parts that stand still in `training.train_step`: they run in inference mode and
            float32, with BatchNorm's statistics as they are, and neither a gradient nor weight
            decay moves their parameters.

    Returns:
        A Model. Its variables hold those of its parts under their names ("params" ->
        "preprocessor", "foundation", "head"; likewise "batch_stats"), as `join` makes them; its
        taps are those of the parts, "preprocessor.latent", "foundation.features", and the images
        "preprocessed" and "resized".

    Raises:
        TypeError: preprocessor or foundation is no Model.
        ValueError: resize is not two or three integers >= 1, head < 1, or frozen names no part.
    """
    kinds = Model | AutoEncoder | None, Model
    for name, model, kind in zip(PARTS, (preprocessor, foundation), kinds, strict=False):
        if not isinstance(model, kind):
            raise TypeError(
                f"{name} must be a Model, such as models.from_linen(module), got {model!r:.200}"
            )
    if isinstance(resize, int | np.integer):
        resize = (resize, resize)
    if resize is not None:
        if len(resize) not in (2, 3):
            raise ValueError(f"resize must be (height, width[, channels]), got {tuple(resize)}")
        check_counts(**{f"resize[{i}]": n for i, n in enumerate(resize)})
        resize = tuple(int(n) for n in resize)
    if head is not None:
        check_counts(head=head)
        head = int(head)
    for name in frozen:
        check_choice("frozen", name, PARTS)
    parts = _Parts(preprocessor, resize, foundation, head, tap, tuple(frozen))
    return Model(
        init=Bound(_init, parts),
        apply=Bound(_apply, parts),
        train=Bound(_train, parts),
        config={
            "name": "defended",
            "preprocessor": preprocessor and preprocessor.config,
            "resize": resize and list(resize),
            "foundation": foundation.config,
            "head": head,
            "tap": tap,
            "frozen": list(frozen),
        },
    )


def join(**parts: Variables | None) -> dict[str, dict[str, Any]]:
    """The variables of a defended model from those of its parts.

    Args:
        parts: "preprocessor", "foundation" and "head", each {"params": ..., "batch_stats": ...};
            None or left out where the model has no such part.

    Raises:
        ValueError: a name that is no part, or variables without "params".
    """
    for name, variables in parts.items():
        check_choice("parts", name, PARTS)
        if variables is not None and "params" not in variables:
            raise ValueError(
                f'{name} must be variables, {{"params": ..., "batch_stats": ...}}, got a dict of '
                f"{', '.join(map(str, variables)) or 'nothing'}"
            )
    held = {name: variables for name, variables in parts.items() if variables is not None}
    return {
        kind: {name: variables.get(kind, {}) for name, variables in held.items()} for kind in _KINDS
    }


def part(variables: Variables, name: str) -> dict[str, Any]:
    """The variables of one part of a defended model.

    Raises:
        ValueError: the model has no part of this name.
    """
    if name not in (held := tuple(variables["params"])):
        found = ", ".join(held) or "none"
        raise ValueError(
            f"variables must hold a {name}, got {found}: models.join puts parts together"
        )
    return {kind: variables.get(kind, {}).get(name, {}) for kind in _KINDS}


def _own(variables: Variables, name: str, model: Any, x: Array) -> dict[str, Any]:
    """The variables of one part; a filter has none, and a file of weights no place for none."""
    if name not in variables["params"]:
        drawn = jax.eval_shape(lambda: model.init(jax.random.key(0), x.shape[1:]))
        if not jax.tree.leaves(drawn):
            return {kind: {} for kind in _KINDS}
    return part(variables, name)


class Features(NamedTuple):
    """What the head of a defended model sees; equal for the same model, so that it compiles once.

    Attributes:
        defended: of `defend`; its own head, if it has one, is not needed.
    """

    defended: Model

    def __call__(self, variables: Variables, x: ArrayLike) -> Float[Array, "b d"]:
        """The features of x: [b, h, w, c] images in [0, 1]."""
        parts = self.defended.apply.args[0]._replace(head=None)
        tap = f"foundation.{parts.tap}"
        return flat(_apply(parts, variables, x, (tap,))[1][tap])


class _Parts(NamedTuple):
    preprocessor: Model | AutoEncoder | None
    resize: tuple[int, ...] | None
    foundation: Model
    head: int | None
    tap: str
    frozen: tuple[str, ...]


def _init(parts: _Parts, key: Array, shape: Sequence[int]) -> dict:
    """Fresh variables of all parts; the head begins at zero, so that all classes begin equal."""
    keys = jax.random.split(key)
    made = {}
    if parts.preprocessor is not None:
        made["preprocessor"] = parts.preprocessor.init(keys[0], shape)
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    x = jax.eval_shape(partial(_resize, parts), x)
    made["foundation"] = parts.foundation.init(keys[1], x.shape[1:])
    if parts.head is not None:
        features = jax.eval_shape(partial(_features, parts), made["foundation"], x)
        kernel = jnp.zeros((features.shape[1], parts.head))
        made[_HEAD] = {"params": {"kernel": kernel, "bias": jnp.zeros(parts.head)}}
    return join(**made)


def _features(parts: _Parts, variables: Variables, x: Float[Array, "b h w c"]) -> Array:
    return flat(parts.foundation.apply(variables, x, taps=(parts.tap,))[1][parts.tap])


def flat(features: Array) -> Float[Array, "b d"]:
    """Features as a head takes them: averaged over pixels, if they have any."""
    return features.mean((1, 2)) if features.ndim == 4 else features.reshape(len(features), -1)


def _apply(
    parts: _Parts,
    variables: Variables,
    x: ArrayLike,
    taps: Sequence[str] = (),
    perturbations: Mapping[str, ArrayLike] | None = None,
    dtype: DTypeLike | None = None,
) -> Any:
    """Logits in inference mode; arguments and errors as of every model's `apply`."""
    perturbations = perturbations or {}
    held = [name for name in PARTS[:2] if getattr(parts, name) is not None]
    for name in perturbations:
        # One that no part took would change nothing, and the defence would look strong.
        inside = name.partition(".")
        if inside[0] not in held or not inside[2]:
            raise ValueError(
                f"perturbations must name activations inside {' or '.join(held)}, such as "
                f"'foundation.{parts.tap}', got {name!r}"
            )

    def run(name: str, model: Any, x: Array, wanted: Sequence[str]) -> tuple[Array, dict]:
        nudges = _under(name, perturbations)
        # A model of one's own need not know of compute types.
        options = {} if dtype is None else {"dtype": dtype}
        out = model.apply(_own(variables, name, model, x), x, tuple(wanted), nudges, **options)
        return out if wanted else (out, {})

    logits, values = _compose(parts, variables, images(x), taps, run)
    return (logits, values) if taps else logits


def _train(
    parts: _Parts,
    variables: Variables,
    x: ArrayLike,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    dtype: DTypeLike | None = None,
    taps: Sequence[str] = (),
) -> Any:
    """Logits in training mode, and the statistics of the parts that are not frozen."""
    stats = dict(variables.get("batch_stats", {}))

    def run(name: str, model: Any, x: Array, wanted: Sequence[str]) -> tuple[Array, dict]:
        own = _own(variables, name, model, x)
        if name in parts.frozen:
            out = model.apply(jax.lax.stop_gradient(own), x, tuple(wanted))
            return out if wanted else (out, {})
        found = model.train(own, x, axis_name=axis_name, dtype=dtype, taps=tuple(wanted))
        out, stats[name], values = found if wanted else (*found, {})
        return out, values

    logits, values = _compose(parts, variables, images(x), taps, run)
    return (logits, stats, values) if taps else (logits, stats)


def _compose(
    parts: _Parts, variables: Variables, x: Array, taps: Sequence[str], run: Callable
) -> tuple[Array, dict[str, Array]]:
    """(logits, {tap: activation}), with `run(name, model, x, taps)` for the models inside."""
    if isinstance(taps, str):
        raise ValueError(f"taps must be a tuple of names, got the string {taps!r}")
    values = {}

    def stage(name: str, model: Any, x: Array, extra: tuple[str, ...] = ()) -> tuple[Array, dict]:
        wanted = [tap.removeprefix(f"{name}.") for tap in taps if tap.startswith(f"{name}.")]
        out, found = run(name, model, x, (*wanted, *(t for t in extra if t not in wanted)))
        values.update({f"{name}.{tap}": value for tap, value in found.items()})
        return out, found

    if parts.preprocessor is None and "preprocessor" in variables["params"]:
        # It would be taken for defended.
        raise ValueError("variables hold a preprocessor, and the model was made without one")
    if parts.preprocessor is not None:
        x, _ = stage("preprocessor", parts.preprocessor, x)
        values["preprocessed"] = x
    values["resized"] = x = _resize(parts, x)
    extra = () if parts.head is None else (parts.tap,)
    logits, found = stage("foundation", parts.foundation, x, extra)
    if parts.head is not None:
        if _HEAD not in variables["params"]:
            raise ValueError("variables must hold a head: models.join(..., head=...)")
        own = variables["params"][_HEAD]
        if own["bias"].shape != (parts.head,):
            raise ValueError(f"head must have {parts.head} classes, got {own['bias'].shape[0]}")
        own = jax.lax.stop_gradient(own) if _HEAD in parts.frozen else own
        features = flat(found[parts.tap])
        if own["kernel"].shape != (features.shape[1], parts.head):
            raise ValueError(
                f"head must have a kernel {(features.shape[1], parts.head)} for the features "
                f"{parts.tap!r}, got {own['kernel'].shape}"
            )
        logits = features @ own["kernel"] + own["bias"]
    for name in taps:
        check_choice("taps", name, tuple(values))
    return logits, {name: values[name] for name in taps}


def _resize(parts: _Parts, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    if parts.resize is None:
        return x
    channels = (*parts.resize, x.shape[3])[2]
    if x.shape[3] not in (1, channels):
        raise ValueError(f"x must have 1 or {channels} channels, got shape {x.shape}")
    x = jax.image.resize(x, (len(x), *parts.resize[:2], x.shape[3]), "bilinear")
    return jnp.broadcast_to(x, (*x.shape[:3], channels))


def _under(name: str, perturbations: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """Those of one part, by the part's own names."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in perturbations.items() if k.startswith(prefix)}
