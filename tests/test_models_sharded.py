"""BatchNorm and remat over 1, 2 and 8 devices under shard_map, pmap and jit: one global batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrobust import models
from jaxrobust.models.layers import BatchNorm
from jaxrobust.parallel import data_mesh, mean, varying

KEY = jax.random.key(0)
LAYER = models.from_linen(BatchNorm())
NET = models.preact_resnet(stages=(1, 1), widths=(4, 8), norm="batch", remat=True)
BATCH = 16


def images(channels, offset=0.0):
    return offset + jax.random.uniform(jax.random.key(1), (BATCH, 4, 4, channels))


def shard_mapped(step, devices):
    """step(variables, x, axis_name) -> (sharded, replicated), checked for replication."""
    spec = PartitionSpec
    return jax.jit(
        jax.shard_map(
            lambda variables, x: step(variables, x, "data"),
            mesh=data_mesh(devices),
            in_specs=(spec(), spec("data")),
            out_specs=(spec("data"), spec()),
            check_vma=True,
        )
    )


def pmapped(step, devices):
    mapped = jax.pmap(
        lambda variables, x: step(variables, x, "data"),
        axis_name="data",
        in_axes=(None, 0),
        devices=jax.devices()[:devices],
    )

    def run(variables, x):
        sharded, replicated = mapped(variables, x.reshape(devices, -1, *x.shape[1:]))
        for leaf in jax.tree.leaves(replicated):
            np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))
        first = jax.tree.map(lambda a: a[0], replicated)
        return sharded.reshape(BATCH, *sharded.shape[2:]), first

    return run


def jitted(step, devices):
    return jax.jit(lambda variables, x: step(variables, x, None))


MAPPINGS = [(jitted, 1), (shard_mapped, 1), (shard_mapped, 2), (shard_mapped, 8), (pmapped, 8)]


@pytest.mark.parametrize(("mapping", "devices"), MAPPINGS)
def test_batch_norm_equals_numpy_over_the_global_batch(mapping, devices):
    # A mean of 35 spreads: E[x^2] - E[x]^2 in float32 would be off by 1e-4 in the variance.
    x = images(3, offset=10.0)
    variables = LAYER.init(KEY, (4, 4, 3))
    # As after a few epochs: the running mean is near the mean, and not equal to it.
    stats = {"mean": jnp.array([10.0, 10.4, 10.6]), "var": jnp.array([0.5, 1.0, 2.0])}
    variables = {**variables, "batch_stats": stats}
    step = mapping(lambda v, x, axis: LAYER.train(v, x, axis_name=axis), devices)
    out, after = step(variables, x)
    exact = np.asarray(x, np.float64)
    centre, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    count = exact[..., 0].size
    np.testing.assert_allclose(out, (exact - centre) / np.sqrt(var + 1e-5), atol=1e-4)
    np.testing.assert_allclose(after["mean"], 0.9 * stats["mean"] + 0.1 * centre, rtol=1e-6)
    unbiased = var * count / (count - 1)
    np.testing.assert_allclose(after["var"], 0.9 * stats["var"] + 0.1 * unbiased, rtol=1e-5)


def test_inference_uses_the_running_statistics_and_leaves_them():
    x = images(2)
    stats = {"mean": jnp.array([0.2, 0.7]), "var": jnp.array([0.5, 2.0])}
    variables = {**LAYER.init(KEY, (4, 4, 2)), "batch_stats": stats}
    expected = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(LAYER.apply(variables, x), expected, atol=1e-5)


def gradient_step(variables, x, axis_name):
    """Logits, and the replicated (gradients, statistics), of a loss over the global batch."""
    params = varying(variables["params"], axis_name)

    def loss(params):
        logits, stats = NET.train({**variables, "params": params}, x, axis_name=axis_name)
        return jnp.square(logits - 1).mean(), (logits, stats)

    grads, (logits, stats) = jax.grad(loss, has_aux=True)(params)
    return logits, (mean(grads, axis_name), stats)


@pytest.fixture(scope="module")
def one_device():
    variables = NET.init(KEY, (4, 4, 3))
    return variables, jitted(gradient_step, 1)(variables, images(3))


@pytest.mark.parametrize(
    ("mapping", "devices"), [(shard_mapped, 2), (shard_mapped, 8), (pmapped, 8)]
)
def test_gradients_through_batch_norm_and_remat_agree_on_any_devices(one_device, mapping, devices):
    variables, expected = one_device
    got = mapping(gradient_step, devices)(variables, images(3))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_forgetting_the_axis_is_noticed_under_shard_map():
    step = shard_mapped(lambda v, x, axis: LAYER.train(v, x), 2)
    with pytest.raises(ValueError, match="data"):
        step(LAYER.init(KEY, (4, 4, 3)), images(3))
