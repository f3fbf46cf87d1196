import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrobust.checkpoint import CheckpointError, load_weights, read_metadata, save_weights


def variables():
    return {
        "params": {
            "conv_1": {"kernel": jnp.arange(24.0).reshape(2, 3, 4).T, "bias": jnp.float32(0.5)},
            "half": jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16),
            "none": jnp.zeros((0, 3)),
        },
        "batch_stats": {"count": jnp.int32([1, 2]), "on": jnp.array([True])},
    }


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("with_like", [False, True])
def test_weights_come_back_bit_identical(tmp_path, with_like):
    save_weights(tmp_path / "w.safetensors", variables())
    like = jax.eval_shape(variables) if with_like else None
    loaded = load_weights(tmp_path / "w.safetensors", like)
    assert_same(loaded, variables())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_another_safetensors_reader_finds_the_names_and_numbers(tmp_path):
    from safetensors import safe_open

    save_weights(tmp_path / "w.safetensors", variables())
    with safe_open(tmp_path / "w.safetensors", framework="np") as file:
        assert set(file.keys()) == {
            "params/conv_1/kernel",
            "params/conv_1/bias",
            "params/half",
            "params/none",
            "batch_stats/count",
            "batch_stats/on",
        }
        expected = np.arange(24, dtype=np.float32).reshape(2, 3, 4).T
        np.testing.assert_array_equal(file.get_tensor("params/conv_1/kernel"), expected)


def test_metadata_is_kept_and_read_alone(tmp_path):
    save_weights(
        tmp_path / "w", {"a": jnp.ones(1)}, metadata={"model": "cnn", "config": '{"w": 8}'}
    )
    assert read_metadata(tmp_path / "w") == {"model": "cnn", "config": '{"w": 8}'}
    save_weights(tmp_path / "w", {"a": jnp.ones(1)})
    assert read_metadata(tmp_path / "w") == {}


def test_the_same_weights_give_the_same_bytes(tmp_path):
    metadata = {letter: f'"{letter}ü' for letter in "abcdefgh"}
    for name in ("a", "b"):
        save_weights(tmp_path / name, variables(), metadata=metadata)
    assert read_metadata(tmp_path / "a") == metadata
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_empty_dicts_of_like_stay(tmp_path):
    save_weights(tmp_path / "w", {"params": {"a": jnp.ones(2)}, "batch_stats": {}})
    like = {"params": {"a": jnp.zeros(2)}, "batch_stats": {}}
    assert_same(
        load_weights(tmp_path / "w", like), {"params": {"a": jnp.ones(2)}, "batch_stats": {}}
    )


def test_loaded_weights_take_the_sharding_of_like(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    save_weights(tmp_path / "w", {"a": jnp.arange(3.0)})
    like = {"a": jax.device_put(jnp.zeros(3), NamedSharding(mesh, P()))}
    loaded = load_weights(tmp_path / "w", like)
    assert loaded["a"].sharding == like["a"].sharding
    save_weights(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "w").read_bytes()


def test_all_differences_from_like_are_listed_in_one_error(tmp_path):
    save_weights(tmp_path / "w", {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}, "d": jnp.ones(1)})
    like = {"a": jnp.ones(5), "b": {"x": jnp.ones(3)}, "d": jnp.ones(1, jnp.bfloat16)}
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path / "w", like)
    message = str(error.value)
    assert str(tmp_path / "w") in message
    assert "missing (1): b/x float32[3]" in message
    assert "unexpected (1): b/c float32[3]" in message
    assert "a is float32[2], expected float32[5]" in message
    assert "d is float32[1], expected bfloat16[1]" in message


def test_a_truncated_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "w"
    save_weights(path, variables(), metadata={"model": "cnn"})
    whole = path.read_bytes()
    for cut in (0, 5, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        for read in (load_weights, read_metadata):
            with pytest.raises(
                CheckpointError, match=f"w: expected a safetensors file, found {cut}"
            ):
                read(path)
        assert path.read_bytes() == whole[:cut]


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    (tmp_path / "w").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        load_weights(tmp_path / "w")
    assert not (tmp_path / "boom").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing\.safetensors: expected a safetensors file"
    ):
        load_weights(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"a": [jnp.ones(1)]}, TypeError, "got list at 'a'"),
        ({"a": {"b": 1.0}}, TypeError, "got float at 'a/b'"),
        ({"a": jax.random.key(0)}, TypeError, "got key<fry> at 'a'"),
        ({1: jnp.ones(1)}, TypeError, "string keys, got 1"),
        ({"a/b": jnp.ones(1)}, ValueError, "'a/b'"),
        ({"a": {}}, ValueError, "at least one array"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_the_old_file_stays(tmp_path, bad, error, message):
    save_weights(tmp_path / "w", {"old": jnp.ones(1)})
    with pytest.raises(error, match=message):
        save_weights(tmp_path / "w", bad)
    assert list(load_weights(tmp_path / "w")) == ["old"]
    assert os.listdir(tmp_path) == ["w"]


def test_metadata_must_be_strings(tmp_path):
    with pytest.raises(TypeError, match="metadata must map str to str, got 'epoch': int"):
        save_weights(tmp_path / "w", {"a": jnp.ones(1)}, metadata={"epoch": 3})


@pytest.mark.parametrize("with_like", [False, True])
def test_numbers_that_jax_would_change_are_refused(tmp_path, with_like):
    for name, array in (("int", np.array([2**40 + 5])), ("float", np.array([1e300, 0.1]))):
        save_weights(tmp_path / "w", {name: array})
        with pytest.raises(CheckpointError, match=f"{name} holds {array.dtype} numbers that"):
            load_weights(tmp_path / "w", {name: array} if with_like else None)
    save_weights(tmp_path / "w", {"small": np.array([7]), "rounded": np.array([0.1, np.inf])})
    loaded = load_weights(tmp_path / "w")
    assert loaded["small"].tolist() == [7]
    np.testing.assert_array_equal(loaded["rounded"], np.float32([0.1, np.inf]))
