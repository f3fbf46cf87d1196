"""What a run leaves: its cells in one results file, its folders, and where a figure came from."""

import argparse
import collections
import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from jaxrobust import checkpoint
from jaxrobust.checkpoint import atomic_write
from jaxrobust.files import temporary_beside

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PACKAGES = ("jaxrobust", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Memory mappings from which compiled programs are dropped.
MOST_MAPPINGS = 15_000
# Fields of a cell that may differ between two runs of the same command.
TIMES = (
    "seconds",
    "train_seconds",
    "epoch_seconds",
    "attack_seconds",
    "certify_seconds",
    "salience_seconds",
    "head_seconds",
    "suite_seconds",
)


class Results:
    """The cells of one results file, written whole after each new one.

    A file of another configuration is refused, so that no table mixes two.
    """

    def __init__(self, path: Path, experiment: str, preset: str, config: Any):
        """Opens `path` if it exists, and says so; `config` is the experiment's frozen dataclass."""
        self.path, self.lock, self.commit = path, None, "unknown"
        config = json.loads(json.dumps(dataclasses.asdict(config)))
        self.record = {"experiment": experiment, "preset": preset, "config": config, "cells": []}
        self.read()
        if self.cells:
            print(self.found(), file=sys.stderr)

    def read(self) -> None:
        """Takes up the cells that are in the file by now."""
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["config"] != self.record["config"]:
                raise SystemExit(
                    f"{self.path} holds another configuration: move it away to run anew"
                )
            self.record["cells"] = found["cells"]
            # Older cells have no commit of their own.
            self.commit = found.get("commit", "unknown")

    def found(self) -> str:
        """How many cells are in the file, from which commits, and how to run them anew."""
        commits = collections.Counter(cell.get("commit", self.commit)[:7] for cell in self.cells)
        of = ", ".join(f"{count} of commit {name}" for name, count in commits.items())
        return (
            f"{self.path} holds {len(self.cells)} cells ({of}), which are not run again: "
            "another --out runs all"
        )

    @property
    def cells(self) -> list[dict]:
        """All cells so far."""
        return self.record["cells"]

    def find(self, key: Mapping[str, Any]) -> dict | None:
        """The cell with this key, or None."""
        return next((cell for cell in self.cells if cell["key"] == key), None)

    def missing(
        self,
        keys: Sequence[dict],
        folder: Callable[[dict], Path],
        ready: Callable[[dict], bool] = lambda key: True,
    ) -> Iterator[dict]:
        """The cells that are not there, one after the other, to be run and added by the caller.

        Processes that are started with one command, on one machine or on several that share the
        folders, divide the cells among themselves: each is claimed by a lock, which goes with its
        process however that ends. Those of one `jax.distributed` job run all cells together.
        Processes that share a machine slow each other: seconds are then no measurement.

        Args:
            keys: all cells, in the order in which they are wanted.
            folder: of a cell's checkpoints, where it is claimed.
            ready: whether a cell may be run already; asked with the file read anew.
        """
        bar = {"desc": self.record["experiment"], "unit": "cell", "total": len(keys)}
        with tqdm(**bar, disable=jax.process_index() > 0) as shown:
            while todo := self._todo(keys, shown):
                if jax.process_count() > 1:
                    yield todo[0]
                    forget_programs()
                    continue
                for key in todo:
                    with claimed(folder(key)) as is_ours:
                        if is_ours and key in self._todo(keys, shown) and ready(key):
                            self.lock = FileLock(folder(key).parent / "results.lock")
                            yield key
                            forget_programs()
                            break
                else:
                    time.sleep(1)  # Others are at all that is left.

    def _todo(self, keys: Sequence[dict], shown: tqdm) -> list[dict]:
        # Processes of one job would read at different moments, and part company.
        if jax.process_count() == 1:
            self.read()
        todo = [key for key in keys if self.find(key) is None]
        shown.update(len(keys) - len(todo) - shown.n)
        return todo

    def add(self, key: Mapping[str, Any], metrics: Mapping[str, Any], seconds: float) -> None:
        """Adds a cell and writes the file; with several hosts only the first one writes."""
        made = provenance()
        cell = {"key": dict(key), "metrics": dict(metrics), "seconds": round(seconds, 2)}
        # A table's cells may come from several machines and days.
        cell |= {"device": made["device"], "commit": made["commit"]}
        with self.lock or contextlib.nullcontext():
            if self.lock:
                self.read()
            self.cells.append(cell)
            if jax.process_index() == 0:
                text = json.dumps({**self.record, **made}, indent=1) + "\n"
                atomic_write(self.path, text)


def forget_programs() -> None:
    """Drops compiled programs before a process has more memory mappings than Linux lets it have.

    A program for the CPU holds several. At `vm.max_map_count`, 65,530 unless set higher, the
    compiler's next allocation fails and the process dies; a cell may add 15,000.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process has a folder to itself, for as long as the block takes."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "claimed.lock", timeout=0):
            yield True
    except Timeout:
        yield False


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process trains in a folder, for what several cells depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_count() > 1:  # All of one job train here together.
        yield
        return
    lock = FileLock(folder / "training.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for the process that trains in {folder}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def provenance() -> dict[str, Any]:
    """Versions, device and commit, as every results file records them."""
    try:
        run = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True
        )
        commit = run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else _processor()
    cores = os.cpu_count()
    return {
        "versions": versions,
        "device": f"{jax.device_count()} x {kind} ({cores} host cores)",
        "commit": commit,
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


def run_folder(options: argparse.Namespace, config: Any, key: Mapping[str, Any]) -> Path:
    """Where a cell keeps its checkpoints and weights.

    The configuration is part of the name: a changed one must not go on from the old one's state.
    """
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:8]
    cell = "-".join(str(value).replace("/", "_") for value in key.values())
    return options.runs / f"{options.experiment}-{options.preset}-{fingerprint}" / cell


def kept(
    folder: Path, name: str, make: Callable[[], tuple[dict, dict]]
) -> tuple[dict, dict[str, Any]]:
    """(variables, costs) of `make()`, or of the run before that had them already."""
    weights, costs = folder / f"{name}.safetensors", folder / f"{name}.json"
    with alone(folder):
        if not weights.exists():
            variables, taken = make()
            atomic_write(costs, json.dumps(taken) + "\n")
            checkpoint.save_weights(weights, jax.tree.map(np.asarray, variables))
    variables = {"batch_stats": {}, **checkpoint.load_weights(weights)}
    return variables, json.loads(costs.read_text()) if costs.exists() else {}


def once(path: Path, make: Callable[[Path], None]) -> None:
    """Calls `make(temporary)` and renames its file into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    make(temporary)
    os.replace(temporary, path)


def packed(outcomes: np.ndarray) -> list[str]:
    """Rows of yes or no, [rows, n], in hexadecimal: paired tests need each image's outcome."""
    return [np.packbits(row).tobytes().hex() for row in np.asarray(outcomes, bool)]


def unpacked(rows: Sequence[str], count: int) -> np.ndarray:
    """[rows, count] bool, as they were given to `packed`."""
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(row), np.uint8))[:count] for row in rows]
    return np.asarray(bits, bool)
