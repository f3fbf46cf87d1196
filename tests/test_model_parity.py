"""Our residual nets and our ViT against PyTorch twins, layer by layer, from stored goldens."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import models

GOLDENS = Path(__file__).parent / "goldens"
# Float32 sums of up to 576 terms in another order, through up to ten layers.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

TINY = {"stages": (1, 2), "widths": (8, 16), "norm": "batch"}
RESNETS = {
    "preact_awp": models.preact_resnet(**TINY),
    "preact_deepmind": models.preact_resnet(
        **TINY, activation="silu", shortcut_from="input", shortcut_kernel=3, padding="SAME"
    ),
    "preact_robustbench": models.preact_resnet(**TINY, final_norm=False, shortcut_from="input"),
    "wide": models.wide_resnet(10, 1, norm="batch"),
}


def read(name):
    with np.load(GOLDENS / f"model_{name}.npz") as file:
        arrays = {key: np.asarray(file[key], np.float32) for key in file.files}
    # Weights are stored as int8, in units of 1 / 64.
    return {key: a / 64 if key.startswith("weight:") else a for key, a in arrays.items()}


def part(golden, prefix):
    found = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    assert found, f"no {prefix} in the goldens"
    return found


def put(tree, path, value):
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = jnp.asarray(value)


def from_torch(state):
    """A published residual net's state dict as our variables; see models/resnet.py."""
    variables = {"params": {}, "batch_stats": {}}
    for name, value in state.items():
        name = name.replace(".layer.", ".").replace("convShortcut", "shortcut")
        *path, leaf = name.replace("shortcut.0", "shortcut").split(".")
        if leaf.startswith("running"):
            put(variables["batch_stats"], (*path, leaf.removeprefix("running_")), value)
        elif leaf == "weight" and value.ndim == 1:
            put(variables["params"], (*path, "scale"), value)
        else:
            leaf = "kernel" if leaf == "weight" else leaf
            axes = (2, 3, 1, 0) if value.ndim == 4 else tuple(range(value.ndim))[::-1]
            put(variables["params"], (*path, leaf), value.transpose(axes))
    return variables


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("name", RESNETS)
def test_a_published_state_dict_maps_one_to_one(name):
    ours = jax.eval_shape(lambda key: RESNETS[name].init(key, (12, 12, 3)), jax.random.key(0))
    assert shapes(ours) == shapes(from_torch(part(read(name), "weight:")))


@pytest.mark.parametrize("name", RESNETS)
def test_every_layer_of_a_residual_net_equals_torch(name):
    golden = read(name)
    variables, taps = from_torch(part(golden, "weight:")), part(golden, "tap:")
    apply = jax.jit(RESNETS[name].apply, static_argnames="taps")
    logits, found = apply(variables, golden["x"], taps=tuple(taps))
    for tap, expected in taps.items():
        np.testing.assert_allclose(
            found[tap][:1], expected.transpose(0, 2, 3, 1), **TOLERANCE, err_msg=tap
        )
    np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ["preact_awp", "wide"])
def test_training_mode_moves_the_running_statistics_as_torch_does(name):
    golden = read(name)
    variables = from_torch(part(golden, "weight:"))
    logits, batch_stats = jax.jit(RESNETS[name].train)(variables, golden["x"])
    np.testing.assert_allclose(logits, golden["train_logits"], **TOLERANCE)
    expected = from_torch(part(golden, "after:"))["batch_stats"]
    chex.assert_trees_all_close(batch_stats, expected, **TOLERANCE)


def vit_from_torch(state):
    """The twin's names (PyTorch's encoder layer) as ours (timm's)."""
    renamed = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj": "attn.proj",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
    }
    out = {}
    for name, value in state.items():
        if name in ("cls_token", "pos_embed"):
            out[name] = jnp.asarray(value)
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        put(out, tuple(name.split(".")), value)
    del out["cls_token"], out["pos_embed"]
    variables = from_torch({".".join(path): value for path, value in leaves(out)})
    return {"params": {**variables["params"], **{k: state[k] for k in ("cls_token", "pos_embed")}}}


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def test_every_block_of_a_vit_equals_torch():
    golden = read("vit")
    model = models.vit(4, 16, 2, 4, mlp_ratio=2.0)
    variables, taps = vit_from_torch(part(golden, "weight:")), part(golden, "tap:")
    apply = jax.jit(model.apply, static_argnames="taps")
    logits, found = apply(variables, golden["x"], taps=tuple(taps))
    for tap, expected in taps.items():
        np.testing.assert_allclose(found[tap][:1], expected, **TOLERANCE, err_msg=tap)
    np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)
