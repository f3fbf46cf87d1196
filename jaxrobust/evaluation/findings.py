"""Figures that are found once and kept in a file, which is told from another evaluation's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.evaluation.ledger import same_logits
from jaxrobust.files import CheckpointError, atomic_write

# Images whose logits tell models apart.
_COMPARED = 8


class Findings:
    """What has been found, by name, in memory or in a file.

    Attributes:
        found: JSON-able values by name.
    """

    def __init__(
        self,
        path: str | Path | None,
        fingerprint: str,
        logits_fn: Callable[..., jax.Array],
        images: np.ndarray,
        args: tuple,
    ):
        """An empty record, or the one in the file.

        Args:
            path: of the file, or None.
            fingerprint: of all that the figures belong to, but for the model.
            logits_fn: (x, *args) -> [b, classes]: by its logits of the first images another model
                is told apart.
            images: [n, h, w, c].
            args: arrays that `logits_fn` takes besides x.

        Raises:
            CheckpointError: the file is damaged or belongs to another evaluation.
        """
        self.path, self.found, self.fingerprint = None, {}, fingerprint
        if path is None:
            return
        first = np.asarray(images[:_COMPARED], np.float32)
        self.path, self.logits = Path(path), np.asarray(jax.jit(logits_fn)(first, *args))
        if self.path.exists():
            self._load()

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is there under this name; if nothing is, it is found and the file is written."""
        if name not in self.found:
            self.found[name] = find()
            self._save()
        return self.found[name]

    def _save(self):
        if self.path is not None:
            words = {
                "fingerprint": self.fingerprint,
                "logits": self.logits.tolist(),
                "found": self.found,
            }
            atomic_write(self.path, json.dumps(words, indent=1) + "\n")

    def _load(self):
        try:
            words = json.loads(self.path.read_text())
            theirs, self.found = words["fingerprint"], dict(words["found"])
            logits = np.asarray(words["logits"], np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: no state of an evaluation ({error})") from error
        if theirs != self.fingerprint or not same_logits(logits, self.logits):
            raise CheckpointError(
                f"{self.path}: the state of another evaluation (other images, labels, model, key, "
                "seed or attacks): name another file or remove this one"
            )
