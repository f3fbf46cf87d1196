"""Checkpoints of a training loop: where, when, and of which run."""

import time
from pathlib import Path
from typing import Any

import jax

from jaxrobust import checkpoint, identity, processes

# All processes must save at the same step, and asking makes them wait.
_ASK_EVERY = 50
# Saving may take at most this share of the time, however often it was asked for.
_SAVING = 0.05


class Saver:
    """A loop's checkpoints in a folder, or nowhere.

    Attributes:
        folder: of the checkpoints; None where nothing is written.
        resumed: whether there was one to go on from.
    """

    def __init__(self, directory, this_run: dict, *, every: float, steps: int | None = None):
        """Reads nothing yet.

        Args:
            directory: holds the folder of the checkpoints; None writes nothing.
            this_run: what the run is, as JSON; a checkpoint of another one is refused.
            every: seconds between checkpoints, or more where saving takes long.
            steps: save every so many steps instead.
        """
        self.folder = None if directory is None else Path(directory) / "checkpoint"
        self.resumed = False
        self._this_run, self._every, self._steps = this_run, every, steps
        self._begun = self._saved = time.monotonic()
        self._earlier = self._cost = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole run, what came before a restart included."""
        return self._earlier + time.monotonic() - self._begun

    def restored(self, tree: Any, loop: dict) -> tuple[Any, dict]:
        """(tree, loop) of the newest checkpoint, or as they are if there is none.

        Raises:
            CheckpointError: it is damaged, of another model, or of another run.
        """
        found = self.folder and checkpoint.restore(self.folder, tree)
        if found:
            _, tree, loop = found
            identity.check_same_run(self.folder, loop.get("run", {}), self._this_run)
            self._earlier, self.resumed = loop["seconds"], True
        self._begun = self._saved = time.monotonic()
        return tree, loop

    def is_due(self, position: int) -> bool:
        """Whether it is time for a checkpoint, by process 0's clock."""
        if self.folder is None or not position:
            return False
        if self._steps:
            return position % self._steps == 0
        if jax.process_count() > 1 and position % _ASK_EVERY:
            return False
        waited = time.monotonic() - self._saved
        return processes.agreed(waited > max(self._every, self._cost / _SAVING))

    def save(self, position: int, tree: Any, loop: dict) -> None:
        """Saves, unless this very step is there already."""
        if self.folder is None or checkpoint.latest_step(self.folder) == position:
            return
        begun = time.monotonic()
        loop = {**loop, "seconds": self.seconds, "run": self._this_run}
        checkpoint.save(self.folder, position, tree, loop=loop)
        self._saved = time.monotonic()
        self._cost = self._saved - begun
