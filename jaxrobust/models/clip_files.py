"""Published CLIP models by their files: both towers, in OpenAI's and OpenCLIP's layouts.

    clip, variables, shape = load_clip("ViT-B-32.safetensors", activation="quick_gelu")
    similarity = clip.encode_image(variables, images) @ clip.encode_text(variables, tokens).T

The image tower is read by `towers`. A state dict tells neither the number of heads nor the
activation.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrobust.files import CheckpointError
from jaxrobust.models.clip import Clip, clip
from jaxrobust.models.text import text_encoder
from jaxrobust.models.torch_file import read_torch, renamed
from jaxrobust.models.towers import HEAD_WIDTH, TRANSFORMER_RENAMES, checked, image_tower

# Names without a number at their end, so that the embedding is not taken for a kernel.
_RENAMES = (
    ("token_embedding.weight", "token_embed"),
    ("text_projection", "proj"),
    ("ln_final.", "norm."),
    *TRANSFORMER_RENAMES,
)
# Numbers and masks that OpenAI's archives and older files of OpenCLIP's hold beside the weights.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


class LoadedClip(NamedTuple):
    """A dual encoder, its variables, and the shape (h, w, 3) of the images that it wants."""

    clip: Clip
    variables: dict[str, Any]
    shape: tuple[int, int, int]


def load_clip(
    path: str | os.PathLike,
    *,
    activation: str,
    heads: int | None = None,
    text_heads: int | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    key: str | None = None,
) -> LoadedClip:
    """A published CLIP by its file: a ViT or CLIP's ResNet, and the text transformer.

    Args:
        path: safetensors, or a torch file of a state dict (torch is not needed). OpenAI's own
            downloads are compiled programs, not state dicts: take the state dicts that OpenCLIP
            publishes of them.
        activation: of both transformers: "quick_gelu" for OpenAI's weights and for OpenCLIP's whose
            name says so, "gelu" for the others, LAION's among them.
        heads: of the image tower; None is that of the published sizes, as in `load_image_tower`.
        text_heads: of the text transformer; None is width / 64, as in all of OpenAI's and LAION's.
        size: side of the images; None is that of the file. Positions are interpolated.
        mean: subtracted from the images; None is CLIP's own.
        std: divides them; likewise.
        key: where the state dict lies in the file, if it holds several.

    Returns:
        The model, its variables, and the shape of an image.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is of no such layout, or entries are missing, surplus or wrongly
            shaped: all of one tower's are named.
        ValueError: what the file does not tell was not told, or does not fit it.
    """
    state = read_torch(path, key)
    visual = {name: array for name, array in state.items() if name.startswith("visual.")}
    if not visual:
        raise CheckpointError(
            f"{path}: holds no CLIP, no name begins with 'visual.'; found {len(state)} arrays: "
            f"{', '.join(sorted(state)[:20])}"
        )
    arrays, scale = _text_arrays(path, state)
    config = _config(path, arrays, text_heads, activation)
    options = {"heads": heads, "activation": activation, "size": size, "mean": mean, "std": std}
    tower = image_tower(path, visual, **options)
    text = text_encoder(**config)
    found = checked(path, arrays, text.init, (config["length"],))
    dim = config.pop("projection")
    params = {"image": tower.variables["params"], "text": found["params"], "logit_scale": scale}
    stats = tower.variables["batch_stats"]
    variables = {"params": params, "batch_stats": {"image": stats} if stats else {}}
    model = clip(tower.model, dim=dim, projection=False, **config)
    _check_width(path, tower.model.config, dim)
    return LoadedClip(model, variables, tower.shape)


def _text_arrays(path, state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
    """The text tower's entries under our names, still in torch's order of axes; the logit scale."""
    out = {}
    for name, array in state.items():
        if name.startswith("visual.") or name in _NO_WEIGHTS or name == "text.attn_mask":
            continue
        out[renamed(name.removeprefix("text."), _RENAMES)] = array
    lacking = {"token_embed", "pos_embed", "proj", "logit_scale", "blocks.0.mlp.fc1.weight"}
    lacking -= set(out)
    if lacking:
        raise CheckpointError(
            f"{path}: no CLIP of OpenAI's or OpenCLIP's layout, its text tower lacks "
            f"{', '.join(sorted(lacking))}"
        )
    scale = out.pop("logit_scale")
    if scale.size != 1:
        raise CheckpointError(f"{path}: logit_scale must be one number, got shape {scale.shape}")
    return out, jnp.asarray(scale, jnp.float32).reshape(())


def _config(path, arrays, heads: int | None, activation: str) -> dict[str, Any]:
    """Arguments of `text_encoder`."""
    for name in ("token_embed", "pos_embed", "proj", "blocks.0.mlp.fc1.weight"):
        if arrays[name].ndim != 2:
            raise CheckpointError(f"{path}: {name} must be a matrix, got {arrays[name].shape}")
    vocabulary, width = arrays["token_embed"].shape
    heads = heads or max(width // HEAD_WIDTH, 1)
    if width % heads:
        raise ValueError(f"text_heads must divide the text's width {width}, got {heads}")
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in arrays]
    return {
        "vocabulary": vocabulary,
        "projection": arrays["proj"].shape[1],
        "length": arrays["pos_embed"].shape[0],
        "width": width,
        "depth": 1 + max(int(found[1]) for found in blocks if found),
        "heads": heads,
        "mlp_ratio": arrays["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "activation": activation,
    }


def _check_width(path, tower: Mapping[str, Any], dim: int) -> None:
    width = tower["projection"] or tower["width"]
    if width != dim:
        raise CheckpointError(
            f"{path}: its images end in {width} entries, its texts in {dim}: not one space"
        )
