"""Tests that contrastive losses over gathered negatives do not depend on the number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrobust import losses

BATCH, DIM = 8, 6
Z1, Z2 = np.random.default_rng(0).normal(size=(2, BATCH, DIM)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0, 1, 1], np.int32)


def gathered_losses(labels, axis_name):
    """Every contrastive loss as a function of two embeddings, gathered over the axis."""
    contrast = functools.partial(losses.supervised_contrastive, axis_name=axis_name)
    return {
        "adversarial_contrastive": functools.partial(
            losses.adversarial_contrastive, axis_name=axis_name
        ),
        "info_nce": functools.partial(losses.info_nce, axis_name=axis_name),
        "nt_xent": functools.partial(losses.nt_xent, axis_name=axis_name),
        "clip_loss": functools.partial(losses.clip_loss, axis_name=axis_name),
        "two_view_clip": lambda z1, z2: losses.two_view_clip(
            (z1, 2 * z1 + z2), (z2, z1 - z2), axis_name=axis_name
        ),
        "neighbours": lambda z1, z2: losses.neighbour_contrastive(
            z1, z2, rows="both", axis_name=axis_name
        ),
        "one_view": lambda z1, z2: contrast(z1, labels),
        "two_views": lambda z1, z2: contrast(z1, labels, second_view=z2),
    }


def values_and_input_gradients(z1, z2, labels, axis_name=None):
    """Every loss, and per loss the gradients of its (local) sum by both embeddings."""
    results = {}
    for name, loss in gathered_losses(labels, axis_name).items():
        values, pull = jax.vjp(loss, z1, z2)
        results[name] = values, pull(jnp.ones_like(values))
    return results


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


@pytest.fixture(scope="module")
def on_one_device():
    return jax.jit(values_and_input_gradients)(Z1, Z2, LABELS)


def assert_same(ours, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected
    )


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_gathered_losses_and_gradients_under_shard_map_equal_one_device(devices, on_one_device):
    mapped = jax.shard_map(
        lambda *a: values_and_input_gradients(*a, axis_name="d"),
        mesh=mesh_of(devices),
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=True,
    )
    assert_same(jax.jit(mapped)(Z1, Z2, LABELS), on_one_device)


def test_gathered_losses_and_gradients_under_pmap_equal_one_device(on_one_device):
    devices = 8
    mapped = jax.pmap(
        lambda *a: values_and_input_gradients(*a, axis_name="d"),
        axis_name="d",
        devices=jax.devices()[:devices],
    )
    split = [a.reshape(devices, -1, *a.shape[1:]) for a in (Z1, Z2, LABELS)]
    whole = jax.tree.map(lambda a: np.asarray(a).reshape(BATCH, *a.shape[2:]), mapped(*split))
    assert_same(whole, on_one_device)


def test_gradients_of_shared_parameters_under_shard_map_equal_one_device():
    weights = np.random.default_rng(7).normal(size=(DIM, 4)).astype(np.float32)
    scale = jnp.float32(3.0)

    def mean_loss(parameters, z1, z2, axis_name=None):
        weights, scale = parameters
        return jnp.mean(losses.clip_loss(z1 @ weights, z2 @ weights, scale, axis_name=axis_name))

    def per_device(parameters, z1, z2):
        # Without the cast the gradient would be summed over the devices before the mean.
        parameters = jax.lax.pcast(parameters, "d", to="varying")
        gradient = jax.grad(mean_loss)(parameters, z1, z2, axis_name="d")
        return jax.lax.pmean(gradient, "d")

    mapped = jax.shard_map(
        per_device, mesh=mesh_of(8), in_specs=(P(), P("d"), P("d")), out_specs=P()
    )
    ours = jax.jit(mapped)((weights, scale), Z1, Z2)
    assert_same(ours, jax.jit(jax.grad(mean_loss))((weights, scale), Z1, Z2))


def test_without_the_axis_name_negatives_are_local():
    mapped = jax.shard_map(losses.info_nce, mesh=mesh_of(8), in_specs=P("d"), out_specs=P("d"))
    np.testing.assert_allclose(jax.jit(mapped)(Z1, Z2), 0, atol=1e-6)
