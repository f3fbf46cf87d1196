"""Accuracy under common corruptions: every corruption at every severity, one by one, resumable."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxrobust.data import corruptions
from jaxrobust.evaluation.accuracy import AsApply, correct
from jaxrobust.evaluation.findings import Findings
from jaxrobust.evaluation.given import check_indices


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
    indices: Any = None,
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
        indices: [n] numbers of the images in their data set, from which their corruptions are
            drawn; 0 .. n - 1 by default.
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
    numbers = check_indices(indices, len(images))
    digest = hashlib.sha256()
    for part in (images, labels, np.int64(seed), numbers):
        digest.update(np.ascontiguousarray(part).tobytes())
    findings = Findings(state, digest.hexdigest(), logits_fn, images, args)

    def accuracy(name, severity):
        x = corruptions.corrupt(images, name, severity, indices=numbers.tolist(), seed=seed)
        right = correct(AsApply(logits_fn), args, x, labels, batch_size=batch_size)
        return float(right.mean())

    jobs = [(name, severity) for name in names for severity in corruptions.SEVERITIES]
    for name, severity in tqdm(jobs, desc="corruptions", unit="set", disable=not progress):
        findings.once(f"{name} {severity}", lambda job=(name, severity): accuracy(*job))
    found = findings.found
    return {name: [found[f"{name} {s}"] for s in corruptions.SEVERITIES] for name in names}
