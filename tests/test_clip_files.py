"""Published CLIPs: OpenCLIP's own embeddings on stored weights, and files that do not fit."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrobust import models
from jaxrobust.files import CheckpointError

GOLDENS = Path(__file__).parent / "goldens"
HEADS = {"vit": 2, "resnet": 8}
OPTIONS = {"activation": "quick_gelu", "text_heads": 2}


def golden(name):
    arrays = load_file(GOLDENS / f"clip_{name}.safetensors")
    state = {k: v for k, v in arrays.items() if not k.startswith("golden.")}
    return state, {k.removeprefix("golden."): v for k, v in arrays.items() if k not in state}


def saved(folder, state):
    path = folder / "clip.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    return path


def loaded(folder, name, state=None, **options):
    path = saved(folder, golden(name)[0] if state is None else state)
    return models.load_clip(path, **{**OPTIONS, "heads": HEADS[name], **options})


@pytest.mark.parametrize("name", HEADS)
def test_a_published_clip_gives_its_own_librarys_embeddings(name, tmp_path):
    _, wanted = golden(name)
    clip, variables, shape = loaded(tmp_path, name)
    x = wanted["x"].astype(np.float32)
    assert shape == x.shape[1:]
    image = jax.jit(clip.encode_image)(variables, x)
    text = jax.jit(clip.encode_text)(variables, wanted["tokens"])
    np.testing.assert_allclose(image, wanted["image"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(text, wanted["text"], rtol=1e-4, atol=1e-4)
    # Embeddings of length one could agree by chance if all were alike.
    assert np.abs(wanted["image"][0] - wanted["image"][1]).max() > 0.01
    assert np.abs(wanted["text"][0] - wanted["text"][1]).max() > 0.1


@pytest.mark.parametrize("name", HEADS)
def test_what_was_loaded_can_be_built_again_and_has_the_variables_of_its_init(name, tmp_path):
    clip, variables, shape = loaded(tmp_path, name)
    again = models.build(**clip.config)
    like = jax.eval_shape(lambda: again.init(jax.random.key(0), shape))
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    assert shapes(like) == shapes(variables)
    assert again.config == clip.config


def test_the_layout_with_a_text_tower_of_its_own_is_the_same_model(tmp_path):
    state, wanted = golden("vit")
    own = {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": array
        for name, array in state.items()
    }
    archive = {"input_resolution": 16, "context_length": 9, "vocab_size": 20}
    own |= {name: np.array(number) for name, number in archive.items()}
    clip, variables, _ = loaded(tmp_path, "vit", own)
    text = clip.encode_text(variables, wanted["tokens"])
    np.testing.assert_allclose(text, wanted["text"], rtol=1e-4, atol=1e-4)


def test_the_image_tower_of_a_clip_resnet_is_read_alone(tmp_path):
    state, wanted = golden("resnet")
    tower = models.load_image_tower(saved(tmp_path, state), heads=8)
    features = np.asarray(tower.model.apply(tower.variables, wanted["x"].astype(np.float32)))
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(units, wanted["image"], rtol=1e-4, atol=1e-4)
    stats = tower.variables["batch_stats"]["layer2"]["1"]["bn3"]["var"]
    np.testing.assert_array_equal(stats, state["visual.layer2.1.bn3.running_var"])
    wide = models.load_image_tower(saved(tmp_path, state), heads=8, size=96)
    assert wide.shape == (96, 96, 3)
    assert wide.model.apply(wide.variables, np.zeros((1, 96, 96, 3), np.float32)).shape == (1, 6)


def test_heads_are_those_of_the_published_sizes(tmp_path):
    clip, _, _ = loaded(tmp_path, "resnet", heads=None, text_heads=None)
    assert clip.config["heads"] == 1  # width 16
    assert clip.config["tower"]["heads"] == 1  # width 64


def change(**entries):
    return lambda state: {**state, **{n.replace("__", "."): a for n, a in entries.items()}}


def without(name):
    return lambda state: {n: a for n, a in state.items() if n != name}


ZEROS = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("message", "name", "edit", "options"),
    [
        ("no CLIP, no name begins with 'visual", "vit", lambda s: {"a": ZEROS}, {}),
        ("missing.*blocks.1.norm2.scale", "vit",
         without("transformer.resblocks.1.ln_2.weight"), {}),
        ("missing.*norm.scale", "vit", without("visual.ln_post.weight"), {}),
        ("missing.*layer3.0.bn2.var", "resnet", without("visual.layer3.0.bn2.running_var"), {}),
        ("missing.*layer1.0.shortcut.kernel", "resnet",
         without("visual.layer1.0.downsample.0.weight"), {}),
        ("no CLIP ResNet, it lacks.*conv3", "resnet", without("visual.conv3.weight"), {}),
        ("text tower lacks logit_scale", "vit", without("logit_scale"), {}),
        ("text tower lacks proj", "vit", without("text_projection"), {}),
        (r"unexpected.*logit_bias \[2, 3\]", "vit", change(logit_bias=ZEROS), {}),
        ("unexpected.*layer1.0.extra", "resnet", change(visual__layer1__0__extra=ZEROS), {}),
        (r"different.*pos_embed is \[9, 3\], expected \[9, 16\]", "vit",
         change(positional_embedding=np.zeros((9, 3), np.float32)), {}),
        ("7 positions are no square", "resnet",
         change(visual__attnpool__positional_embedding=np.zeros((7, 64), np.float32)), {}),
        ("images end in 6 entries, its texts in 5", "vit",
         change(text_projection=np.zeros((16, 5), np.float32)), {}),
        ("logit_scale must be one number", "vit", change(logit_scale=ZEROS), {}),
        ("activation must be one of", "vit", None, {"activation": "swish"}),
        ("text_heads must divide the text's width 16, got 3", "vit", None, {"text_heads": 3}),
        ("heads must divide", "resnet", None, {"heads": 7}),
        ("size must be a multiple of 32", "resnet", None, {"size": 80}),
        ("mean and std must be given together", "resnet", None, {"std": (1.0,)}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(message, name, edit, options, tmp_path):
    state = golden(name)[0]
    with pytest.raises((ValueError, CheckpointError), match=message):
        loaded(tmp_path, name, state if edit is None else edit(state), **options)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        models.load_clip(tmp_path / "none.pt", activation="gelu")
