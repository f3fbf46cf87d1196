"""The experiments' command line: what cannot work is refused before any data is loaded."""

import dataclasses
import os
import sys

import jax
import pytest

from experiments import (
    adversarial_training,
    certify,
    common,
    cropd_settings,
    records,
    sipat_settings,
)
from experiments.safeclip_settings import PRESETS as SAFECLIP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What `arguments` looks at."""

    epochs: int = 1
    batch_size: int = 50


PRESETS = {"smoke": Config(batch_size=4), "quick": Config(), "laptop": Config()}


@pytest.fixture
def given(monkeypatch):
    """Parses a command line, without carrying the device options out."""
    monkeypatch.setattr(common, "_start", lambda options, devices: None)

    def parse(*words, presets=PRESETS):
        monkeypatch.setattr(sys, "argv", ["experiment", *map(str, words)])
        return common.arguments("What it does.", presets)

    return parse


def refusal(given, capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        given(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_runs_are_beside_the_results_unless_those_are_the_committed_ones(given, tmp_path):
    assert given().runs == records.ROOT.parent / "runs"
    assert given("--out", tmp_path).runs == tmp_path / "runs"
    assert given("--out", tmp_path, "--runs", tmp_path / "other").runs == tmp_path / "other"


def test_help_names_presets_and_defaults(given, capsys):
    with pytest.raises(SystemExit):
        given("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "{smoke,quick,laptop}" in shown
    assert "(default: quick)" in shown
    assert "default: OUT/runs, or runs beside the README without --out" in shown
    assert "(default: shard_map)" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", 0], "--devices must be >= 1, got 0"),
        (["--devices", -1], "--devices must be >= 1, got -1"),
        (["--devices", 3], "--devices must divide the batches of 50, got 3"),
        (["--process", 0], "--process needs --coordinator host:port"),
        (["--processes", 2], "--processes needs --coordinator host:port"),
        (["--distributed", "--process", 0], "--process needs --coordinator host:port"),
        (["--coordinator", "a:1", "--process", 0], "--process needs --processes"),
        (["--coordinator", "a:1", "--processes", 2], "--processes needs --process"),
        (
            ["--coordinator", "a:1", "--processes", 2, "--process", 2],
            "--process must be in [0, 2), got 2",
        ),
    ],
)
def test_a_command_that_cannot_work_is_refused(given, capsys, words, message):
    assert message in refusal(given, capsys, *words)


def test_more_devices_than_there_are_is_refused(given, capsys):
    count = jax.device_count()
    assert given("--devices", count, presets={"quick": Config(batch_size=count)})
    wanted = 2 * count
    with pytest.raises(SystemExit):
        given("--devices", wanted, presets={"quick": Config(batch_size=wanted)})
    assert f"--devices: there are {count}, got {wanted}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--out", "--runs"])
def test_folders_that_cannot_be_written_are_refused(given, capsys, name, tmp_path):
    file = tmp_path / "file"
    file.touch()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere" / "else")
    for folder in (file, file / "below", "/proc/nothing", dangling):
        assert f"{name}: {folder} cannot be written" in refusal(given, capsys, name, folder)
    if os.getuid():  # root may write everywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "cannot be written" in refusal(given, capsys, name, closed / "below")


def test_looking_at_a_folder_leaves_it_as_it_was(given, tmp_path):
    given("--out", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_batch_sizes_of_a_preset_are_those_it_trains_with():
    sizes = common._batch_sizes
    assert sizes(Config()) == {50}
    assert sizes(adversarial_training.PRESETS["paper"]) == {128}
    assert sizes(certify.PRESETS["laptop"]) == {50}
    assert sizes(cropd_settings.PRESETS["laptop"]) == {25}
    assert sizes(sipat_settings.PRESETS["laptop"]) == {50}
    assert sizes(SAFECLIP["laptop"]) == {64, 256}
    assert sizes({"batch_size": 7}) == set()  # of an evaluation
    assert sizes(None) == set()


def test_what_is_found_is_said_with_its_commits(tmp_path, capsys):
    path = tmp_path / "one-smoke.json"
    results = records.Results(path, "one", "smoke", Config())
    assert capsys.readouterr().err == ""
    for number in range(3):
        results.add({"number": number}, {}, 0.0)
    results.cells[0].pop("commit")  # as an older version left them
    results.cells[2]["commit"] = "b" * 40
    results.add({"number": 3}, {}, 0.0)
    commit = results.cells[3]["commit"][:7]
    records.Results(path, "one", "smoke", Config())
    said = capsys.readouterr().err
    assert f"{path} holds 4 cells (3 of commit {commit}, 1 of commit bbbbbbb)" in said
    assert "another --out runs all" in said
