"""Tests of the training loop: resuming, kills, early stopping, validation, what it refuses."""

import inspect
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust import attacks, checkpoint, models, parallel
from jaxrobust.data.dataset import Dataset, Record, Source
from jaxrobust.data.decoding import encode_png
from jaxrobust.training import (
    adversarial,
    create_state,
    fit,
    learning_rate,
    read_metrics,
    standard,
    train_step,
)

SHAPE, CLASSES, COUNT = (4, 4, 1), 3, 84
BATCH, EPOCHS = 16, 6
PER_EPOCH = COUNT // BATCH  # 5, and 4 examples left over


def linear_logits(variables, x):
    return x.reshape(len(x), -1) @ variables["params"]["w"]


LINEAR = models.Model(
    init=lambda key, shape: {"params": {"w": 0.1 * jax.random.normal(key, (16, CLASSES))}},
    apply=linear_logits,
    train=lambda variables, x, *, axis_name=None, dtype=None: (linear_logits(variables, x), {}),
    config={},
)
OPTIMIZER = optax.adam(learning_rate("cosine", 0.02, EPOCHS * PER_EPOCH))


def digits():
    random_state = np.random.default_rng(0)
    images = random_state.integers(0, 256, (COUNT, *SHAPE)).astype(np.float32) / np.float32(255)
    labels = images.reshape(COUNT, -1)[:, :CLASSES].argmax(1).astype(np.int32)
    return Dataset(images, labels, np.arange(COUNT, dtype=np.int32), ("a", "b", "c"))


def accuracy(variables):
    """Eager on purpose: loose operations on all devices between two steps."""
    data = digits()
    right = linear_logits(variables, jnp.asarray(data.images)).argmax(1) == data.labels
    return {"score": right.mean(), "weight": jnp.abs(variables["params"]["w"]).sum()}


def train(
    directory=None, dataset=None, *, devices=8, model=LINEAR, attack=attacks.n_fgsm(0.05),  # noqa: B008
    state_seed=0, **options,
):  # fmt: skip
    """A small adversarial run with everything that a checkpoint has to hold."""
    mesh = parallel.data_mesh(devices)
    state = parallel.create(
        lambda key: create_state(model, OPTIMIZER, key, SHAPE, ema=True), mesh,
        jax.random.key(state_seed),
    )  # fmt: skip
    step = train_step(model, OPTIMIZER, adversarial(attack), ema_decay=0.9)
    defaults = {"batch_size": BATCH, "epochs": EPOCHS, "validate": accuracy, "log_every": 3}
    return fit(
        step,
        state,
        digits() if dataset is None else dataset,
        mesh=mesh,
        directory=directory,
        progress=False,
        **(defaults | {"save_steps": 4, "averaged": True} | options),
    )


def numbers(state):
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


def assert_same_run(fitted, expected, directory=None, expected_directory=None):
    """Bit for bit, times apart."""
    for tree, other in (
        (numbers(fitted.state), numbers(expected.state)),
        (fitted.variables, expected.variables),
    ):
        chex.assert_trees_all_equal(tree, other)
    assert fitted.history == expected.history
    assert fitted[3:5] == expected[3:5]
    if directory is not None:
        rows = (directory / "metrics.csv").read_bytes()
        assert rows == (expected_directory / "metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    return train(directory), directory


# ---- a whole run --------------------------------------------------------------------------------


def test_a_run_learns_and_tells_what_it_did(unbroken):
    fitted, directory = unbroken
    assert [entry["epoch"] for entry in fitted.history] == list(range(1, EPOCHS + 1))
    scores = [entry["score"] for entry in fitted.history]
    assert scores[-1] > scores[0]
    assert fitted.best_epoch == 1 + int(np.argmax(scores))
    assert float(accuracy(fitted.variables)["score"]) == pytest.approx(max(scores))
    assert fitted.epochs == EPOCHS
    assert int(fitted.state.step) == EPOCHS * PER_EPOCH
    assert fitted.seconds > 0
    rows = read_metrics(directory)
    assert [row["step"] for row in rows] == list(range(3, 31, 3))
    assert {"loss", "accuracy", "gradient_norm"} < set(rows[0])
    assert checkpoint.latest_step(directory / "checkpoint") == EPOCHS * PER_EPOCH


def on_disk(change=lambda pixels: pixels):
    """The digits as if they were read from files."""
    data = digits()
    pixels = change(np.rint(data.images * 255).astype(np.uint8))

    def read(positions):
        return [
            Record(encode_png(pixels[i]), int(data.labels[i]), i, f"{i}.png") for i in positions
        ]

    return Source(read=read, count=COUNT, class_names=data.class_names, channels=1)


def test_files_validation_and_source_change_nothing(unbroken):
    alone = train(None, on_disk(), validate=None, averaged=False)
    chex.assert_trees_all_equal(numbers(alone.state), numbers(unbroken[0].state))
    assert alone.history == []
    assert (alone.best_epoch, alone.epochs) == (EPOCHS, EPOCHS)
    last = alone.state.variables()
    chex.assert_trees_all_equal(alone.variables, last)


@pytest.mark.parametrize(("mapping", "devices"), [("shard_map", 1), ("jit", 8), ("pmap", 2)])
def test_a_run_is_the_same_under_any_mapping(unbroken, mapping, devices):
    fitted = train(devices=devices, mapping=mapping)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        numbers(fitted.state),
        numbers(unbroken[0].state),
    )


# ---- going on -----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path, unbroken):
    calls = []

    def failing(variables):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return accuracy(variables)

    with pytest.raises(Interrupted):
        train(tmp_path, validate=failing)
    # Epoch 3 ended at step 15, whose validation failed; row 15 of the metrics will come again.
    assert checkpoint.latest_step(tmp_path / "checkpoint") == 12
    assert read_metrics(tmp_path)[-1]["step"] == 15
    assert_same_run(train(tmp_path), unbroken[0], tmp_path, unbroken[1])


def test_a_finished_run_returns_at_once_and_changes_nothing(unbroken):
    fitted, directory = unbroken
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}

    def refuse(variables):
        raise AssertionError("validated again")

    again = train(directory, validate=refuse)
    assert_same_run(again, fitted)
    assert again.seconds == pytest.approx(fitted.seconds, abs=5)
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


RUN = """
import sys
from pathlib import Path
from tests import test_fit
test_fit.train(Path(sys.argv[1]), epochs=60, save_steps=7, validate=test_fit.slow_accuracy)
"""


def slow_accuracy(variables):
    time.sleep(0.05)
    print("epoch", flush=True)
    return accuracy(variables)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_numbers(tmp_path):
    root, moments = Path(__file__).parent.parent, random.Random(0)
    expected = train(tmp_path / "whole", epochs=60, save_steps=7)
    broken, resumed_at = tmp_path / "broken", []
    command = [sys.executable, "-c", RUN, str(broken)]
    # The devices of conftest.py are in the environment already.
    environment = os.environ | {"PYTHONPATH": str(root)}
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            for _ in range(moments.randint(3, 12)):
                assert child.stdout.readline() == "epoch\n"
            time.sleep(moments.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        resumed_at.append(checkpoint.latest_step(broken / "checkpoint") or 0)
    assert 0 < resumed_at[0] < resumed_at[1] < resumed_at[2] < 60 * PER_EPOCH
    assert any(step % PER_EPOCH for step in resumed_at)
    fitted = train(broken, epochs=60, save_steps=7)
    assert_same_run(fitted, expected, broken, tmp_path / "whole")


# ---- early stopping -----------------------------------------------------------------------------


def scripted(scores):
    remaining = list(scores)
    return lambda variables: {"score": remaining.pop(0)}


@pytest.mark.parametrize("scores", [{"score": float("nan")}, {"accuracy": 0.5}])
def test_a_validation_without_a_number_is_refused(scores):
    with pytest.raises(ValueError, match="validate must return a number under 'score'"):
        train(validate=lambda variables: scores)


def test_patience_stops_and_the_best_variables_come_back(tmp_path):
    seen = []

    def validate(variables):
        seen.append(jax.tree.map(np.asarray, variables))
        return {"score": [0.1, 0.5, 0.4, 0.5, 0.6][len(seen) - 1]}

    fitted = train(tmp_path, validate=validate, patience=2)
    assert (fitted.best_epoch, fitted.epochs) == (2, 4)
    assert [entry["score"] for entry in fitted.history] == [0.1, 0.5, 0.4, 0.5]
    chex.assert_trees_all_equal(fitted.variables, seen[1])
    assert int(fitted.state.step) == 4 * PER_EPOCH
    # A stopped run is finished: started again, it stays so.
    again = train(tmp_path, validate=scripted([]), patience=2)
    assert_same_run(again, fitted)


def test_validation_begins_when_the_steps_before_it_are_done():
    def slow(variables, x, **options):
        logits, stats = LINEAR.train(variables, x, **options)
        start = jnp.full((300, 300), jax.lax.stop_gradient(logits.sum()))
        busy = jax.lax.fori_loop(0, 100, lambda _, m: jnp.tanh(m @ m), start)
        return logits + 1e-30 * busy.mean(), stats

    ready = []

    def validate(variables):
        ready.append(all(leaf.is_ready() for leaf in jax.tree.leaves(variables)))
        return {"score": 0.0}

    train(model=LINEAR._replace(train=slow), validate=validate, epochs=1, devices=1)
    assert ready == [True]


def test_validation_is_every_so_many_epochs_and_after_the_last():
    fitted = train(validate=scripted([1, 2, 3]), validate_every=4, epochs=6)
    assert [entry["epoch"] for entry in fitted.history] == [4, 6]
    assert fitted.best_epoch == 6


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number >= 1, got 0"),
        ({"validate_every": 0}, "validate_every must be a whole number >= 1, got 0"),
        ({"log_every": 0}, "log_every must be a whole number >= 1, got 0"),
        ({"save_steps": 0}, "save_steps must be a whole number >= 1, got 0"),
        ({"patience": 0}, "patience must be a whole number >= 1, got 0"),
        ({"patience": 3, "validate": None}, "patience needs validate, got patience=3 without it"),
        ({"batch_size": 12}, "batch_size must be divisible by the 8 devices, got 12"),
        ({"batch_size": 96}, "batch_size must be <= 84"),
        ({"mapping": "vmap"}, "mapping must be one of"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_compiled_or_written(
    tmp_path, options, message
):
    def step(state, batch, axis_name):
        raise AssertionError("traced")

    state = create_state(LINEAR, OPTIMIZER, jax.random.key(0), SHAPE)
    arguments = {"batch_size": BATCH, "epochs": 1, "validate": accuracy, "progress": False}
    with pytest.raises(ValueError, match=message):
        fit(step, state, digits(), directory=tmp_path / "run", **(arguments | options))
    assert not (tmp_path / "run").exists()


def test_an_average_that_is_not_kept_is_refused_before_training():
    def step(state, batch, axis_name):
        raise AssertionError("traced")

    state = create_state(LINEAR, OPTIMIZER, jax.random.key(0), SHAPE)
    with pytest.raises(ValueError, match="averaged=True needs a state with an EMA"):
        fit(step, state, digits(), batch_size=BATCH, epochs=1, averaged=True)


def with_one(dataset, field, value):
    column = np.array(getattr(dataset, field))
    column[0] = value
    return dataset.replace(**{field: column})


def forced(dataset, **columns):
    """With columns that the tests' own type checks would not let pass."""
    for name, column in columns.items():
        object.__setattr__(dataset, name, column)
    return dataset


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda d: with_one(d, "labels", 3),
            ValueError,
            r"labels must lie in \[0, 3\).*got 0 to 3",
        ),
        (lambda d: with_one(d, "labels", -1), ValueError, "got -1 to 2"),
        (lambda d: forced(d, labels=d.labels[:50]), ValueError, r"labels must be \[84\]"),
        (lambda d: forced(d, indices=d.indices[:50]), ValueError, r"indices must be \[84\]"),
        (lambda d: forced(d, labels=np.float32(d.labels)), TypeError, "labels must be whole"),
        (lambda d: with_one(d, "images", np.nan), ValueError, "images must lie in"),
        (lambda d: forced(d, salience=d.images[..., :0]), ValueError, "salience must be"),
        (lambda d: d.replace(salience=d.images[..., :1] - 1), ValueError, "salience must lie in"),
    ],
)
def test_examples_that_are_none_are_refused_before_training(change, error, message):
    with pytest.raises(error, match=message):
        train(dataset=change(digits()))


def test_what_is_no_data_set_and_a_state_that_was_used_up_are_refused():
    with pytest.raises(TypeError, match=r"dataset must be a .* or data.Source, got tuple"):
        inspect.unwrap(fit)(None, None, (digits().images,), batch_size=8, epochs=1)
    step = train_step(LINEAR, OPTIMIZER, standard())
    mesh = parallel.data_mesh(1)
    state = parallel.create(
        lambda key: create_state(LINEAR, OPTIMIZER, key, SHAPE), mesh, jax.random.key(0)
    )
    options = {"batch_size": BATCH, "epochs": 1, "mesh": mesh, "progress": False}
    fit(step, state, digits(), **options)
    with pytest.raises(ValueError, match="state must be fresh"):
        fit(step, state, digits(), **options)


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(tmp_path):
    whole = train_step(LINEAR, OPTIMIZER, standard())

    def step(state, batch, axis_name=None):
        state, metrics = whole(state, batch, axis_name)
        return state, {**metrics, "loss": jnp.where(state.step > 5, jnp.nan, metrics["loss"])}

    state = create_state(LINEAR, OPTIMIZER, jax.random.key(0), SHAPE)
    with pytest.raises(FloatingPointError, match="the loss is nan after step 6"):
        fit(
            step, state, digits(), batch_size=BATCH, epochs=EPOCHS, mesh=parallel.data_mesh(1),
            directory=tmp_path, save_steps=2, progress=False,
        )  # fmt: skip
    assert checkpoint.latest_step(tmp_path / "checkpoint") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"rate": 0.1}}, r"expected a run with settings\.rate 0\.1, found None"),
        ({"dataset": with_one(digits(), "images", 0.5)}, "expected a run with data 84 "),
        ({"seed": 1}, "expected a run with seed 1, found 0"),
        ({"batch_size": 8}, "expected a run with batch_size 8, found 16"),
        ({"dataset": digits().take(slice(None, None, -1))}, "expected a run with data 84 "),
        (
            {"attack": attacks.n_fgsm(0.06)},
            r"run with step\.objective\.attack\.eps 0\.06, found 0\.05",
        ),
        ({"state_seed": 1}, "expected a run with key "),
        ({"epochs": 1}, "expected a run of 5 steps, epochs=1, found one of 30"),
        ({"validate": None}, r"unexpected \(1\): 1/params/w"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_and_kept(unbroken, options, message):
    directory = unbroken[1]
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    with pytest.raises(checkpoint.CheckpointError, match=message):
        train(directory, **options)
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


def test_other_images_on_disk_are_another_run(tmp_path):
    train(tmp_path, on_disk(), epochs=1)
    train(tmp_path, on_disk(), epochs=2)
    with pytest.raises(checkpoint.CheckpointError, match="expected a run with data 84 on disk"):
        train(tmp_path, on_disk(lambda pixels: 255 - pixels), epochs=3)
