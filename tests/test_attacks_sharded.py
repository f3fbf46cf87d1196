"""Attacks on eight devices equal attacks on one, example by example."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrobust import attacks, losses

BATCH, IMAGE, CLASSES = 8, (3, 2, 1), 4
X = jax.random.uniform(jax.random.key(1), (BATCH, *IMAGE))
LABELS = jnp.arange(BATCH) % CLASSES
KEYS = attacks.example_keys(jax.random.key(0), BATCH)
WEIGHTS = jax.random.normal(jax.random.key(2), (*IMAGE, CLASSES))


def logits_fn(x, weights):
    return jnp.einsum("bhwc,hwck->bk", jnp.sin(4 * x), weights)


def loss_fn(x, weights, labels):
    return losses.cross_entropy(logits_fn(x, weights), labels)


GRADIENT_ATTACKS = {
    "linf": attacks.linf_pgd(0.2, 2, momentum=0.9, start="none", loop="fused"),
    "l2": attacks.l2_pgd(0.4, 2),
    "l1": attacks.l1_pgd(0.4, 2, loop="fused"),
    "n_fgsm": attacks.n_fgsm(0.1),
    "apgd": attacks.apgd("linf", 0.2, steps=2),
    "restarts": attacks.restarts(attacks.linf_pgd(0.1, 1), 2),
}


CLASSIFIER_ATTACKS = {
    "apgd_t": attacks.apgd_t("l2", 0.4, steps=2, targets=2),
    "fab": attacks.fab("linf", 0.2, steps=2),
    "square": attacks.square("linf", 0.2, queries=3),
    "spatial": attacks.spatial(grid=(3, 2, 2)),
    "patch": attacks.patch((1, 2), places=2, steps=3),
}


def run_all(x, weights, labels, keys):
    results = {
        name: attack(loss_fn, x, keys, args=(weights, labels))
        for name, attack in GRADIENT_ATTACKS.items()
    }
    for name, attack in CLASSIFIER_ATTACKS.items():
        results[name] = attack(logits_fn, x, labels, keys, args=(weights,))
    driven = attacks.multi_targeted(attacks.linf_pgd(0.1, 1), 2)
    results["multi_targeted"] = driven(logits_fn, x, labels, keys, args=(weights,))
    return results


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def assert_same(ours, expected):
    chex.assert_trees_all_close(ours, expected, atol=1e-6)


def test_inside_shard_map_attacks_equal_one_device(mesh):
    mapped = jax.shard_map(
        run_all, mesh=mesh, in_specs=(P("d"), P(), P("d"), P("d")), out_specs=P("d"), check_vma=True
    )
    quick = {"xla_backend_optimization_level": 0}  # to compile: it runs once
    sharded = jax.jit(mapped, compiler_options=quick)(X, WEIGHTS, LABELS, KEYS)
    single = jax.jit(run_all, compiler_options=quick)(X, WEIGHTS, LABELS, KEYS)
    assert_same(sharded, single)


def test_called_eagerly_on_a_sharded_batch_attacks_equal_one_device(mesh):
    attack = attacks.restarts(attacks.l2_pgd(0.4, 1), 2)
    x, labels = jax.device_put((X, LABELS), NamedSharding(mesh, P("d")))
    weights = jax.device_put(WEIGHTS, NamedSharding(mesh, P()))
    sharded = attack(loss_fn, x, jax.random.key(0), args=(weights, labels))
    assert len(sharded.sharding.device_set) == 8
    assert_same(sharded, attack(loss_fn, X, jax.random.key(0), args=(WEIGHTS, LABELS)))
