"""Training whose salience maps are made anew from the current model every few epochs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust import checkpoint, data, salience
from jaxrobust.data import Dataset
from jaxrobust.training import Fitted, TrainState, fit
from jaxrobust.training.step import Step


def fit_refreshed(
    step: Step,
    state: TrainState,
    dataset: Dataset,
    refresh: Callable[[dict, Dataset], Any],
    *,
    batch_size: int,
    epochs: int,
    directory: str | Path,
    every: int = 1,
    warmup: int = 0,
    **options: Any,
) -> Fitted:
    """`training.fit` in rounds, each with the maps that `refresh` makes of the model so far.

    Resumes as `fit` does: a round's maps are on disk before its first step, so that a run that is
    killed and started again ends with the same numbers.

    Args:
        step: of an objective that takes its maps from the batch.
        state: as for `fit`.
        dataset: training examples; maps that it carries are not used.
        refresh: (variables, dataset) -> maps [n, h, w, 1] in [0, 1], for instance
            `salience.top_fraction(salience.compute(method, model.apply, variables, ...), 0.2)`.
        batch_size: over all devices and processes.
        epochs: passes over the data, all rounds together.
        directory: for checkpoints, metrics and maps.
        every: epochs of a round, >= 1.
        warmup: epochs at the start for which no maps are made: S = 0, unless the objective's
            `warmup_steps` sets the mask itself.
        options: further options of `fit`.

    Raises:
        ValueError: every < 1 or warmup outside [0, epochs], maps that do not fit; and as `fit`.

    Source: PART's code makes its maps anew every epoch after 20 epochs of warm-up.
    """
    if every < 1 or not 0 <= warmup <= epochs:
        raise ValueError(
            f"every must be >= 1 and warmup in [0, {epochs}], got {every} and {warmup}"
        )
    none = np.zeros((*dataset.images.shape[:3], 1), np.float32)
    starts = ([0] if warmup else []) + list(range(warmup, epochs, every))
    per_epoch = data.steps_per_epoch(dataset, batch_size)
    reached = checkpoint.latest_step(Path(directory) / "checkpoint") or 0
    for start, end in zip(starts, [*starts[1:], epochs], strict=True):
        # `fit` would refuse the checkpoint of a later round. One that ended exactly here is run, to
        # get its state.
        if end < epochs and reached > end * per_epoch:
            continue
        maps = none
        if start >= warmup:
            make = lambda rows: np.asarray(refresh(state.variables(), dataset))[rows]  # noqa: B023, E731
            # Not the weights: a round that is resumed must find the maps that it began with.
            fingerprint = {"first_epoch": start}
            maps = salience.cached(Path(directory) / "maps", fingerprint, dataset.indices, make)
        annotated = salience.attach(dataset, maps)
        fitted = fit(
            step, state, annotated, batch_size=batch_size, epochs=end, directory=directory,
            **options,
        )  # fmt: skip
        state = fitted.state
    return fitted
