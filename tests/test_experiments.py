"""The experiments as their users meet them: resumable, in one schema, and quoted truly."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import plots, records
from tests.conftest import child_environment

ROOT = pathlib.Path(__file__).parent.parent

# A smoke-sized run of the first experiment: two cells instead of ten.
PROGRAM = """
import dataclasses, sys
from experiments import adversarial_training as experiment, common
sys.modules["jaxrobust.training.saver"]._SAVING = 1e9  # a save at every step, whatever it costs
sys.argv = ["adversarial_training", "--preset", "smoke", "--out", {out!r}, "--devices", "2"]
smoke = dataclasses.replace(
    experiment.PRESETS["smoke"], methods=("standard", "pgd_at"), threats={{"linf": 0.3}}, epochs=6,
    save_every=0.0
)
experiment.main(smoke, common.arguments("", {{"smoke": smoke}}, "smoke"))
"""


def start(out):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(out=str(out))],
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def without_times(path):
    record = json.loads(path.read_text())
    for cell in record["cells"]:
        for name in records.TIMES:
            cell.pop(name, None)
            cell["metrics"].pop(name, None)
    return record["config"], record["cells"]


def unfinished(folder):
    """Cells that have a checkpoint and no weights yet."""
    cells = [path.parents[1] for path in folder.rglob("checkpoint/*") if path.is_dir()]
    return [cell for cell in cells if not (cell / "weights.safetensors").exists()]


# Cells that do nothing but take their time, and note which process ran them; the last one hangs on
# the others.
SHARING = """
import dataclasses, os, pathlib, time
from experiments import records

@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0

out = pathlib.Path({out!r})
results = records.Results(out / "share-smoke.json", "share", "smoke", Config())
keys = [{{"number": number}} for number in range(8)]
ready = lambda key: key != keys[-1] or all(map(results.find, keys[:-1]))
(out / f"started-{{os.getpid()}}").touch()
while len(list(out.glob("started-*"))) < {processes}:
    time.sleep(0.01)
for key in results.missing(keys, lambda key: out / "runs" / str(key["number"]), ready):
    with open(out / f"run-{{key['number']}}", "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    time.sleep({seconds})
    results.add(key, {{"process": os.getpid(), "seen": len(results.cells)}}, 0.0)
"""


@pytest.fixture
def share():
    """Starts a process that shares the cells in a folder; none outlives its test."""
    running = []

    def start(out, seconds, processes=1):
        program = SHARING.format(out=str(out), seconds=seconds, processes=processes)
        running.append(
            subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=child_environment())
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_processes_of_one_command_divide_the_cells(tmp_path, share):
    processes = [share(tmp_path, 0.5, processes=2) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    cells = json.loads((tmp_path / "share-smoke.json").read_text())["cells"]
    assert sorted(cell["key"]["number"] for cell in cells) == list(range(8))
    assert {cell["metrics"]["process"] for cell in cells} == {run.pid for run in processes}
    for number in range(8):
        assert len((tmp_path / f"run-{number}").read_text().split()) == 1
    # The one that hangs on the others came last, and saw them all.
    assert (cells[-1]["key"]["number"], cells[-1]["metrics"]["seen"]) == (7, 7)


def test_a_killed_process_lets_go_of_its_cell(tmp_path, share):
    first = share(tmp_path, 600)
    while not (tmp_path / "run-0").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = share(tmp_path, 0)
    while len(list(tmp_path.glob("run-*"))) < 7:
        assert second.poll() is None
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=1)  # The first cell is another's, and the last one hangs on it.
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=60) == 0
    assert len((tmp_path / "run-0").read_text().split()) == 2


KEPT = """
import pathlib, sys, time
import numpy as np
from experiments import records
out = pathlib.Path(sys.argv[1])

def make():
    with open(out / "made", "a") as file:
        file.write("x")
    time.sleep(2)
    return {"params": {"w": np.ones(2)}}, {"train_seconds": 1.0}

(out / f"started-{sys.argv[2]}").touch()
while len(list(out.glob("started-*"))) < 2:
    time.sleep(0.01)
print(records.kept(out, "weights", make)[1])
"""


def test_what_two_processes_need_is_trained_once(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", KEPT, str(tmp_path), str(number)], cwd=ROOT,
            env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [out for out, _ in outputs] == ["{'train_seconds': 1.0}\n"] * 2
    assert sum("waiting for the process that trains in" in error for _, error in outputs) == 1
    assert (tmp_path / "made").read_text() == "x"
    (tmp_path / "weights.json").unlink()  # as an older version left them
    assert records.kept(tmp_path, "weights", None)[1] == {}


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_like_an_unbroken_one(tmp_path):
    whole = start(tmp_path / "whole")
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output
    # The second of two unbroken runs finds everything compiled: its length sets the moments.
    unbroken = start(tmp_path / "again")
    begun = time.monotonic()
    output, _ = unbroken.communicate(timeout=600)
    assert unbroken.returncode == 0, output
    seconds = time.monotonic() - begun
    name = "adversarial_training-smoke.json"
    assert without_times(tmp_path / "whole" / name) == without_times(tmp_path / "again" / name)

    # What was done stays done, so the last lives may come to their end; the first is cut off inside
    # a cell.
    run = start(tmp_path / "killed")
    while not unfinished(tmp_path / "killed"):
        assert run.poll() is None, "it ended before a cell had a checkpoint"
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert unfinished(tmp_path / "killed")
    draw = random.Random(0)
    for _ in range(9):
        run = start(tmp_path / "killed")
        try:
            run.communicate(timeout=draw.uniform(0.1, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
    last = start(tmp_path / "killed")
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    assert without_times(tmp_path / "killed" / name) == without_times(tmp_path / "whole" / name)
    assert (tmp_path / "killed" / "adversarial_training-smoke-curve.png").stat().st_size > 1000
    assert (tmp_path / "killed" / "adversarial_training-smoke-examples.png").stat().st_size > 1000


def test_results_of_another_configuration_are_refused(tmp_path):
    from experiments.adversarial_training import PRESETS

    path = tmp_path / "file.json"
    results = records.Results(path, "adversarial_training", "smoke", PRESETS["smoke"])
    results.add({"method": "standard"}, {"clean_accuracy": 1.0}, 0.0)
    again = records.Results(path, "adversarial_training", "smoke", PRESETS["smoke"])
    assert again.find({"method": "standard"})["metrics"] == {"clean_accuracy": 1.0}
    with pytest.raises(SystemExit, match="another configuration"):
        records.Results(path, "adversarial_training", "quick", PRESETS["quick"])


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_follow_the_schema(path):
    record = json.loads(path.read_text())
    assert {"experiment", "preset", "config", "versions", "device", "commit", "cells"} <= set(
        record
    )
    assert path.stem.startswith(record["experiment"])
    assert len(record["commit"]) == 40
    keys = [json.dumps(cell["key"], sort_keys=True) for cell in record["cells"]]
    assert len(set(keys)) == len(keys) > 0
    for cell in record["cells"]:
        # Older cells have no machine and commit of their own.
        assert {"key", "metrics", "seconds"} <= set(cell)
        assert set(cell) <= {"key", "metrics", "seconds", "device", "commit"}
        for name, value in cell["metrics"].items():
            if name.endswith("accuracy") and isinstance(value, float):
                assert 0 <= value <= 1, f"{name} is a fraction"


def test_a_missing_cell_is_said_in_the_table(tmp_path):
    from experiments.adversarial_training import PRESETS

    path = tmp_path / "adversarial_training-smoke.json"
    results = records.Results(path, "adversarial_training", "smoke", PRESETS["smoke"])
    key = {"model": "small_cnn", "threat": "linf", "eps": 0.3, "method": "standard"}
    metrics = {
        "clean_accuracy": 0.5,
        "pgd3x2_accuracy": 0.25,
        "train_flops": 2e12,
        "train_seconds": 3.0,
    }
    results.add(key, metrics, 1.0)
    assert results.cells[0]["device"] == json.loads(path.read_text())["device"]
    table = plots.training_table(path).splitlines()
    assert table[2] == "| linf 0.3 | Standard | 50.0 | 25.0 | 1 | 2 |"
    assert table[3].count("not run") == 4


def test_plot_only_without_results_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="run the experiment without --plot-only"):
        plots.training_table(tmp_path / "nothing.json")


def test_the_largest_resident_size_of_a_child_is_its_own():
    """Linux hands a parent's peak down to its children: growth below it would count as none."""
    program = (
        "import numpy as np; from experiments import bench_training as b; "
        "before = b.largest_resident_size(); block = np.ones(2**28, np.uint8); "
        "print(b.largest_resident_size() - before)"
    )
    own = np.ones(2**30, np.uint8)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert 0.9 * 2**28 < int(run.stdout) < own.nbytes
