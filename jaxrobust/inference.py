"""One function over a whole set: batches of one shape, on all devices, in all processes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxrobust import data, parallel, processes
from jaxrobust.attacks.inputs import check_steps

PyTree = Any


def over_set(
    fn: Callable[[PyTree, PyTree, str | None], PyTree],
    shared: PyTree,
    read: Callable[[np.ndarray], PyTree],
    count: int,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    progress: bool = False,
    label: str = "batches",
) -> PyTree:
    """fn(shared, examples, axis_name) for every example, the next batch read meanwhile.

    With several processes all of them must call it; each works on its share and gets all results.

    Args:
        fn: a function of many examples, row by row, as `parallel.map_examples` takes it. One that
            is equal to an earlier one compiles nothing.
        shared: arrays that all examples share; sent to the devices once.
        read: rows [b] -> their examples, arrays [b, ...] on the host.
        count: how many examples there are, >= 1.
        batch_size: examples at a time, rounded up to a multiple of the devices, which hold up to
            four batches.
        mesh: this process's devices, over which a batch is spread; one device by default.
        progress: show a progress bar.
        label: its text.

    Returns:
        The results of `fn` as host arrays [count, ...].

    Raises:
        ValueError: batch_size or count < 1.
    """
    check_steps(batch_size, "batch_size")
    check_steps(count, "the number of examples")
    mine = own_rows(count)
    size = parallel.rounded(min(batch_size, len(mine)), mesh)
    batches = list(filled(mine, size))
    shared = parallel.replicate(shared, mesh)
    ready = data.prefetch(map(read, batches), partial(parallel.place, mesh=mesh))
    parts: list[Any] = []
    with contextlib.closing(ready):
        for batch in tqdm(ready, label, len(batches), disable=not progress, leave=False):
            parts.append(_run(fn, mesh, shared, batch))
            # Not before: the next batch is under way while this one's results come to the host.
            parts[-2:-1] = [jax.tree.map(np.asarray, part) for part in parts[-2:-1]]
    return jax.tree.map(lambda *leaves: all_rows([*map(np.asarray, leaves)], count), *parts)


@partial(jax.jit, static_argnums=(0, 1))
def _run(fn, mesh, shared, examples):
    return parallel.map_examples(fn, mesh)(shared, examples)


def own_rows(count: int) -> np.ndarray:
    """Which of `count` rows this process works on: as many as every other, the last row repeated.

    `all_rows` puts what came of them together.
    """
    share = -(-count // jax.process_count())
    first = share * jax.process_index()
    return np.minimum(np.arange(first, first + share), count - 1)


def filled(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows in batches of one size, the last one filled up with the last row."""
    for start in range(0, len(rows), size):
        yield rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]


def all_rows(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """What all processes found, [count, ...], from this one's results for `filled(own_rows)`."""
    share = -(-count // jax.process_count())
    return processes.from_all_processes(np.concatenate(parts)[:share])[:count]
