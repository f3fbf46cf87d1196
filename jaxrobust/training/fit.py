"""The training loop: batches in, state out; resumable at any step, stoppable at any moment."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxrobust import checkpoint, data, identity, parallel
from jaxrobust.attacks.inputs import check_steps
from jaxrobust.training.logging import metric_logger
from jaxrobust.training.saver import Saver
from jaxrobust.training.state import TrainState
from jaxrobust.training.step import Step


class Fitted(NamedTuple):
    """What a run gives.

    Attributes:
        state: after the last step.
        variables: of the best validation score, or of the last step without validation.
        history: one dict per validation: epoch, score, and what else `validate` returned.
        best_epoch: epoch (from 1) of `variables`.
        epochs: how many epochs were trained.
        seconds: wall time of all training, over all interruptions; compilation and validation
            included.
        validation_seconds: of these, what `validate` took.
    """

    state: TrainState
    variables: dict
    history: list[dict]
    best_epoch: int
    epochs: int
    seconds: float
    validation_seconds: float = 0.0


def fit(
    step: Step,
    state: TrainState,
    dataset: data.Dataset | data.Source,
    *,
    batch_size: int,
    epochs: int,
    seed: int = 0,
    mesh: Mesh | None = None,
    mapping: str = "shard_map",
    validate: Callable[[dict], dict] | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    averaged: bool = False,
    directory: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    save_every: float = 30.0,
    save_steps: int | None = None,
    log_every: int = 50,
    tensorboard: bool = False,
    progress: bool = True,
    label: str = "training",
) -> Fitted:
    """Trains for a number of epochs.

    The batch of a step is a function of (seed, step), and randomness one of (state.key, step,
    example), so a run that is killed and started again ends with the same numbers (on GPUs as far
    as their kernels repeat themselves: XLA_FLAGS=--xla_gpu_deterministic_ops=true).

    Args:
        step: a per-device step, `train_step(...)`; mapped here.
        state: the state to begin with, made by `parallel.create` on the same mesh; its memory is
            reused, so it is gone afterwards.
        dataset: training examples.
        batch_size: over all devices and processes; divisible by the devices.
        epochs: passes over the data; a last, smaller batch is left out.
        seed: of the data order.
        mesh: devices; all by default.
        mapping: "shard_map", "pmap" or "jit".
        validate: variables -> dict of numbers with "score", the larger the better and no NaN. With
            it, the variables of the best score are kept.
        validate_every: epochs between validations.
        patience: stop after so many validations without a better score, >= 1; None never stops.
        averaged: validate and return the moving average of the weights.
        directory: for checkpoints and metrics.csv; None writes nothing. If it holds a checkpoint
            of this run, the run goes on from there.
        settings: what else makes this run what it is, such as the learning rate, which no step
            tells. A checkpoint with others is refused.
        save_every: seconds between checkpoints; more where saving takes over 5 % of the time.
        save_steps: save every so many steps instead.
        log_every: steps between rows of metrics.csv.
        tensorboard: TensorBoard events beside it.
        progress: show a progress bar.
        label: its text.

    Raises:
        ValueError: a number out of its range, or examples that are none, before anything is
            compiled.
        TypeError: no data set, images that are no floats, or labels that are no whole numbers.
        CheckpointError: `directory` holds a damaged checkpoint, one of more epochs, or that of
            another model, objective, seed, batch size, data set (of one on disk some records are
            compared) or other settings.
        FloatingPointError: the loss is no finite number any more; looked at where it is logged,
            and before anything is saved.
    """
    _check_counts(
        epochs=epochs, validate_every=validate_every, log_every=log_every, patience=patience,
        save_steps=save_steps,
    )  # fmt: skip
    if patience is not None and validate is None:
        raise ValueError(f"patience needs validate, got patience={patience} without it")
    mesh = parallel.data_mesh() if mesh is None else mesh
    _check_examples(dataset, batch_size, mesh)
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)):
        raise ValueError("state must be fresh: an earlier call took its memory; create another")
    per_epoch = data.steps_per_epoch(dataset, batch_size)
    total = epochs * per_epoch
    run = parallel.data_parallel(step, mesh, mapping=mapping)
    variables = state.variables(averaged=averaged)  # an error now if it keeps no average
    best = jax.tree.map(np.asarray, variables) if validate else {}
    this_run = {
        "seed": seed, "batch_size": batch_size, "steps_per_epoch": per_epoch,
        "data": _identity(dataset), "settings": identity.describe(dict(settings or {})),
        "key": identity.digest(jax.random.key_data(state.key.addressable_data(0))),
        "step": getattr(step, "config", None),
    }  # fmt: skip
    saver = Saver(directory, this_run, every=save_every, steps=save_steps)
    loop = {"best_score": None, "best_epoch": 0, "history": [], "waited": 0}
    loop["validation_seconds"] = 0.0
    (state, best), loop = saver.restored((state, best), loop)
    # On the host, as it was: several processes can save no array that lies on one device.
    best = jax.tree.map(np.asarray, best)
    position = int(state.step)
    if position > total:
        raise checkpoint.CheckpointError(
            f"{saver.folder}: expected a run of {total} steps, epochs={epochs}, found one of "
            f"{position}"
        )
    first = jax.process_index() == 0
    batches = data.stream(
        dataset,
        batch_size,
        seed=seed,
        start=position,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    ahead = data.prefetch(batches, lambda batch: parallel.shard_batch(batch, mesh))
    logger = metric_logger(
        directory or ".",
        tensorboard=tensorboard,
        resume_step=position if saver.resumed else None,
        write=saver.folder is not None and first,
    )
    bar = tqdm(
        total=total, initial=position, desc=label, unit="step", disable=not (progress and first)
    )
    stopped = patience is not None and loop["waited"] >= patience
    metrics = {}
    with contextlib.closing(ahead), logger as log, bar:
        while position < total and not stopped:
            state, metrics = run(state, next(ahead))
            position += 1
            bar.update()
            if position % log_every == 0:
                _check_finite(metrics, position)
                log(position, metrics)
                bar.set_postfix(loss=f"{float(metrics['loss']):.3f}")
            epoch, rest = divmod(position, per_epoch)
            if validate and not rest and (epoch % validate_every == 0 or position == total):
                # Steps are still under way, and are not validation's to wait for.
                variables = jax.block_until_ready(state.variables(averaged=averaged))
                asked = time.monotonic()
                scores = validate(variables)
                loop["validation_seconds"] += time.monotonic() - asked
                if _record(loop, epoch, scores):
                    best = jax.tree.map(np.asarray, variables)
                stopped = patience is not None and loop["waited"] >= patience
            if position < total and saver.is_due(position):
                _check_finite(metrics, position)
                saver.save(position, (state, best), loop)
        jax.block_until_ready(state)
    _check_finite(metrics, position)
    saver.save(position, (state, best), loop)
    last = epochs if position == total else position // per_epoch
    return Fitted(
        state=state,
        variables=best if validate else state.variables(averaged=averaged),
        history=loop["history"],
        best_epoch=loop["best_epoch"] if validate else last,
        epochs=last,
        seconds=saver.seconds,
        validation_seconds=loop["validation_seconds"],
    )


def _check_examples(dataset, batch_size, mesh):
    if batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be divisible by the {mesh.size} devices, got {batch_size}"
        )
    if isinstance(dataset, data.Dataset):
        data.check_dataset(dataset)
    elif not isinstance(dataset, data.Source):
        raise TypeError(
            f"dataset must be a data.Dataset or data.Source, got {type(dataset).__name__}"
        )


def _identity(dataset: data.Dataset | data.Source) -> str:
    """Which examples are trained on, in which order."""
    if isinstance(dataset, data.Source):
        return f"{len(dataset)} on disk {dataset.fingerprint()[:16]}"
    # Not the salience: maps may be made anew while a run goes on.
    columns = {name: getattr(dataset, name) for name in ("images", "labels", "indices")}
    return f"{len(dataset.labels)} {identity.digest(columns)[:16]}"


def _check_finite(metrics: Mapping[str, Any], position: int) -> None:
    loss = float(metrics.get("loss", 0.0))
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} after step {position}: a smaller learning rate, or clipped "
            "gradients, may help; a checkpoint of before is as it was"
        )


def _check_counts(**counts):
    for name, value in counts.items():
        if value is not None:
            check_steps(value, name)


def _record(loop, epoch, scores):
    """Notes a validation; True when it is the best so far."""
    scores = {name: float(value) for name, value in scores.items()}
    # No later score would be better than a NaN.
    if math.isnan(scores.get("score", math.nan)):
        raise ValueError(f"validate must return a number under 'score', got {scores}")
    loop["history"] = [*loop["history"], {"epoch": epoch, **scores}]
    better = loop["best_score"] is None or scores["score"] > loop["best_score"]
    if better:
        loop.update(best_score=scores["score"], best_epoch=epoch, waited=0)
    else:
        loop["waited"] += 1
    return better
