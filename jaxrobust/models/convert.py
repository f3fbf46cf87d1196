"""Published PyTorch weights as this package's models: names, layouts, normalisation, architecture.

    model, variables = load("Wang2023Better.pt", "dm_wide_resnet_28_10_silu")
    logits = model.apply(variables, x)

A state dict's names tell its layout; nothing in it tells the activation, or whether a shortcut
reads before or after the activation, so `load` asks for the architecture by name:

    name                        names in the file           published by
    wide_resnet_D_W             block1.layer.0.conv1        TRADES, AWP, RobustBench's `WideResNet`
    dm_wide_resnet_D_W_relu     layer.0.block.0.conv_0      DeepMind, `DMWideResNet` with ReLU
    dm_wide_resnet_D_W_silu     layer.0.block.0.conv_0      the same with SiLU or `Swish`
    preact_resnet_18            layer1.0.conv1              `PreActBlock`: no `bn` before `linear`
    preact_resnet_18_v2         layer1.0.conv1, bn          `PreActBlockV2`, `bn_before_fc`; AWP
    dm_preact_resnet_18_relu    layer_0.0.conv_2d_1         DeepMind, `DMPreActResNet` with ReLU
    dm_preact_resnet_18_silu    layer_0.0.conv_2d_1         the same with SiLU or `Swish`

DeepMind's nets pad as TensorFlow does where the stride is 2 and normalise with constants that the
file lacks; the others normalise only where the file, or an option, has mean and standard deviation.
RobustBench's own checkpoints go by their names, "cifar10/Linf/Carmon2019Unlabeled", which settle
both (models/robustbench.py).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxrobust.files import CheckpointError, check_same_arrays
from jaxrobust.models.layers import check_choice
from jaxrobust.models.model import Model
from jaxrobust.models.resnet import preact_resnet18, wide_resnet
from jaxrobust.models.robustbench import CIFAR, published
from jaxrobust.models.torch_file import linen_entry, read_torch, renamed

__all__ = ["ARCHITECTURES", "LAYOUTS", "Architecture", "Layout", "convert", "load", "read_torch"]


class Layout(NamedTuple):
    """How a family of state dicts is recognised and renamed.

    Attributes:
        mark: a name that every file of the family holds and no other family's does.
        head: the last layer's bias, as long as there are classes.
        renames: (theirs, ours), replaced in this order wherever they occur in a name.
        config: what a model must be set to for its names' sake; weights alone would fit others.
    """

    mark: str
    head: str
    renames: tuple[tuple[str, str], ...]
    config: Mapping[str, Any]


_DEEPMIND = (("batchnorm_0.", "bn1."), ("batchnorm_1.", "bn2."))
LAYOUTS: Mapping[str, Layout] = {
    "wide": Layout(
        "block1.layer.0.conv1.weight",
        "fc.bias",
        ((".layer.", "."), ("convShortcut.", "shortcut.")),
        {"name": "wide_resnet", "padding": "symmetric"},
    ),
    "dm_wide": Layout(
        "init_conv.weight",
        "logits.bias",
        (
            *((f"layer.{i}.block.", f"block{i + 1}.") for i in range(3)),
            *(*_DEEPMIND, ("conv_0.", "conv1."), ("conv_1.", "conv2.")),
            *(("init_conv.", "conv1."), ("batchnorm.", "bn1."), ("logits.", "fc.")),
        ),
        {"name": "wide_resnet", "padding": "SAME"},
    ),
    "preact": Layout(
        "layer1.0.conv1.weight",
        "linear.bias",
        (("shortcut.0.", "shortcut."),),
        {"name": "preact_resnet", "padding": "symmetric"},
    ),
    "dm_preact": Layout(
        "conv_2d.weight",
        "logits.bias",
        (
            *((f"layer_{i}.", f"layer{i + 1}.") for i in range(4)),
            *(*_DEEPMIND, ("conv_2d_1.", "conv1."), ("conv_2d_2.", "conv2.")),
            *(("conv_2d.", "conv1."), ("batchnorm.", "bn."), ("logits.", "linear.")),
        ),
        {"name": "preact_resnet", "padding": "SAME", "shortcut_from": "input"},
    ),
    "efficientnet": Layout(
        "_conv_stem.weight",
        "_fc.bias",
        (
            *(
                ("_blocks.", "blocks."),
                ("_conv_stem.", "conv_stem."),
                ("_conv_head.", "conv_head."),
            ),
            *(("_expand_conv.", "expand_conv."), ("_depthwise_conv.", "depthwise_conv.")),
            *(("_project_conv.", "project_conv."), ("_bn", "bn"), ("_fc.", "fc.")),
        ),
        {"name": "efficientnet_lite"},
    ),
}
# mean and standard deviation, as wrappers call them; [3], [1, 3, 1, 1] or [3, 1, 1].
_NORMALISATIONS = (("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std"))


class Architecture(NamedTuple):
    """A factory, its options, and whether it normalises where the file does not say how."""

    factory: Callable[..., Model]
    options: Mapping[str, Any]
    normalised: bool


def _wide(depth: int, width: int) -> dict[str, Architecture]:
    common = {"depth": depth, "width": width, "norm": "batch"}
    out = {f"wide_resnet_{depth}_{width}": Architecture(wide_resnet, common, False)}
    for activation in ("relu", "silu"):
        options = {**common, "activation": activation, "padding": "SAME"}
        name = f"dm_wide_resnet_{depth}_{width}_{activation}"
        out[name] = Architecture(wide_resnet, options, True)
    return out


def _preact() -> dict[str, Architecture]:
    plain = {"norm": "batch", "final_norm": False, "shortcut_from": "input"}
    deepmind = {"norm": "batch", "shortcut_from": "input", "shortcut_kernel": 3, "padding": "SAME"}
    out = {
        "preact_resnet_18": Architecture(preact_resnet18, plain, False),
        "preact_resnet_18_v2": Architecture(preact_resnet18, {"norm": "batch"}, False),
    }
    for activation in ("relu", "silu"):
        options = {**deepmind, "activation": activation}
        out[f"dm_preact_resnet_18_{activation}"] = Architecture(preact_resnet18, options, True)
    return out


_SIZES = (
    *((28, 4), (28, 10), (34, 10), (34, 15), (34, 20), (40, 2)),
    *((70, 16), (82, 8), (94, 16), (106, 16)),
)
ARCHITECTURES: Mapping[str, Architecture] = {
    **{name: a for size in _SIZES for name, a in _wide(*size).items()},
    **_preact(),
}


def load(
    path: str | os.PathLike, architecture: str, *, key: str | None = None, **options: Any
) -> tuple[Model, dict[str, Any]]:
    """A published checkpoint as a model and its variables.

    Args:
        path: a torch file (of any version; torch is not needed) or a safetensors file.
        architecture: a name of `ARCHITECTURES`, see this module's table; or RobustBench's name of
            the checkpoint, "cifar10/Linf/Wang2023Better_WRN-28-10".
        key: where the state dict lies in the file, if it holds several.
        options: go before the architecture's and the file's, such as mean=(0.5,), std=(0.5,).
            The number of classes is read from the file.

    Returns:
        The model and its variables, float32.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read (see `read_torch`) or is of another architecture:
            every missing, surplus and wrongly shaped entry is named in the one error.
        ValueError: the architecture is unknown, or its mean and std are and must be given.
    """
    known: Mapping[str, Any] = {}
    if "/" in architecture:
        architecture, known = published(architecture)
    check_choice("architecture", architecture, tuple(ARCHITECTURES))
    factory, fixed, normalised = ARCHITECTURES[architecture]
    state = read_torch(path, key)
    layout = _layout(path, state)
    classes = len(state[layout.head]) if layout.head in state else 10
    found = _normalisation(state) or known
    if normalised and not found and "mean" not in options:
        if classes not in CIFAR:
            raise ValueError(f"mean and std must be given for {architecture} of {classes} classes")
        found = dict(zip(("mean", "std"), CIFAR[classes], strict=True))
    given = {"mean", "std"}
    model = factory(**{**fixed, "classes": classes, **found, **options})
    return model, convert(state, model, path=path, check_normalisation=given.isdisjoint(options))


def convert(
    state: Mapping[str, np.ndarray],
    model: Model,
    *,
    shape: tuple[int, int, int] = (32, 32, 3),
    path: str | os.PathLike = "state",
    check_normalisation: bool = True,
) -> dict[str, Any]:
    """A state dict's arrays as the variables of `model`, which must have its layout.

    Convolutions go from [out, in, h, w] to [h, w, in, out], matrices are transposed, `weight` of a
    normalisation is its `scale`. `num_batches_tracked` and the block `sub_block1`, which TRADES'
    nets carry and never use, are left out.

    Args:
        state: {name: array}, as `read_torch` returns it.
        model: one of this package's residual nets or EfficientNets.
        shape: (h, w, c) of an image; the channels matter.
        path: begins the error messages.
        check_normalisation: refuse a file whose mean and std are not the model's.

    Returns:
        {"params": ..., "batch_stats": ...}, float32.

    Raises:
        CheckpointError: the names are of no known layout or of another than the model's, or an
            entry is missing, surplus or wrongly shaped.
    """
    layout = _layout(path, state)
    wrong = {k: v for k, v in layout.config.items() if model.config.get(k) != v}
    if wrong:
        has = {k: model.config.get(k) for k in wrong}
        raise CheckpointError(
            f"{path}: its names ({layout.mark}) need {wrong}, the model has {has}"
        )
    normalisation = _normalisation(state)
    if check_normalisation and any(
        not np.allclose(model.config[k], v, atol=1e-5) for k, v in normalisation.items()
    ):
        raise CheckpointError(f"{path}: its images are normalised by {normalisation}, not so here")
    arrays, theirs = {}, {}
    for name in filter(_is_weight, state):
        ours, array = linen_entry(renamed(name, layout.renames), state[name])
        if ours in arrays:
            raise CheckpointError(f"{path}: {theirs[ours]} and {name} are the same entry")
        arrays[ours], theirs[ours] = array, name
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
    expected = {k: f"{list(leaf.shape)}" for k, leaf in flatten_dict(like).items()}
    check_same_arrays(
        Path(path),
        {_label(k) if k in expected else theirs[k]: f"{list(a.shape)}" for k, a in arrays.items()},
        {_label(k): text for k, text in expected.items()},
    )
    return unflatten_dict({k: jnp.asarray(a, jnp.float32) for k, a in arrays.items()})


def _layout(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> Layout:
    for layout in LAYOUTS.values():
        if layout.mark in state:
            return layout
    raise CheckpointError(
        f"{path}: holds none of {', '.join(x.mark for x in LAYOUTS.values())}; found {len(state)} "
        f"arrays: {', '.join(sorted(state)[:20])}"
    )


def _normalisation(state: Mapping[str, np.ndarray]) -> dict[str, tuple[float, ...]]:
    """{"mean": ..., "std": ...} that the file itself holds, or nothing."""
    for names in _NORMALISATIONS:
        if all(name in state for name in names):
            mean, std = (tuple(float(n) for n in state[name].ravel()) for name in names)
            return {"mean": mean, "std": std}
    return {}


def _is_weight(name: str) -> bool:
    known = name in {n for pair in _NORMALISATIONS for n in pair}
    unused = name.startswith("sub_block1.") or name.endswith("num_batches_tracked")
    return not (known or unused)


def _label(path: tuple[str, ...]) -> str:
    return ".".join(path[1:])
