"""Accuracy under common corruptions: every corruption at every severity, one by one, resumable."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxrobust.data import corruptions
from jaxrobust.evaluation.accuracy import AsApply, correct
from jaxrobust.evaluation.ledger import same_logits
from jaxrobust.files import CheckpointError, atomic_write

# Images whose logits tell models apart.
_COMPARED = 8


def check_corruptions(
    names: Sequence[str], images: Any, bounds: tuple[float, float] = (0.0, 1.0)
) -> None:
    """Refuses unknown names, and images or a box that corruptions do not know.

    Raises:
        ValueError: names the argument, its value and what was expected.
        ImportError: there are names, and the package of the corruptions is not installed.
    """
    unknown = sorted(set(names) - set(corruptions.CORRUPTIONS))
    if isinstance(names, str) or unknown:
        known = ", ".join(corruptions.CORRUPTIONS)
        raise ValueError(f"corruptions must be names among {known}, got {names!r}")
    if names and tuple(bounds) != (0, 1):
        raise ValueError(f"corruptions need images in bounds (0, 1), got {bounds}")
    if names:
        corruptions.check_images(images)
        corruptions.package()


def corruption_accuracy(
    logits_fn: Callable[..., jax.Array],
    images: Any,
    labels: Any,
    *,
    names: Sequence[str] = corruptions.CORRUPTIONS,
    args: tuple = (),
    batch_size: int = 256,
    seed: int = 0,
    state: str | Path | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Accuracy of a classifier on corrupted images.

    Args:
        logits_fn: (x, *args) -> [b, classes].
        images: [n, h, w, c] float in [0, 1].
        labels: [n] whole numbers.
        names: which corruptions (`jr.data.CORRUPTIONS`).
        args: arrays that `logits_fn` takes besides x.
        batch_size: examples at a time; the last batch is filled up.
        seed: of the corruptions (`jr.data.corrupt`).
        state: a file of what is done, to go on from.
        progress: show a progress bar.

    Returns:
        By name, the accuracies at severities 1 to 5.

    Raises:
        ValueError: an unknown corruption, or images that are not of the form above.
        CheckpointError: `state` belongs to another model or other images.
        ImportError: the package of the corruptions is not installed.

    Source: Hendrycks and Dietterich 2019.
    """
    check_corruptions(names, images)
    if not names:
        return {}
    images, labels = np.asarray(images), np.asarray(labels)
    right = lambda x: correct(  # noqa: E731
        AsApply(logits_fn), args, x, labels, batch_size=batch_size
    )
    first = np.asarray(jax.jit(logits_fn)(images[:_COMPARED].astype(np.float32), *args))
    done = _State(state, (images, labels, np.int64(seed)), first)
    jobs = [(name, severity) for name in names for severity in corruptions.SEVERITIES]
    for name, severity in tqdm(jobs, desc="corruptions", unit="set", disable=not progress):
        if f"{name} {severity}" not in done.found:
            corrupted = corruptions.corrupt(images, name, severity, seed=seed)
            done.add(f"{name} {severity}", float(right(corrupted).mean()))
    return {name: [done.found[f"{name} {s}"] for s in corruptions.SEVERITIES] for name in names}


class _State:
    """Accuracies by corruption and severity, in memory or in a file."""

    def __init__(self, path, belongs_to, logits):
        self.path, self.found = None if path is None else Path(path), {}
        digest = hashlib.sha256()
        for part in belongs_to:
            digest.update(np.ascontiguousarray(part).tobytes())
        self.fingerprint, self.logits = digest.hexdigest(), logits
        if self.path is not None and self.path.exists():
            self._load()

    def add(self, name, accuracy):
        self.found[name] = accuracy
        if self.path is not None:
            words = {
                "fingerprint": self.fingerprint,
                "logits": self.logits.tolist(),
                "accuracy": self.found,
            }
            atomic_write(self.path, json.dumps(words, indent=1) + "\n")

    def _load(self):
        try:
            words = json.loads(self.path.read_text())
            theirs, self.found = words["fingerprint"], dict(words["accuracy"])
            logits = np.asarray(words["logits"], np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: no state of an evaluation ({error})") from error
        if theirs != self.fingerprint or not same_logits(logits, self.logits):
            raise CheckpointError(
                f"{self.path}: the state of another evaluation (other images, labels, model or "
                "seed): name another file or remove this one"
            )
