"""Batches whose order is a pure function of (seed, epoch), the same for any number of processes."""

import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from jaxrobust.data.dataset import Dataset, Examples, Source
from jaxrobust.data.decoding import decoding_pool

Batch = dict[str, np.ndarray]


def epoch_order(count: int, *, seed: int, epoch: int) -> Int[np.ndarray, "count"]:
    """The order in which an epoch visits the examples: a permutation of range(count).

    Args:
        count: number of examples.
        seed: of the run, >= 0.
        epoch: number of the pass over the data, >= 0.

    Returns:
        The permutation, equal on every machine and numpy version.

    Raises:
        ValueError: seed or epoch is negative.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    # numpy keeps the raw stream of a bit generator for ever, `Generator.permutation` it may change;
    # a resumed run must see the order that it left.
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(draws, kind="stable")


def steps_per_epoch(
    dataset: Dataset | Source, batch_size: int, *, drop_remainder: bool = True
) -> int:
    """The number of batches of one epoch.

    Args:
        dataset: what is batched.
        batch_size: examples per batch over all processes.
        drop_remainder: leave out the last, smaller batch.

    Returns:
        The number of batches; 0 of an empty set whose remainder is kept.

    Raises:
        ValueError: batch_size < 1, or the data set does not fill one batch and the remainder is
            dropped.
    """
    count = len(dataset)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if not drop_remainder:
        return -(-count // batch_size)
    if batch_size > count:
        raise ValueError(
            f"batch_size must be <= {count}, the number of examples, when the remainder is "
            f"dropped, got {batch_size}"
        )
    return count // batch_size


def _check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    if process_count < 1:
        raise ValueError(f"process_count must be >= 1, got {process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}")
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be divisible by process_count {process_count}, got {batch_size}"
        )


def batches(
    dataset: Dataset | Source,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    drop_remainder: bool = True,
    pad: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
    workers: int | None = None,
) -> Iterator[Batch]:
    """One epoch of batches, from batch `start` on.

    Batch k of the epoch holds examples order[k * batch_size : (k + 1) * batch_size]; process p
    gets the p-th of `process_count` equal contiguous parts of it. So the global batch is the same
    for any number of processes, and a run resumed at `start` sees what it would have seen.

    Args:
        dataset: arrays, or a source that is decoded by threads as it goes.
        batch_size: examples per batch over all processes; a multiple of `process_count`.
        seed: of the order, >= 0.
        epoch: of the order, >= 0.
        shuffle: False keeps the data set's own order.
        drop_remainder: leave out the last, smaller batch. With several processes a remainder that
            they cannot share equally needs `pad`.
        pad: for evaluation: keep the remainder and fill it to `batch_size` by repeating the
            epoch's first example; every batch then has "weight", 1 for examples and 0 for filling.
        process_index: which share is wanted, `jax.process_index()`.
        process_count: number of shares, `jax.process_count()`.
        start: number of batches to skip, at no cost.
        workers: decoding threads of a source; None is one per core, at most 16.

    Yields:
        dict(image [b, h, w, c] float32, label [b] int32, index [b] int32), with salience
        [b, h, w, 1] float32 of a set that carries maps, and with `pad` weight [b] float32;
        b = batch_size / process_count.

    Raises:
        ValueError: a number is out of its range, before the first batch is asked for.
    """
    keep = pad or not drop_remainder
    steps = steps_per_epoch(dataset, batch_size, drop_remainder=not keep)
    _check_processes(batch_size, process_index, process_count)
    if not 0 <= start <= steps:
        raise ValueError(f"start must be in [0, {steps}], the epoch's batches, got {start}")
    count = len(dataset)
    remainder = count % batch_size if keep and not pad else 0
    if remainder % process_count:
        raise ValueError(
            f"the last batch of {remainder} examples is not divisible by process_count "
            f"{process_count}: use pad=True or drop_remainder=True"
        )
    order = epoch_order(count, seed=seed, epoch=epoch) if shuffle else np.arange(count)
    shares = (
        _share(order, step, batch_size, pad, process_index, process_count)
        for step in range(start, steps)
    )
    if isinstance(dataset, Dataset):
        return (_gather(dataset, *share) for share in shares)
    return _decoded(dataset, shares, workers or min(16, os.cpu_count() or 1))


def _share(
    order: np.ndarray, step: int, batch_size: int, pad: bool, index: int, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """One process's part of a global batch: positions in the data set, and weights if padded."""
    chosen = order[step * batch_size : (step + 1) * batch_size]
    weight = None
    if pad:
        missing = batch_size - len(chosen)
        weight = np.repeat(np.float32([1, 0]), [len(chosen), missing])
        chosen = np.concatenate([chosen, np.repeat(order[:1], missing)])
    part = slice(index * len(chosen) // count, (index + 1) * len(chosen) // count)
    return chosen[part], None if weight is None else weight[part]


def _batch(examples: Examples, weight: np.ndarray | None) -> Batch:
    batch = {"image": examples.images, "label": examples.labels, "index": examples.indices}
    further = {"salience": examples.salience, "weight": weight}
    return batch | {name: column for name, column in further.items() if column is not None}


def _gather(dataset: Dataset, chosen: np.ndarray, weight: np.ndarray | None) -> Batch:
    salience = None if dataset.salience is None else dataset.salience[chosen]
    columns = (dataset.images, dataset.labels, dataset.indices)
    return _batch(Examples(*(column[chosen] for column in columns), salience), weight)


def _decoded(source: Source, shares: Iterator, workers: int) -> Iterator[Batch]:
    with decoding_pool(workers) as pool:
        for chosen, weight in shares:
            yield _batch(source.take(chosen, pool), weight)


def stream(
    dataset: Dataset | Source,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Shuffled full batches for ever, epoch after epoch, from training step `start` on.

    Step s is batch s % steps of epoch s // steps: the step number alone says where training is.

    Args:
        dataset: as for `batches`.
        batch_size: as for `batches`.
        seed: as for `batches`.
        start: the first step, counted over all epochs, >= 0.
        process_index: as for `batches`.
        process_count: as for `batches`.
        workers: as for `batches`.

    Returns:
        An endless iterator of batches.

    Raises:
        ValueError: as for `batches`.
    """
    if start < 0:
        raise ValueError(f"start must be >= 0, got {start}")
    steps = steps_per_epoch(dataset, batch_size)

    def one_epoch(epoch: int, first: int) -> Iterator[Batch]:
        return batches(
            dataset,
            batch_size,
            seed=seed,
            epoch=epoch,
            process_index=process_index,
            process_count=process_count,
            start=first,
            workers=workers,
        )

    def forever(current: Iterator[Batch], epoch: int) -> Iterator[Batch]:
        while True:
            yield from current
            epoch += 1
            current = one_epoch(epoch, 0)

    return forever(one_epoch(start // steps, start % steps), start // steps)
