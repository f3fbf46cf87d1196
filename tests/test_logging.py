import csv
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrobust.training.logging import metric_logger, read_metrics

ROOT = Path(__file__).parent.parent


def run(directory, steps, *, resume_step=None, tensorboard=False):
    """A pretended run: the loss at every step, the validation accuracy at every third."""
    with metric_logger(directory, tensorboard=tensorboard, resume_step=resume_step) as log:
        for step in steps:
            metrics = {"loss": np.float32(1 / (step + 1))}
            if step % 3 == 2:
                metrics["val/accuracy"] = jnp.asarray([step / 10])
            log(step, metrics)


def text(directory):
    return (directory / "metrics.csv").read_text()


def events(directory):
    """Read all event files: records of [length, crc, data, crc]."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_a_row_per_step_and_a_column_per_metric(tmp_path):
    run(tmp_path, range(4))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "loss", "val/accuracy"],
        ["0", "1.0", ""],
        ["1", "0.5", ""],
        ["2", repr(float(np.float32(1 / 3))), repr(float(np.float32(0.2)))],
        ["3", "0.25", ""],
    ]


def test_rows_read_back_as_they_were_logged(tmp_path):
    rows = [{"a": 0.1, "b": float("inf")}, {"a": -3, "b": float("nan")}, {"b": 1e-300}]
    with metric_logger(tmp_path, tensorboard=False) as log:
        for step, row in enumerate(rows):
            log(step, row)
    expected = [{"step": step, **row} for step, row in enumerate(rows)]
    assert str(read_metrics(tmp_path)) == str(
        [{**row, "a": float(row["a"])} if "a" in row else row for row in expected]
    )
    assert read_metrics(tmp_path / "metrics.csv")[2] == expected[2]


@settings(max_examples=15, deadline=None)
@given(killed_at=st.integers(0, 12), back=st.integers(0, 12), torn=st.integers(0, 30))
def test_a_killed_and_resumed_run_leaves_the_file_of_an_unbroken_one(
    tmp_path_factory, killed_at, back, torn
):
    unbroken, broken = tmp_path_factory.mktemp("unbroken"), tmp_path_factory.mktemp("broken")
    run(unbroken, range(12))
    run(broken, range(killed_at))
    whole = text(broken)
    with (broken / "metrics.csv").open("a") as file:
        file.write(f"{killed_at},0.1234567,0.1234567"[:torn])  # what a kill in a write leaves
    resume = killed_at - 1 - back
    resume = resume if resume >= 0 else None
    run(broken, range(0 if resume is None else resume + 1, 12), resume_step=resume)
    assert whole.startswith("step")
    assert text(broken) == text(unbroken)


def test_a_new_run_drops_the_rows_of_the_old_one(tmp_path):
    run(tmp_path, range(5))
    run(tmp_path, range(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_what_was_logged_survives_sigkill(tmp_path):
    code = """
import os, signal, sys
from jaxrobust.training.logging import metric_logger
with metric_logger(sys.argv[1], tensorboard=True) as log:
    log(1, {"loss": 0.5})
    log(2, {"loss": 0.25, "accuracy": 1.0})
    log(3, {"loss": 0.125})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25, "accuracy": 1.0},
        {"step": 3, "loss": 0.125},
    ]
    logged = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert (3, "loss", 0.125) in logged
    assert len(logged) == 4


def test_tensorboard_hides_the_steps_that_are_logged_again(tmp_path):
    run(tmp_path, range(5), tensorboard=True)
    run(tmp_path, range(3, 6), resume_step=2, tensorboard=True)
    visible: dict = {}
    for event in events(tmp_path):
        if event.HasField("session_log") and event.session_log.status == 1:  # START
            visible = {at: value for at, value in visible.items() if at[0] < event.step}
        for value in event.summary.value:
            assert (event.step, value.tag) not in visible
            visible[event.step, value.tag] = value.simple_value
    from_csv = {
        (row["step"], name): value
        for row in read_metrics(tmp_path)
        for name, value in row.items()
        if name != "step"
    }
    assert len(from_csv) == 8
    assert visible == from_csv


def test_other_processes_write_nothing(tmp_path):
    with metric_logger(tmp_path / "run", write=False) as log:
        log(0, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_without_tensorboard_no_event_file_is_written(tmp_path):
    run(tmp_path, range(2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_missing_tensorboardx_is_named_before_anything_is_written(tmp_path, monkeypatch):
    for name in [
        "tensorboardX",
        *(name for name in sys.modules if name.startswith("tensorboardX.")),
    ]:
        monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(ModuleNotFoundError, match="pip install tensorboardX"),
        metric_logger(tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "metrics", "message"),
    [
        (4, {"loss": 1.0}, "larger than the last one logged, 4, got 4"),
        (5, {"loss": np.zeros(2)}, r"'loss' must be one number, got float64\[2\]"),
        (5, {"loss": "low"}, "'loss' must be one number"),
        (5, {"step": 1.0}, "not 'step'"),
        (5, {"a\nb": 1.0}, "must be printable"),
    ],
)
def test_bad_rows_are_refused_and_leave_the_file_as_it_was(tmp_path, step, metrics, message):
    with metric_logger(tmp_path, tensorboard=False) as log:
        log(4, {"loss": 1.0})
        before = text(tmp_path)
        with pytest.raises(ValueError, match=message):
            log(step, metrics)
        assert text(tmp_path) == before


@pytest.mark.parametrize("content", ["name,age\nanna,3\n", "no table", "step,loss\n1,2,3\n"])
def test_a_foreign_file_is_refused_and_not_overwritten(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    with (
        pytest.raises(ValueError, match=r"metrics\.csv: expected a metrics file"),
        metric_logger(tmp_path, tensorboard=False),
    ):
        pass
    assert text(tmp_path) == content


def test_a_negative_resume_step_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="resume_step must be None or >= 0, got -1"),
        metric_logger(tmp_path, resume_step=-1),
    ):
        pass
