"""Tests of the mappings of a per-device step: means, gradients, placement, errors, deadlocks."""

import json
import platform
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import parallel
from tests.conftest import child_environment

BATCH = 16
X = np.random.default_rng(0).normal(size=(BATCH, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=BATCH).astype(np.float32)
W = np.array([0.5, -1.0, 2.0], np.float32)
EVERYWHERE = [(mapping, devices) for mapping in parallel.MAPPINGS for devices in (1, 2, 8)]


def least_squares(state, batch, axis_name):
    """One step of gradient descent on the mean squared error over the global batch."""

    def loss(w):
        residual = batch["x"] @ w - batch["y"]
        return jnp.mean(residual**2), residual

    (value, _), gradient = parallel.mean_gradient(loss, state["w"], axis_name)
    return {"w": state["w"] - gradient}, {"loss": value, "gradient": gradient}


def batch_and_state():
    return {"x": X, "y": Y}, {"w": jnp.asarray(W)}


@pytest.mark.parametrize(("mapping", "devices"), EVERYWHERE)
def test_mean_gradients_equal_numpy_on_any_devices(mapping, devices):
    batch, state = batch_and_state()
    run = parallel.data_parallel(least_squares, parallel.data_mesh(devices), mapping=mapping)
    state, metrics = run(state, batch)
    residual = X.astype(np.float64) @ W - Y
    gradient = 2 * residual @ X / BATCH
    np.testing.assert_allclose(metrics["gradient"], gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(residual**2), rtol=1e-5)
    np.testing.assert_allclose(state["w"], W - gradient, rtol=1e-5)


def test_without_varying_a_gradient_is_summed_over_the_devices():
    # What `mean_gradient` guards against; if this fails, JAX no longer sums and the cast can go.
    def step(state, batch, axis_name):
        gradient = jax.grad(lambda w: jnp.mean((batch["x"] @ w - batch["y"]) ** 2))(state["w"])
        return state, parallel.mean(gradient, axis_name)

    batch, state = batch_and_state()
    residual = X @ W - Y
    _, gradient = parallel.data_parallel(step)(state, batch)
    np.testing.assert_allclose(gradient, 8 * 2 * residual @ X / BATCH, rtol=1e-5)


@pytest.mark.parametrize("forgotten", ["state", "metrics"])
def test_a_forgotten_mean_raises_when_the_step_is_traced(forgotten):
    def step(state, batch, axis_name):
        right, local = parallel.mean(batch["y"].mean(), axis_name), batch["y"].mean()
        return (local, right) if forgotten == "state" else (right, local)

    run = parallel.data_parallel(step)
    with pytest.raises(ValueError, match="require replication"):
        run(jnp.zeros(()), {"y": Y})


def test_varying_twice_is_varying_once():
    def step(state, batch, axis_name):
        once = parallel.varying(state, axis_name)
        twice = parallel.varying(once, axis_name)
        return state, parallel.mean(twice, axis_name)

    for mapping in parallel.MAPPINGS:
        run = parallel.data_parallel(step, mapping=mapping, donate=False)
        assert run(jnp.float32(3), {"y": Y})[1] == 3


def test_gather_joins_the_devices_in_their_order():
    def step(state, batch, axis_name):
        everything = parallel.gather(batch["y"], axis_name)
        wrong = jnp.abs(everything - state).sum()
        return state, parallel.mean(wrong, axis_name)

    for mapping in parallel.MAPPINGS:
        run = parallel.data_parallel(step, mapping=mapping)
        assert run(jnp.asarray(Y), {"y": Y})[1] == 0


@pytest.mark.parametrize("mapping", parallel.MAPPINGS)
@pytest.mark.parametrize("donate", [True, False])
def test_the_old_state_is_gone_only_when_donated(mapping, donate):
    run = parallel.data_parallel(least_squares, mapping=mapping, donate=donate)
    mesh = parallel.data_mesh()
    state = parallel.create(lambda: {"w": jnp.asarray(W)}, mesh)
    old = state["w"]
    for _ in range(2):
        state, _ = run(state, parallel.shard_batch(batch_and_state()[0], mesh))
    assert old.is_deleted() == donate
    np.testing.assert_array_equal(state["w"].shape, W.shape)


def test_created_state_is_replicated_over_the_mesh_keys_included():
    mesh = parallel.data_mesh(2)
    made = parallel.create(lambda key: {"key": key, "w": jnp.ones(3)}, mesh, jax.random.key(4))
    for leaf in made.values():
        assert leaf.is_fully_replicated
        assert leaf.sharding.device_set == set(mesh.devices.flat)
    np.testing.assert_array_equal(
        jax.random.key_data(made["key"]), jax.random.key_data(jax.random.key(4))
    )


def test_the_second_step_on_a_weakly_typed_start_is_the_first_ones_program():
    traced = []

    def step(state, batch, axis_name):
        traced.append(None)
        mean = parallel.mean(batch["y"].mean(), axis_name)
        return {"scale": state["scale"] * mean, "count": state["count"] + 1}, mean

    mesh = parallel.data_mesh(2)
    run = parallel.data_parallel(step, mesh)
    state = parallel.create(lambda: {"scale": jnp.log(2.0), "count": 0}, mesh)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    for _ in range(3):
        state, _ = run(state, parallel.shard_batch({"y": Y}, mesh))
    assert len(traced) == 1


def test_a_sharded_batch_lies_on_the_devices_in_order():
    mesh = parallel.data_mesh(8)
    y = parallel.shard_batch({"y": Y}, mesh)["y"]
    np.testing.assert_array_equal(y, Y)
    for shard, device in zip(y.addressable_shards, mesh.devices.flat, strict=True):
        assert shard.device == device
        np.testing.assert_array_equal(shard.data, Y[shard.index])


@pytest.mark.parametrize("devices", [None, 1, 2, 8])
def test_mapped_examples_keep_their_order_and_see_what_is_shared(devices):
    shares = []

    def fn(shared, examples, axis_name):
        shares.append(len(examples["y"]))
        assert (axis_name is None) == (devices is None)
        return {"sum": shared + examples["x"].sum(1) + examples["y"]}

    mesh = parallel.data_mesh(devices) if devices else None
    got = jax.jit(parallel.map_examples(fn, mesh))(jnp.float32(2), {"x": X, "y": Y})
    np.testing.assert_allclose(got["sum"], 2 + X.sum(1) + Y, rtol=1e-5)
    assert set(shares) == {BATCH // (devices or 1)}


def test_a_mesh_takes_a_count_or_devices():
    assert parallel.data_mesh().size == 8
    assert list(parallel.data_mesh(3).devices.flat) == jax.devices()[:3]
    assert list(parallel.data_mesh(jax.devices()[5:7]).devices.flat) == jax.devices()[5:7]
    assert parallel.data_mesh().axis_names == (parallel.AXIS,)


@pytest.mark.parametrize("devices", [0, -1, 9])
def test_a_mesh_of_devices_that_are_not_there_is_refused(devices):
    with pytest.raises(ValueError, match=rf"devices must be in \[1, 8\], got {devices}"):
        parallel.data_mesh(devices)


def test_an_unknown_mapping_is_refused():
    with pytest.raises(ValueError, match=r"mapping must be one of .*got 'vmap'"):
        parallel.data_parallel(least_squares, mapping="vmap")


@pytest.mark.parametrize("mapping", parallel.MAPPINGS)
def test_an_indivisible_batch_is_refused_before_tracing(mapping):
    def step(state, batch, axis_name):
        raise AssertionError("traced")

    message = "batch must be divisible by the 8 devices, got 12 examples"
    with pytest.raises(ValueError, match=message):
        parallel.data_parallel(step, mapping=mapping)(jnp.zeros(()), {"y": Y[:12]})
    with pytest.raises(ValueError, match=message):
        parallel.shard_batch({"y": Y[:12]}, parallel.data_mesh())


@pytest.mark.parametrize("mapping", parallel.MAPPINGS)
def test_a_step_is_traced_once(mapping):
    traces = []

    def step(state, batch, axis_name):
        traces.append(axis_name)
        return least_squares(state, batch, axis_name)

    mesh = parallel.data_mesh()
    run = parallel.data_parallel(step, mesh, mapping=mapping)
    state = parallel.create(lambda: {"w": jnp.asarray(W)}, mesh)
    batch = batch_and_state()[0]
    state, _ = run(state, parallel.shard_batch(batch, mesh))
    first = len(traces)
    for _ in range(3):
        state, _ = run(state, parallel.shard_batch(batch, mesh))
    assert len(traces) == first == 1


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_many_collectives_on_more_devices_than_cores_do_not_deadlock(mapping):
    # 48 all-reduces per step: 32 that could run at once, and 16 of which each waits for the last.
    def step(state, batch, axis_name):
        apart = [parallel.mean((batch["y"] * w).mean(), axis_name) for w in state["w"]]
        chain = batch["y"].mean()
        for _ in range(16):
            chain = parallel.mean(parallel.varying(chain, axis_name) + batch["y"][0], axis_name)
        return {"w": state["w"] + 0.01 * jnp.stack(apart)}, chain

    mesh = parallel.data_mesh()
    run = parallel.data_parallel(step, mesh, mapping=mapping)
    state = parallel.create(lambda: {"w": jnp.arange(32.0)}, mesh)
    batch = parallel.shard_batch({"y": Y}, mesh)
    for _ in range(200):
        state, chain = run(state, batch)
    np.testing.assert_allclose(state["w"], np.arange(32) * (1 + 0.01 * Y.mean()) ** 200, rtol=1e-4)
    np.testing.assert_allclose(chain, Y.mean() + 16 * Y[::2].mean(), rtol=1e-5)


# ---- memory of CPU programs ----------------------------------------------------------------------

FAULTS = """
import resource, sys
from jaxrobust import parallel
kept = parallel.keep_freed_memory() if sys.argv[1] == "kept" else None
import jax, jax.numpy as jnp
# A temporary of 36 MB that cannot be fused away; the heap needs some calls until it fits it.
step = jax.jit(lambda x, w: jnp.sin(x @ w).sum())
x, w, found = jnp.ones((8800, 16)), jnp.ones((16, 1024)), []
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x, w).block_until_ready()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, sorted(found)[len(found) // 4])
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told to keep memory"
)
def test_kept_memory_is_not_faulted_in_again():
    found = {}
    for how in ("kept", "default"):
        run = subprocess.run(
            [sys.executable, "-c", FAULTS, how],
            env=child_environment(GLIBC_TUNABLES=""), capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[how] = run.stdout.split()
    assert found["kept"][0] == "True"
    assert int(found["kept"][1]) < 0.1 * int(found["default"][1])


TRIMMED = """
import ctypes
from jaxrobust import parallel
assert parallel.keep_freed_memory()
libc = ctypes.CDLL(None)
for function in (libc.malloc, libc.sbrk):
    function.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
block = libc.malloc(3 << 30)
end = libc.sbrk(0)
libc.free(block)
print(block is not None and libc.sbrk(0) == end)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told to keep memory"
)
def test_no_amount_of_freed_memory_is_given_back():
    run = subprocess.run(
        [sys.executable, "-c", TRIMMED],
        env=child_environment(GLIBC_TUNABLES=""), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["True"]


# ---- two processes ------------------------------------------------------------------------------

WORKER = """
import json, sys
from pathlib import Path
from jaxrobust import parallel, processes
rank, port, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
parallel.split_host(2)
parallel.initialize(f"localhost:{port}", 2, rank)
import jax, numpy as np
from tests import test_fit, test_safeclip_fit, test_training
assert (jax.process_count(), jax.local_device_count()) == (2, 2)
assert processes.agreed(rank == 0) and not processes.agreed(rank == 1)
mesh = parallel.data_mesh()
local = lambda batch: {name: leaf[8 * rank : 8 * rank + 8] for name, leaf in batch.items()}
# On devices of its own a process needs no other one: keys, weights and rows.
from tests import test_defended, test_evaluation
own = parallel.data_mesh(jax.local_devices())
everywhere = parallel.create(lambda: test_evaluation.VARIABLES, mesh)
curve = test_evaluation.evaluation.accuracy_curve(
    test_evaluation.apply, everywhere, test_evaluation.IMAGES, test_evaluation.LABELS,
    test_evaluation.PGD, test_evaluation.EPS, key=test_evaluation.KEY, mesh=own,
)
(out / f"curve-{rank}.json").write_text(json.dumps(curve.tolist()))
defended, variables = test_defended.DEFENDED, test_defended.drawn()
found = test_defended.cropd.features(defended, variables, test_defended.IMAGES, mesh=own)
(out / f"features-{rank}.json").write_text(json.dumps(found.tolist()))
for mapping in parallel.MAPPINGS:
    run = test_training.three_steps("batch_norm", mapping, mesh, local)
    leaves = [leaf.tolist() for leaf in jax.tree.leaves(run)]
    (out / f"{mapping}-{rank}.json").write_text(json.dumps(leaves))
# Saves whenever process 0 says so, whatever the clock of process 1, and goes on from there.
saver = sys.modules["jaxrobust.training.saver"]
saver._ASK_EVERY, saver._SAVING = 3, 1e9
often = {"save_steps": None, "save_every": [0.0, 1e9][rank]}
for epochs in (1, 2):
    fitted = test_fit.train(out / "run", devices=4, epochs=epochs, **often)
weights = np.asarray(fitted.state.params["w"]).tolist()
(out / f"fit-{rank}.json").write_text(json.dumps([fitted.history, weights]))
saver._ASK_EVERY = 9  # more than the steps of any pass
for name, changes in (("similarity", {}), ("agreement", test_safeclip_fit.AGREEING)):
    options = {"mesh": mesh, "directory": out / name, "save_every": [0.0, 1e9][rank]}
    recipe = test_safeclip_fit.recipe(epochs=4, **changes)
    test_safeclip_fit.fit_until(2, recipe, **options)
    found = test_safeclip_fit.fit(recipe, **options)
    safe = found.trust.safe.tolist()
    (out / f"{name}-{rank}.json").write_text(json.dumps([found.history, safe]))
"""


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    from tests import test_defended, test_evaluation, test_fit, test_safeclip_fit, test_training

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parent.parent
    environment = child_environment(PYTHONPATH=str(root), JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    expected = jax.tree.leaves(test_training.on_one_device("batch_norm"))
    whole = test_fit.train(devices=4, epochs=2)
    alone = {
        name: test_safeclip_fit.fit(test_safeclip_fit.recipe(epochs=4, **changes))
        for name, changes in (("similarity", {}), ("agreement", test_safeclip_fit.AGREEING))
    }
    curve = test_evaluation.evaluation.accuracy_curve(
        test_evaluation.apply, test_evaluation.VARIABLES, test_evaluation.IMAGES,
        test_evaluation.LABELS, test_evaluation.PGD, test_evaluation.EPS, key=test_evaluation.KEY,
    )  # fmt: skip
    variables = test_defended.drawn()
    features = test_defended.by_hand(variables, test_defended.IMAGES)[1]
    for rank in range(2):
        assert json.loads((tmp_path / f"curve-{rank}.json").read_text()) == curve.tolist()
        got = json.loads((tmp_path / f"features-{rank}.json").read_text())
        np.testing.assert_allclose(got, features, rtol=1e-4, atol=1e-6)
        for mapping in parallel.MAPPINGS:
            got = json.loads((tmp_path / f"{mapping}-{rank}.json").read_text())
            for leaf, other in zip(got, expected, strict=True):
                np.testing.assert_allclose(np.asarray(leaf), other, atol=1e-5)
        history, weights = json.loads((tmp_path / f"fit-{rank}.json").read_text())
        np.testing.assert_allclose(weights, whole.state.params["w"], atol=1e-5)
        assert [entry["epoch"] for entry in history] == [1, 2]
        for kind, one in alone.items():
            history, safe = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
            for entry, other in zip(history, one.history, strict=True):
                assert entry.pop("fallback", "") == other.get("fallback", "")
                numbers = {name: value for name, value in other.items() if name != "fallback"}
                assert entry == pytest.approx(numbers, rel=1e-5)
            assert safe == one.trust.safe.tolist()


@pytest.mark.parametrize(
    ("backend", "precision", "exact"),
    [
        ("cpu", None, True),
        ("gpu", None, False),
        ("tpu", "tensorfloat32", False),
        ("tpu", "highest", True),
        ("gpu", "float32", True),
    ],
)
def test_products_are_exact_on_cpus_and_where_it_is_asked_for(
    backend, precision, exact, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.default_matmul_precision(precision):
        assert parallel.exact_products() == exact
