"""Published image towers as this package's models: files of timm, DINOv2, OpenAI and OpenCLIP.

    model, variables, shape = load_image_tower("ViT-B-32.safetensors", activation="quick_gelu")
    features = model.apply(variables, images)            # [b, *shape] images in [0, 1]

A state dict tells width, depth, patch and image size, but neither the number of heads nor, in
OpenCLIP's files, the activation, nor how images were normalised.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxrobust.files import CheckpointError, check_same_arrays
from jaxrobust.models.clip_resnet import clip_resnet
from jaxrobust.models.model import Model
from jaxrobust.models.torch_file import linen_entry, read_torch, renamed
from jaxrobust.models.vit import vit

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Width of a head in the published ViTs up to L, in texts, and in the pools of CLIP's ResNets.
HEAD_WIDTH = 64
# Heads of the larger ones by their width: H, g and bigG.
_LARGE = {1280: 16, 1408: 16, 1664: 16}
# What some published towers have and ours lack.
_UNREADABLE = {
    "attn_pool.": "pooled by attention (SigLIP)",
    ".mlp.w12.": "with SwiGLU (DINOv2's g)",
}
# OpenAI's and OpenCLIP's names of a transformer's parts, of images or of texts.
TRANSFORMER_RENAMES = (
    ("positional_embedding", "pos_embed"),
    ("transformer.resblocks.", "blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".ls_1.", ".ls1."),
    (".ls_2.", ".ls2."),
    (".in_proj_", ".qkv."),
    (".out_proj.", ".proj."),
    (".c_fc.", ".fc1."),
    (".c_proj.", ".fc2."),
)
_CLIP_RENAMES = (
    ("conv1.", "patch_embed."),
    ("class_embedding", "cls_token"),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    *TRANSFORMER_RENAMES,
)
_RESNET_RENAMES = ((".downsample.0.", ".shortcut."), (".downsample.1.", ".shortcut_bn."))
_TIMM_RENAMES = (("patch_embed.proj.", "patch_embed."), ("register_tokens", "reg_token"))


class Tower(NamedTuple):
    """A model, its variables, and the shape (h, w, 3) of the images that it wants."""

    model: Model
    variables: dict[str, Any]
    shape: tuple[int, int, int]


def load_image_tower(
    path: str | os.PathLike,
    *,
    heads: int | None = None,
    activation: str | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    key: str | None = None,
) -> Tower:
    """A published image tower by its file: a vision transformer, or CLIP's ResNet.

    Args:
        path: safetensors, or a torch file of any version (torch is not needed).
        heads: attention heads; None is those of the published sizes (width / 64 up to L and in
            the attention pools of CLIP's ResNets; 16 in H, g and bigG).
        activation: "gelu" or "quick_gelu"; needed for CLIP's ViTs, in OpenCLIP's layout and in
            timm's, where OpenAI's weights want the latter and LAION's the former. That of timm's
            others and DINOv2's is "gelu"; CLIP's ResNets have ReLU, whatever is said here.
        size: side of the images, a multiple of the patch, or of 32; None is that of the file.
            Positions are interpolated bicubically (jax.image.resize, not quite PyTorch's kernel).
        mean: subtracted from the images. None is CLIP's for OpenCLIP's layout and ImageNet's for
            DINOv2's; timm's other weights differ, and must be told.
        std: divides them, likewise.
        key: where the state dict lies in the file, if it holds several.

    Returns:
        The tower. Without a classification head in the file its output is the features: of the
        class token, after CLIP's projection where there is one.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is of no such layout, or of a tower with SwiGLU or attention
            pooling, or entries are missing, surplus or wrongly shaped: all of them are named.
        ValueError: what the file does not tell was not told, or does not fit it.
    """
    options = {"heads": heads, "activation": activation, "size": size, "mean": mean, "std": std}
    return image_tower(path, read_torch(path, key), **options)


def image_tower(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray],
    *,
    heads: int | None,
    activation: str | None,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tower:
    """`load_image_tower` of a state dict that was read already; `path` begins the errors."""
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got {mean} and {std}")
    if any(name.endswith("attnpool.positional_embedding") for name in state):
        normalisation = CLIP if mean is None else (mean, std)
        return _resnet_tower(path, state, heads, size, normalisation)
    clip = any(name.endswith("class_embedding") for name in state)
    arrays = _ours(path, state, clip)
    # In timm's layout CLIP's towers alone begin with a norm.
    if activation is None and "norm_pre.weight" in arrays:
        raise ValueError(
            "activation must be given for CLIP's ViTs: 'quick_gelu' for OpenAI's weights, 'gelu' "
            "for LAION's"
        )
    if mean is None:
        if not clip and "blocks.0.ls1.gamma" not in arrays:
            raise ValueError("mean and std must be given for timm's ViTs: they differ")
        mean, std = CLIP if clip else IMAGENET
    config, grid = _config(path, arrays, heads, activation or "gelu")
    side = size or grid * config["patch"]
    if side % config["patch"]:
        raise ValueError(f"size must be a multiple of patch = {config['patch']}, got {size}")
    arrays["pos_embed"] = _resized(arrays["pos_embed"], grid, side // config["patch"])
    model = vit(**config, mean=tuple(mean), std=tuple(std))
    shape = (side, side, 3)
    return Tower(model, checked(path, arrays, model.init, shape), shape)


def _resnet_tower(path, state, heads, size, normalisation) -> Tower:
    """CLIP's ResNet; its depth, width and image size are those of the arrays."""
    arrays = {
        name: array
        for name, array in _renamed(state, _RESNET_RENAMES).items()
        if not name.endswith("num_batches_tracked")
    }
    blocks = [re.match(r"layer(\d+)\.(\d+)\.", name) for name in arrays]
    places = [(int(found[1]), int(found[2])) for found in blocks if found]
    lacking = {"conv3.weight", "attnpool.c_proj.bias"} - set(arrays)
    if lacking or not places:
        raise CheckpointError(f"{path}: no CLIP ResNet, it lacks {lacking or 'layer1'}")
    stages = [1 + max(b for s, b in places if s == stage) for stage in sorted({*dict(places)})]
    positions = arrays["attnpool.positional_embedding"][None]
    grid = math.isqrt(positions.shape[1] - 1)
    if grid * grid + 1 != positions.shape[1]:
        raise CheckpointError(f"{path}: {positions.shape[1]} positions are no square of pixels")
    patch = 4 * 2 ** (len(stages) - 1)
    side = size or grid * patch
    if side % patch:
        raise ValueError(f"size must be a multiple of {patch}, got {size}")
    arrays["attnpool.positional_embedding"] = _resized(positions, grid, side // patch)[0]
    model = clip_resnet(
        stages,
        arrays["conv3.weight"].shape[0],
        heads or max(positions.shape[2] // HEAD_WIDTH, 1),
        projection=len(arrays["attnpool.c_proj.bias"]),
        mean=normalisation[0],
        std=normalisation[1],
    )
    shape = (side, side, 3)
    return Tower(model, checked(path, arrays, model.init, shape), shape)


def _ours(path, state: Mapping[str, np.ndarray], clip: bool) -> dict[str, np.ndarray]:
    """The image tower's entries under our names, still in torch's order of axes."""
    out = _renamed(state, _CLIP_RENAMES if clip else _TIMM_RENAMES)
    out.pop("mask_token", None)  # of DINOv2's training
    lacking = {"patch_embed.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} - set(out)
    for part, what in _UNREADABLE.items():
        if any(part in name for name in state):
            raise CheckpointError(f"{path}: towers {what} cannot be read")
    if lacking:
        raise CheckpointError(
            f"{path}: no image tower of timm's, DINOv2's or OpenCLIP's layout, it lacks "
            f"{', '.join(sorted(lacking))}; found {len(state)} arrays: "
            f"{', '.join(sorted(state)[:20])}"
        )
    if clip:
        out["cls_token"] = out["cls_token"].reshape(1, 1, -1)
        out["pos_embed"] = out["pos_embed"][None]
    return out


def _renamed(state: Mapping[str, np.ndarray], renames) -> dict[str, np.ndarray]:
    """The image tower's entries by our names, without those of a text tower beside it."""
    prefix = "visual." if any(name.startswith("visual.") for name in state) else ""
    inside = {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
    return {renamed(name, renames): array for name, array in inside.items()}


def _config(path, arrays, heads, activation) -> tuple[dict[str, Any], int]:
    """Arguments of `vit`, and the side of the grid of patches."""
    width, _, patch, _ = arrays["patch_embed.weight"].shape
    if heads is None:
        known = width <= 1024 and width % HEAD_WIDTH == 0
        heads = width // HEAD_WIDTH if known else _LARGE.get(width)
    if heads is None:
        raise ValueError(f"heads must be given for the width {width}, which is no published size's")
    if width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}")
    pre_norm = "norm_pre.weight" in arrays
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in arrays]
    length = arrays["pos_embed"].shape[1]
    grid = math.isqrt(length)
    embed_class = grid * grid != length
    if embed_class and grid * grid != length - 1:
        raise CheckpointError(f"{path}: {length} positions are no square of patches")
    head, projection = arrays.get("head.bias"), arrays.get("proj")
    config = {
        "patch": int(patch),
        "width": int(width),
        "depth": 1 + max(int(found[1]) for found in blocks if found),
        "heads": heads,
        "mlp_ratio": arrays["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "pool": "cls",
        "classes": None if head is None else len(head),
        "activation": activation,
        "norm_eps": 1e-5 if pre_norm else 1e-6,  # CLIP's or all others'
        "pre_norm": pre_norm,
        "patch_bias": "patch_embed.bias" in arrays,
        "layer_scale": "blocks.0.ls1.gamma" in arrays,
        "registers": arrays["reg_token"].shape[1] if "reg_token" in arrays else 0,
        "embed_class": embed_class,
        "projection": None if projection is None else projection.shape[1],
    }
    return config, grid


def _resized(positions: np.ndarray, grid: int, new: int) -> np.ndarray:
    if new == grid:
        return positions
    first, rest = positions[:, : -grid * grid], positions[:, -grid * grid :]
    rest = rest.reshape(1, grid, grid, -1)
    rest = jax.image.resize(rest, (1, new, new, rest.shape[3]), "bicubic")
    return np.concatenate([first, np.asarray(rest).reshape(1, new * new, -1)], 1)


def checked(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    init: Callable[..., dict],
    shape: Sequence[int],
) -> dict[str, Any]:
    """Our variables, after a comparison of all names and shapes with what `init` makes."""
    found = dict(linen_entry(name, array) for name, array in arrays.items())
    like = jax.eval_shape(lambda: init(jax.random.key(0), shape))
    expected = flatten_dict({"batch_stats": {}, **like})
    check_same_arrays(
        Path(path),
        {".".join(k[1:]): f"{list(a.shape)}" for k, a in found.items()},
        {".".join(k[1:]): f"{list(leaf.shape)}" for k, leaf in expected.items()},
    )
    variables = unflatten_dict({k: jnp.asarray(a, jnp.float32) for k, a in found.items()})
    return {"params": {}, "batch_stats": {}, **variables}
