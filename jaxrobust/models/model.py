"""A model is a value: pure functions around a Linen module, with activations to read or to nudge.

    model = wide_resnet(depth=28, width=10)
    variables = model.init(jax.random.key(0), (32, 32, 3))
    logits = model.apply(variables, x)
    logits, taps = model.apply(variables, x, taps=("block3", "features"))
    grad = jax.grad(lambda d: model.apply(variables, x, perturbations={"block3": d})[:, 3].sum())

A tap is the output of the submodule of that path ("block3", "block3.0.conv1"), as with a forward
hook in PyTorch. The gradient with respect to a perturbation of zero is the gradient with respect to
the activation (Grad-CAM); maximising a loss over the perturbation is a latent attack.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import (
    InvalidRngError,
    ScopeCollectionNotFound,
    ScopeParamNotFoundError,
    ScopeParamShapeError,
)
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from jaxrobust import identity, parallel
from jaxrobust.models.bound import Bound
from jaxrobust.models.layers import INFERENCE, Mode

Variables = Mapping[str, Any]
_TAPS = "taps"
MISFITS = (ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeParamShapeError)


class Model(NamedTuple):
    """A network as pure functions; equal to another whose functions are.

    Attributes:
        init: (key, shape=(h, w, c)) -> variables: {"params": ...} and, with BatchNorm,
            "batch_stats".
        apply: (variables, x, taps=(), perturbations=None, dtype=None) -> logits, or, when taps are
            asked for, (logits, {name: activation}). Inference mode; x is [b, h, w, c] in [0, 1].
        train: (variables, x, *, axis_name=None, dtype=None, taps=()) -> (logits, batch_stats), and
            {name: activation} third when taps are asked for. Training mode; BatchNorm's statistics
            are those of the batch over all of `axis_name`; `dtype` is the compute dtype
            (jnp.bfloat16); parameters stay float32 and logits come back in float32.
        config: JSON-able; `models.build(**config)` makes the same model again.
    """

    init: Callable[..., dict]
    apply: Callable[..., Any]
    train: Callable[..., Any]
    config: dict[str, Any]

    def __repr__(self) -> str:
        return shown(self)

    def __hash__(self) -> int:
        # Not of the config, which has no hash and follows from the functions.
        return hash(self.apply)


def shown(model: Any) -> str:
    """A model by what its `config` says, its functions left out."""
    fields = ", ".join(f"{name}={value!r}" for name, value in model.config.items())
    return f"{type(model).__name__}({fields})"


class Inputs(NamedTuple):
    """What a network takes.

    Attributes:
        check: (x) -> the array, or a ValueError where it is not such an input.
        axes: of one example, as the shape that `init` takes names them.
        dtype: of the array.
    """

    check: Callable[..., Array]
    axes: tuple[str, ...]
    dtype: Any


def images(x: ArrayLike, name: str = "x") -> Array:
    """Return x as an array, or an error where it is not a batch of float images."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be float in [0, 1], got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be [b, h, w, c], got shape {x.shape}")
    return x


IMAGES = Inputs(images, ("h", "w", "c"), jnp.float32)


def from_linen(module: nn.Module, *, name: str | None = None, inputs: Inputs = IMAGES) -> Model:
    """The pure functions of a Linen module.

    Args:
        module: unbound; its `__call__` takes x [b, h, w, c] and, if it likes, `mode: Mode` (all of
            this package's) or `train: bool` (most others); without either it has one mode. Random
            layers, such as dropout, have no place in a step whose noise is a function of each
            example: training raises a ValueError.
        name: the `config`'s name, by default the module's class. Only names that
            `models.build` knows can be built again from their config.
        inputs: what the module takes in place of images.

    Returns:
        The model.
    """
    call = Bound(_call, module, inputs)
    return Model(
        init=Bound(_init, Bound(_draw, module, inputs), inputs),
        apply=Bound(_apply, call),
        train=Bound(_train, call),
        config=config_of(module, name),
    )


def config_of(module: nn.Module, name: str | None) -> dict[str, Any]:
    """{"name": ..., field: value, ...}, each `jsonable`."""
    fields = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    values = {field: jsonable(getattr(module, field)) for field in fields}
    return {"name": name or type(module).__name__, **values}


def _init(draw: Callable[..., dict], inputs: Inputs, key: Array, shape: Sequence[int]) -> dict:
    """Draw the variables for inputs of `shape`, (h, w, c) of images, from a typed key."""
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError(f"key must be typed, jax.random.key(0), got {key!r}")
    whole = all(isinstance(n, int | np.integer) and n > 0 for n in shape)
    if len(shape) != len(inputs.axes) or not whole:
        axes = f"({', '.join(inputs.axes)}{',' * (len(inputs.axes) == 1)})"
        raise ValueError(f"shape must be {axes}, integers > 0, got {shape}")
    return dict(_drawn(draw, key, tuple(int(n) for n in shape)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _drawn(draw: Callable[..., dict], key: Array, shape: tuple[int, ...]) -> dict:
    # Run eagerly, a large net's forward takes seconds.
    return draw(key, shape)


def _draw(module: nn.Module, inputs: Inputs, key: Array, shape: tuple[int, ...]) -> dict:
    mode = _mode_arguments(module, {}, INFERENCE)
    return module.init(_quick_to_compile(key), jnp.zeros((1, *shape), inputs.dtype), **mode)


def _quick_to_compile(key: Array) -> Array:
    # Every parameter draws by itself, and XLA takes 0.4 s over each Threefry draw on CPU: 7 s for a
    # WideResNet-10. Its own generator ("rbg") compiles in 2 s. Weights are then the same for a seed
    # on one kind of device, and may be another draw on another kind.
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(jnp.resize(data, (4,)), impl="rbg")


def _apply(
    call: Callable[..., Any],
    variables: Variables,
    x: ArrayLike,
    taps: Sequence[str] = (),
    perturbations: Mapping[str, ArrayLike] | None = None,
    dtype: DTypeLike | None = None,
) -> Any:
    """Logits in inference mode.

    Args:
        call: the module's call, bound by `from_linen`.
        variables: "params" and, with BatchNorm, "batch_stats".
        x: [b, h, w, c] float images in [0, 1].
        taps: names of activations to return.
        perturbations: {name: delta}; each delta, of its activation's shape, is added to it before
            the rest of the network sees it.
        dtype: compute dtype, as of `Model.train`; None is that of x and the parameters.

    Returns:
        [b, classes] logits, or (logits, {name: activation}) when `taps` is not empty.

    Raises:
        ValueError: x is not a batch of float images, a tap is unknown, or a delta has another shape
            than its activation.
    """
    logits, _, values = call(variables, x, Mode(dtype=dtype), taps, perturbations or {})
    return (logits, values) if taps else logits


def _train(
    call: Callable[..., Any],
    variables: Variables,
    x: ArrayLike,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    dtype: DTypeLike | None = None,
    taps: Sequence[str] = (),
) -> Any:
    """Logits in training mode and the running statistics after this batch; see `Model.train`."""
    mode = Mode(train=True, axis_name=axis_name, dtype=dtype)
    logits, batch_stats, values = call(variables, x, mode, taps, {})
    return (logits, batch_stats, values) if taps else (logits, batch_stats)


def _call(
    module: nn.Module,
    inputs: Inputs,
    variables: Variables,
    x: ArrayLike,
    mode: Mode,
    taps: Sequence[str],
    perturbations: Mapping[str, ArrayLike],
) -> tuple[Array, dict, dict[str, Array]]:
    """(output, batch_stats, {name: activation}) of one call of the module."""
    if isinstance(taps, str):
        raise ValueError(f"taps must be a tuple of names, got the string {taps!r}")
    x = inputs.check(x)
    watched = bool(taps or perturbations)
    mutable = ["batch_stats"] * mode.train + [_TAPS] * watched
    arguments = _mode_arguments(module, variables, mode)
    run = functools.partial(module.apply, variables, x, **arguments)
    try:
        with nn.intercept_methods(_tapping(perturbations)) if watched else nullcontext():
            out, state = run(mutable=mutable) if mutable else (run(), {})
    except InvalidRngError as error:
        raise ValueError(
            f"module must not draw random numbers, {type(module).__name__} does (dropout?): set "
            "its rate to 0"
        ) from error
    except MISFITS as error:
        raise misfit(module, x, error) from error
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    found = {".".join(path[:-1]): a for path, a in flatten_dict(state.get(_TAPS, {})).items()}
    _check_known("taps", taps, found)
    _check_known("perturbations", perturbations, found)
    stats = dict(state.get("batch_stats", {}))
    if "mode" not in arguments:
        # Of one device alone, which `shard_map` cannot see.
        stats = parallel.mean(stats, mode.axis_name)
    return out, stats, {name: found[name] for name in taps}


def misfit(module: nn.Module, x: Array, error: Exception) -> ValueError:
    """What to say of variables that are not the module's, of one of Flax's `MISFITS`."""
    why = str(error).partition(" (http")[0]
    return ValueError(
        f'variables must be {{"params": ...}} of a {type(module).__name__} for inputs of shape '
        f"{x.shape[1:]}: {why}"
    )


def _mode_arguments(module: nn.Module, variables: Variables, mode: Mode) -> dict[str, Any]:
    known = inspect.signature(type(module).__call__).parameters
    if "mode" in known:
        return {"mode": mode}
    if mode.dtype is not None:
        raise ValueError(f"dtype needs a module whose call takes `mode`, got {type(module)}")
    several = mode.axis_name is not None and jax.lax.axis_size(mode.axis_name) > 1
    if several and variables.get("batch_stats"):
        # Its statistics would be those of one device, and differ between the devices.
        raise ValueError(
            f"a module with batch statistics whose call takes no `mode`, {type(module)}, trains on "
            "one device, or on several with mapping='jit'"
        )
    return {"train": mode.train} if "train" in known else {}


def _tapping(perturbations: Mapping[str, ArrayLike]) -> Callable[..., Any]:
    """An interceptor that nudges and records what every submodule returns."""

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        name = ".".join(context.module.path)
        if context.method_name != "__call__" or not name or not isinstance(out, jax.Array):
            return out
        if name in perturbations:
            out = _nudge(name, out, perturbations[name])
        keep_last = {"init_fn": lambda: None, "reduce_fn": lambda _, new: new}
        context.module.sow(_TAPS, "__call__", out, **keep_last)
        return out

    return interceptor


def _nudge(name: str, activation: Array, delta: ArrayLike) -> Array:
    if jnp.shape(delta) != activation.shape:
        raise ValueError(
            f"perturbations[{name!r}] must have shape {activation.shape}, got {jnp.shape(delta)}"
        )
    return activation + jnp.asarray(delta).astype(activation.dtype)


def _check_known(argument: str, names: Iterable[str], found: Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"{argument} must be among {', '.join(found)}; got {', '.join(unknown)}")


def jsonable(value: Any) -> Any:
    """A setting as JSON: tuples as lists, arrays by their digest, what JSON lacks as repr."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | jax.Array):
        return identity.digest(value)
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
