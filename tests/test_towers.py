"""Published image towers: timm's, DINOv2's and OpenCLIP's own output on stored weights."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.files import CheckpointError
from jaxrobust.models import towers

GOLDENS = Path(__file__).parent / "goldens"
OPTIONS = {
    "timm": {"heads": 2, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "dinov2": {"heads": 2},
    "registers": {"heads": 2},
    "clip": {"heads": 2, "activation": "quick_gelu"},
}


def golden(name):
    with np.load(GOLDENS / f"tower_{name}.npz") as file:
        arrays = {key: np.asarray(file[key], np.float32) for key in file.files}
    weights = {k.removeprefix("weight:"): v / 64 for k, v in arrays.items() if ":" in k}
    return weights, arrays["x"], arrays["out"]


def saved(folder, weights):
    path = folder / "tower.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, path)
    return path


@pytest.mark.parametrize("name", OPTIONS)
def test_a_published_tower_gives_its_own_librarys_output(name, tmp_path):
    weights, x, out = golden(name)
    tower = models.load_image_tower(saved(tmp_path, weights), **OPTIONS[name])
    assert tower.shape == x.shape[1:]
    np.testing.assert_allclose(
        jax.jit(tower.model.apply)(tower.variables, x), out, rtol=1e-4, atol=1e-4
    )
    again = models.build(**tower.model.config)
    np.testing.assert_array_equal(
        again.apply(tower.variables, x), tower.model.apply(tower.variables, x)
    )


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)]
)
def test_heads_are_those_of_the_published_sizes(width, heads):
    patches = np.zeros((width, 3, 2, 2), np.float32)
    mlp = np.zeros((4 * width, width), np.float32)
    arrays = {
        "patch_embed.weight": patches,
        "pos_embed": np.zeros((1, 5, width), np.float32),
        "blocks.0.mlp.fc1.weight": mlp,
    }
    assert towers._config("file", arrays, None, "gelu")[0]["heads"] == heads


def test_a_clip_tower_in_timms_layout_is_the_same_function(tmp_path):
    weights, x, out = golden("clip")
    renames = (
        ("conv1.", "patch_embed.proj."), ("class_embedding", "cls_token"),
        ("positional_embedding", "pos_embed"), ("ln_pre.", "norm_pre."), ("ln_post.", "norm."),
        ("transformer.resblocks.", "blocks."), (".ln_1.", ".norm1."), (".ln_2.", ".norm2."),
        (".in_proj_", ".qkv."), (".out_proj.", ".proj."), (".c_fc.", ".fc1."),
        (".c_proj.", ".fc2."),
    )  # fmt: skip
    theirs = {towers.renamed(name, renames): array for name, array in weights.items()}
    theirs["cls_token"] = theirs["cls_token"].reshape(1, 1, -1)
    theirs["pos_embed"] = theirs["pos_embed"][None]
    # timm's projection is a head with a bias of zeros.
    theirs["head.weight"] = theirs.pop("proj").T
    theirs["head.bias"] = np.zeros(len(theirs["head.weight"]), np.float32)
    path = saved(tmp_path, theirs)
    options = {"heads": 2, "mean": towers.CLIP[0], "std": towers.CLIP[1]}
    with pytest.raises(ValueError, match="activation must be given for CLIP"):
        models.load_image_tower(path, **options)
    tower = models.load_image_tower(path, activation="quick_gelu", **options)
    found = tower.model.apply(tower.variables, x)
    np.testing.assert_allclose(found, out, rtol=1e-4, atol=1e-4)


def test_the_image_tower_of_a_whole_clip_is_found(tmp_path):
    weights, x, out = golden("clip")
    whole = {f"visual.{name}": array for name, array in weights.items()}
    whole |= {"token_embedding.weight": np.zeros((3, 2), np.float32), "logit_scale": np.ones(1)}
    tower = models.load_image_tower(saved(tmp_path, whole), **OPTIONS["clip"])
    found = tower.model.apply(tower.variables, x)
    np.testing.assert_allclose(found, out, rtol=1e-4, atol=1e-4)


def test_another_image_size_interpolates_the_positions(tmp_path):
    weights, _, _ = golden("dinov2")
    path = saved(tmp_path, weights)
    same = models.load_image_tower(path, heads=2, size=16)
    wide = models.load_image_tower(path, heads=2, size=40)
    assert wide.shape == (40, 40, 3)
    assert wide.model.apply(wide.variables, np.zeros((1, 40, 40, 3))).shape == (1, 16)
    before, after = (t.variables["params"]["pos_embed"] for t in (same, wide))
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    # The middle of an odd grid is the mean of the four patches of the small one.
    middle = after[0, 1:].reshape(5, 5, -1)[2, 2]
    np.testing.assert_allclose(middle, before[0, 1:].mean(0), atol=1e-5)


def without(weights, name):
    return {key: array for key, array in weights.items() if key != name}


@pytest.mark.parametrize(
    ("message", "name", "change", "options"),
    [
        ("activation must be given", "clip", None, {"activation": None}),
        ("mean and std must be given for timm", "timm", None, {"mean": None, "std": None}),
        ("mean and std must be given together", "timm", None, {"std": None}),
        ("heads must divide the width 16, got 3", "timm", None, {"heads": 3}),
        ("heads must be given for the width 16", "timm", None, {"heads": None}),
        ("size must be a multiple of patch = 8", "timm", None, {"size": 20}),
        ("missing.*norm.scale", "timm", lambda w: without(w, "norm.weight"), {}),
        (r"unexpected \(1\): more", "timm", lambda w: {**w, "more": np.zeros(2, np.float32)}, {}),
        ("pooled by attention", "timm", lambda w: {**w, "attn_pool.q": np.zeros(2)}, {}),
        ("with SwiGLU", "timm", lambda w: {**w, "blocks.0.mlp.w12.weight": np.zeros(2)}, {}),
        ("no image tower", "timm", lambda w: {"a": np.zeros(2, np.float32)}, {}),
        ("7 positions are no square", "timm",
         lambda w: {**w, "pos_embed": np.zeros((1, 7, 16), np.float32)}, {}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(message, name, change, options, tmp_path):
    weights = golden(name)[0]
    path = saved(tmp_path, weights if change is None else change(weights))
    with pytest.raises((ValueError, CheckpointError), match=message):
        models.load_image_tower(path, **{**OPTIONS[name], **options})
