import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrobust import checkpoint
from jaxrobust.checkpoint import CheckpointError, atomic_write, latest_step, restore, save
from tests.conftest import child_environment

ROOT = Path(__file__).parent.parent


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    key: Any
    extra: Any


def small_state(seed=0, width=3):
    key = jax.random.key(seed)
    params = {
        "conv": {"kernel": jax.random.normal(key, (5, width)), "bias": jnp.zeros(width)},
        "half": jnp.linspace(0, 1, 7, dtype=jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    extra = {"pool": jnp.zeros((0, 4)), "mask": jnp.array([True, False]), "none": None, "empty": ()}
    return State(jnp.int32(7), params, optimizer.init(params), key, extra)


def numbers(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(numbers(a), numbers(b))


def mesh(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def sharded_state(devices):
    split, whole = (NamedSharding(mesh(devices), spec) for spec in (P("data"), P()))
    return {
        "split": jax.device_put(jnp.arange(48.0).reshape(8, 6), split),
        "whole": jax.device_put(jnp.arange(5), whole),
        "key": jax.device_put(jax.random.key(3), whole),
        "keys": jax.device_put(jax.random.split(jax.random.key(4, impl="rbg"), 8), split),
    }


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- saving and restoring -----------------------------------------------------------------------


def test_a_restored_state_is_bit_identical_and_so_is_the_loop(tmp_path):
    loop = {"seed": 3, "position": [1, 20], "best": None, "history": [{"loss": 0.1}], "name": "ü"}
    save(tmp_path / "run", 7, small_state(), loop=loop)
    step, state, restored_loop = restore(tmp_path / "run", small_state(seed=1))
    assert step == 7
    assert restored_loop == loop
    assert_same(state, small_state())


def test_nan_and_infinity_in_the_loop_survive(tmp_path):
    save(tmp_path, 0, small_state(), loop={"best": float("-inf"), "last": float("nan")})
    loop = restore(tmp_path, small_state())[2]
    assert loop["best"] == float("-inf")
    assert np.isnan(loop["last"])


def test_an_abstract_state_is_enough_to_restore(tmp_path):
    save(tmp_path, 1, small_state())
    step, state, loop = restore(tmp_path, jax.eval_shape(small_state))
    assert (step, loop) == (1, {})
    assert_same(state, small_state())


@pytest.mark.parametrize("directory", ["missing", "empty"])
def test_without_a_checkpoint_restore_gives_none(tmp_path, directory):
    (tmp_path / "empty").mkdir()
    assert restore(tmp_path / directory, small_state()) is None
    assert latest_step(tmp_path / directory) is None
    assert not (tmp_path / "missing").exists()


def test_the_newest_steps_are_kept(tmp_path):
    for step in (0, 9, 10, 11):
        save(tmp_path, step, small_state(), keep=3)
    assert sorted(os.listdir(tmp_path)) == ["10", "11", "9"]
    assert latest_step(tmp_path) == 11
    save(tmp_path, 12, small_state(), keep=1)
    assert os.listdir(tmp_path) == ["12"]


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 2), (2, 8), (8, 1), (1, 8)])
def test_a_state_moves_to_another_number_of_devices(tmp_path, saved_on, restored_on):
    save(tmp_path, 1, sharded_state(saved_on))
    like = sharded_state(restored_on)
    like |= {name: jnp.zeros_like(like[name]) for name in ("split", "whole")}
    state = restore(tmp_path, like)[1]
    assert_same(state, sharded_state(saved_on))
    for name, leaf in state.items():
        assert leaf.sharding == like[name].sharding
        assert leaf.committed


def test_a_state_that_is_bound_to_no_device_comes_back_unbound(tmp_path):
    # Otherwise a resumed run could not mix it with arrays on a mesh, and the unbroken run could.
    save(tmp_path, 1, small_state())
    state = restore(tmp_path, small_state())[1]
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))
    on_mesh = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh(8), P("data")))
    jax.block_until_ready(on_mesh + state.params["conv"]["bias"])


def test_saving_and_restoring_say_nothing(tmp_path, caplog, capfd):
    save(tmp_path, 1, small_state())
    restore(tmp_path, small_state())
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
    assert capfd.readouterr().err == ""


def test_importing_loads_neither_orbax_nor_safetensors():
    code = (
        "import sys, jaxrobust.checkpoint, jaxrobust.training.logging;"
        "heavy = {'orbax', 'safetensors', 'tensorboardX', 'tensorstore'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- what is refused ----------------------------------------------------------------------------


def test_a_damaged_file_of_any_kind_is_named_and_nothing_is_changed(tmp_path):
    save(tmp_path / "whole", 3, small_state(), loop={"seed": 1})
    save(tmp_path / "whole", 4, small_state(), loop={"seed": 1})
    run = tmp_path / "run"
    names = sorted(contents(tmp_path / "whole" / "4"))
    assert len(names) >= 8
    for name in names:
        size = (tmp_path / "whole" / "4" / name).stat().st_size
        for cut in {None, 0, size // 2, size - 1} - {size, -1}:
            shutil.copytree(tmp_path / "whole", run)
            if cut is None:
                (run / "4" / name).unlink()
            else:
                os.truncate(run / "4" / name, cut)
            before = contents(run)
            for attempt in (
                lambda: restore(run, small_state()),
                lambda: restore(run, small_state(), verify=False),
                lambda: save(run, 5, small_state()),
            ):
                with pytest.raises(CheckpointError) as error:
                    attempt()
                assert str(run / "4") in str(error.value)
                assert str(name) in str(error.value)
            assert contents(run) == before
            shutil.rmtree(run)


def test_a_flipped_bit_is_noticed(tmp_path):
    save(tmp_path, 4, small_state())
    for name, data in contents(tmp_path).items():
        if data and name.name != "manifest.json":
            flipped = bytearray(data)
            flipped[len(data) // 2] ^= 1
            (tmp_path / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"content of .* has changed"):
                restore(tmp_path, small_state())
            (tmp_path / name).write_bytes(data)
    assert restore(tmp_path, small_state()) is not None


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (small_state(width=4), r"params/conv/kernel is float32\[5, 3\], expected float32\[5, 4\]"),
        (
            small_state()._replace(step=jnp.float32(7)),
            r"different \(1\): step is int32\[\], expected float32\[\]",
        ),
        (small_state()._replace(extra={}), r"unexpected \(2\): extra/mask bool\[2\]; extra/pool"),
        (
            small_state()._replace(extra={**small_state().extra, "ema": jnp.ones(2)}),
            r"missing \(1\): extra/ema float32\[2\]",
        ),
        (
            small_state()._replace(key=jax.random.key(0, impl="rbg")),
            r"key is key<fry>\[\], expected key<rbg>",
        ),
    ],
    ids=["shape", "dtype", "unexpected", "missing", "key"],
)
def test_the_checkpoint_of_another_model_is_refused_and_kept(tmp_path, like, message):
    save(tmp_path, 1, small_state())
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        restore(tmp_path, like)
    assert str(tmp_path / "1") in str(error.value)
    with pytest.raises(CheckpointError, match="holds another model"):
        save(tmp_path, 2, like)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("names", [["cat.png"], ["0/a.png", "1/b.png"], ["5/state/x", "notes"]])
def test_a_directory_of_other_things_is_refused_and_kept(tmp_path, names):
    for name in names:
        atomic_write(tmp_path / name, "mine")
    before = contents(tmp_path)
    for attempt in (
        lambda: restore(tmp_path, small_state()),
        lambda: save(tmp_path, 9, small_state()),
    ):
        with pytest.raises(CheckpointError) as error:
            attempt()
        assert str(tmp_path) in str(error.value)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_another_program_is_refused_and_kept(tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "5", {"weights": jnp.ones(3)})
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="5: not a whole checkpoint of this library"):
        restore(tmp_path, {"weights": jnp.ones(3)})
    with pytest.raises(CheckpointError, match="5: not a whole checkpoint of this library"):
        save(tmp_path, 6, {"weights": jnp.ones(3)})
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(CheckpointError, match="run: expected a directory of checkpoints"):
        restore(tmp_path / "run", small_state())


@pytest.mark.parametrize("step", [4, 5])
def test_an_older_or_equal_step_never_replaces_a_checkpoint(tmp_path, step):
    save(tmp_path, 5, small_state())
    with pytest.raises(CheckpointError, match=f"larger than the newest one there, 5, got {step}"):
        save(tmp_path, step, small_state())
    assert os.listdir(tmp_path) == ["5"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must be >= 0, got -1"),
        ({"keep": 0}, ValueError, "keep must be >= 1, got 0"),
        ({"state": {"a": {"b": 1.0}}}, TypeError, "got float at 'a/b'"),
        ({"state": {}}, TypeError, "at least one array"),
        ({"state": {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}}, ValueError, "two at 'a/b'"),
        ({"loop": {"best": jnp.ones(1)}}, TypeError, "loop must be JSON-able"),
        ({"loop": {"a": [{1: "one"}]}}, TypeError, "names must be strings, got 1"),
        ({"state": {"n": np.array([2**40])}}, TypeError, "int64 at 'n', .* back as int32"),
    ],
    ids=["step", "keep", "leaf", "empty", "names", "loop", "numbered", "wide"],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, changes, error, message):
    arguments = {"step": 1, "state": {"a": jnp.ones(1)}} | changes
    with pytest.raises(error, match=message):
        save(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["gs://bucket/run", Path("gs://bucket/run")])
def test_a_bucket_is_no_folder(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: save(address, 1, small_state()),
        lambda: restore(address, small_state()),
        lambda: latest_step(address),
    ):
        with pytest.raises(ValueError, match=r"directory must lie in a file system .* got 'gs:/"):
            call()
    assert os.listdir(tmp_path) == []


# ---- kills --------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "moment", ["mkdir", "_save_arrays", "atomic_write", "rename", "hide", "rmtree"]
)
def test_a_kill_at_any_stage_leaves_a_checkpoint_and_the_next_save_cleans_up(
    tmp_path, monkeypatch, moment
):
    for step in (1, 2):
        save(tmp_path, step, small_state(step))
    with monkeypatch.context() as patch:
        kill_at(patch, moment)
        with pytest.raises(Killed):
            save(tmp_path, 3, small_state(3))
    for finished in set(os.listdir(tmp_path)) & {"1", "2", "3"}:
        shutil.copytree(tmp_path / finished, tmp_path.parent / "alone" / finished)
        assert_same(
            restore(tmp_path.parent / "alone", small_state())[1], small_state(int(finished))
        )
        shutil.rmtree(tmp_path.parent / "alone")
    step, state, _ = restore(tmp_path, small_state())
    assert step == (3 if moment in ("hide", "rmtree") else 2)
    assert_same(state, small_state(step))
    save(tmp_path, 4, small_state(4))
    assert_same(restore(tmp_path, small_state())[1], small_state(4))
    assert sorted(os.listdir(tmp_path)) == [str(step), "4"]


def kill_at(patch, moment):
    """Make `save` die at one stage, with that stage half done where it can be."""

    def half(path, *_):
        victim = next(p for p in Path(path).rglob("*") if p.is_file())
        victim.unlink()
        raise Killed

    def half_saved(path, *_):
        atomic_write(path / "state" / "manifest.ocdbt", "half")
        raise Killed

    real_rename = os.rename

    def rename(source, target):
        if Path(source).name.startswith(".saving") == (moment == "rename"):
            raise Killed
        real_rename(source, target)

    def dead(*_, **__):
        raise Killed

    if moment in ("_save_arrays", "atomic_write"):
        patch.setattr(checkpoint, moment, half_saved if moment == "_save_arrays" else dead)
    elif moment == "mkdir":
        patch.setattr(checkpoint, "_remove_unfinished", dead)
    elif moment == "rmtree":
        patch.setattr(shutil, "rmtree", half)
    else:
        # Orbax renames, too; only the names that `save` itself renames are hit.
        patch.setattr(checkpoint, "os", FakeOs(rename))


class FakeOs:
    def __init__(self, rename):
        self.rename = rename

    def __getattr__(self, name):
        return getattr(os, name)


SAVE_IN_A_LOOP = """
import sys
import jax.numpy as jnp
from jaxrobust.checkpoint import restore, save
like = {"a": jnp.zeros((64, 1024)), "b": jnp.zeros((3, 50)), "step": jnp.int32(0)}
found = restore(sys.argv[1], like)
step = 0
if found:
    step, state, loop = found
    assert loop == {"step": step} and all((leaf == step).all() for leaf in state.values())
print("restored", step, flush=True)
while True:
    step += 1
    state = {name: jnp.full_like(leaf, step) for name, leaf in like.items()}
    save(sys.argv[1], step, state, loop={"step": step})
    print("saved", step, flush=True)
"""


def test_sigkill_at_random_moments_never_breaks_or_loses_a_checkpoint(tmp_path):
    moments, announced, kills = random.Random(0), 0, 0
    while kills < 5 or announced < 3:  # a busy machine may need more lives for three saves
        kills += 1
        assert kills <= 30
        command = [sys.executable, "-c", SAVE_IN_A_LOOP, str(tmp_path / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            assert child.stdout.readline().startswith("restored")
            for _ in range(moments.randint(0, 2)):
                child.stdout.readline()
            time.sleep(moments.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
            announced = max([announced, *(int(line.split()[1]) for line in child.stdout)])
        assert child.returncode == -signal.SIGKILL
        steps = latest_step(tmp_path / "run") or 0
        assert announced <= steps
        if steps:
            like = {"a": jnp.zeros((64, 1024)), "b": jnp.zeros((3, 50)), "step": jnp.int32(0)}
            step, state, loop = restore(tmp_path / "run", like)
            assert loop == {"step": step}
            assert all((leaf == step).all() for leaf in state.values())


# ---- several processes --------------------------------------------------------------------------

ONE_OF_TWO = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jaxrobust.checkpoint import restore, save
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
def state(step):
    def make():
        return jnp.arange(8.0) + step, jnp.ones(3) * step, jax.random.key(step)
    leaves = jax.jit(make, out_shardings=(split, whole, whole))()
    return dict(zip(("split", "whole", "key"), leaves))
assert restore(sys.argv[1], state(0)) is None
for step in (1, 2, 3):
    save(sys.argv[1], step, state(step), loop={"seed": step})
step, found, loop = restore(sys.argv[1], state(0))
assert (step, loop) == (3, {"seed": 3})
assert found["split"].sharding == split and found["key"].sharding == whole
expected = state(3)
for name in ("split", "whole"):
    same = jax.jit(lambda a, b: (a == b).all(), out_shardings=whole)(found[name], expected[name])
    assert bool(same), name
"""


def test_two_processes_save_together_and_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(tmp_path / "run"), address, str(process)],
            cwd=ROOT,
            env=child_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], errors
    like = {"split": jnp.zeros(8), "whole": jnp.zeros(3), "key": jax.random.key(0)}
    step, state, loop = restore(tmp_path / "run", like)
    assert (step, loop) == (3, {"seed": 3})
    assert_same(
        state, {"split": jnp.arange(8.0) + 3, "whole": jnp.ones(3) * 3, "key": jax.random.key(3)}
    )
    assert sorted(os.listdir(tmp_path / "run")) == ["2", "3"]


# ---- atomic_write -------------------------------------------------------------------------------


def test_atomic_write_replaces_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.json"
    atomic_write(path, '{"ü": 1}')
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            atomic_write(path, "lost")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["results.json"]


def test_atomic_write_gives_the_permissions_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    atomic_write(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
