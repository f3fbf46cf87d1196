"""Who was broken by what: the record of a suite, kept in a file so that nothing is done twice."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust import parallel
from jaxrobust.files import CheckpointError, atomic_write

HOLDS, CLEAN = "", "clean"

# Writing may take at most this share of the time.
_WRITING = 0.05


class Ledger:
    """Per example: does it hold, which attack broke it, with which image, which round is next.

    Attributes:
        x_adv: [n, ...] images; those of unbroken examples are the originals.
        robust: [n] bool.
        broken_by: [n] numbers into `names`.
        names: "" (holds), "clean", and the attacks.
        seconds: by attack.
        iterations: by attack: how often one example was computed, idle slots included.
        accuracy: by attack, after it; "clean" before.
    """

    def __init__(
        self,
        path: str | Path | None,
        save_every: float,
        fingerprint: str,
        images: np.ndarray,
        correct: np.ndarray,
        logits: np.ndarray,
        attacks: tuple[str, ...],
    ):
        """A fresh record, or the one in the file.

        Args:
            path: of the file, or None.
            save_every: seconds.
            fingerprint: of images, labels, keys and attacks.
            images: [n, ...].
            correct: [n] bool: clean.
            logits: [m, classes] of the first images: by these another model is told apart.
            attacks: their names, in order.

        Raises:
            CheckpointError: the file is damaged or belongs to another evaluation.
        """
        self.path = None if path is None else Path(path)
        self.save_every, self.fingerprint = save_every, fingerprint
        self.images, self.logits = images, logits
        self.names = (HOLDS, CLEAN, *attacks)
        self.x_adv = images.copy()
        self.robust = correct.copy()
        self.broken_by = np.where(correct, 0, 1).astype(np.int16)
        self.rounds = np.zeros(len(images), np.int32)
        self.finished: list[str] = []
        self.current: str | None = None
        self.seconds: dict[str, float] = {}
        self.iterations: dict[str, int] = {}
        self.accuracy = {CLEAN: _mean(correct)}
        if self.path is not None and self.path.exists():
            self._load()
        self._saved, self._cost, self._begun = time.monotonic(), 0.0, time.monotonic()

    def jobs(self, name: str, rounds: int) -> list[tuple[int, int]]:
        """(example, next round) of the examples that attack `name` has still to try."""
        if name in self.finished:
            return []
        begun = self.current == name
        return [
            (int(i), int(self.rounds[i]) if begun else 0)
            for i in np.flatnonzero(self.robust)
            if not begun or self.rounds[i] < rounds
        ]

    def begin(self, name: str) -> None:
        """Notes that an attack begins, or goes on."""
        if self.current != name:
            self.current, self.rounds[:], self.iterations[name] = name, 0, 0
        self._begun = time.monotonic() - self.seconds.get(name, 0.0)

    def record(self, example: int, round_number: int, x_adv: np.ndarray | None) -> None:
        """Notes the end of a round: broken with `x_adv`, or held."""
        self.rounds[example] = round_number + 1
        if x_adv is not None:
            self.x_adv[example] = x_adv
            self.robust[example] = False
            self.broken_by[example] = self.names.index(self.current)
        waited = time.monotonic() - self._saved
        if waited > max(self.save_every, self._cost / _WRITING):
            self.save()

    def spend(self, iterations: int) -> None:
        """Notes what the current attack has computed."""
        self.iterations[self.current] += iterations

    def end(self, name: str) -> None:
        """Notes that an attack has seen all."""
        self.seconds[name] = time.monotonic() - self._begun
        self.accuracy[name] = _mean(self.robust)
        self.finished.append(name)
        self.current = None
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is None:
            return
        begun = time.monotonic()
        if self.current is not None:
            self.seconds[self.current] = begun - self._begun
        broken = np.flatnonzero(self.broken_by > 1)
        words = {
            "fingerprint": self.fingerprint,
            "finished": self.finished,
            "current": self.current,
            "seconds": self.seconds,
            "iterations": self.iterations,
            "accuracy": self.accuracy,
        }
        content = io.BytesIO()
        np.savez(
            content,
            words=np.frombuffer(json.dumps(words).encode(), np.uint8),
            robust=self.robust,
            broken_by=self.broken_by,
            rounds=self.rounds,
            logits=self.logits,
            broken=broken,
            x_adv=self.x_adv[broken],
        )
        atomic_write(self.path, content.getvalue())
        self._saved = time.monotonic()
        self._cost = self._saved - begun

    def _load(self):
        try:
            content = io.BytesIO(self.path.read_bytes())  # a file that numpy cannot read stays open
            with np.load(content, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            words = json.loads(found["words"].tobytes())
            theirs = words["fingerprint"]
        except Exception as error:
            raise CheckpointError(f"{self.path}: no state of an evaluation ({error})") from error
        if theirs != self.fingerprint or not same_logits(found["logits"], self.logits):
            raise CheckpointError(
                f"{self.path}: the state of another evaluation (other images, labels, model, key "
                "or attacks): name another file or remove this one"
            )
        self.robust, self.broken_by = found["robust"], found["broken_by"]
        self.rounds = found["rounds"]
        self.x_adv[found["broken"]] = found["x_adv"]
        self.finished, self.current = words["finished"], words["current"]
        self.seconds, self.accuracy = words["seconds"], words["accuracy"]
        self.iterations = words["iterations"]


def same_logits(theirs: np.ndarray, ours: np.ndarray) -> bool:
    """Equal but for the rounding of another device or batch size."""
    if theirs.shape != ours.shape:
        return False
    scale = np.abs(ours).max(initial=0)
    # Products of rounded factors depend on the kernel that a device happens to choose.
    room = 1 if parallel.exact_products() else 30
    return bool(np.allclose(theirs, ours, rtol=1e-3 * room, atol=1e-4 * room * scale))


def _mean(flags: Any) -> float:
    return float(np.mean(flags))
