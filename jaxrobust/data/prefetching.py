"""Reading ahead in a background thread, so that the devices do not wait for data."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class _Failed(NamedTuple):
    error: BaseException


_FINISHED = object()


def prefetch(
    iterator: Iterable[Any], put: Callable[[Any], Any] = lambda batch: batch, size: int = 2
) -> Iterator[Any]:
    """Yields `put(batch)` for each batch, computed up to `size` batches ahead in a thread.

    The thread starts with the first `next`. It ends when the iterator is used up, when it fails,
    or when the consumer leaves (a `break`, an exception, `.close()`, or the generator being
    collected); the iterator itself is then closed as well.

    Args:
        iterator: of batches, read only by the thread.
        put: moves a batch to the devices, e.g. `jax.device_put` or a sharded put.
        size: moved batches that may wait for the consumer, >= 1.

    Returns:
        A generator. What `iterator` or `put` raises is raised by the `next` that would have
        given the failing batch.

    Raises:
        ValueError: size < 1.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    return _consume(iterator, put, size)


def _consume(iterator: Iterable[Any], put: Callable[[Any], Any], size: int) -> Iterator[Any]:
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(size)
    stop = threading.Event()

    def produce() -> None:
        last: Any = _FINISHED
        try:
            for batch in iterator:
                # Room first: `put` takes device memory.
                room.acquire()
                if stop.is_set():
                    break
                ready.put(put(batch))
        except BaseException as error:  # raised again by the consumer
            last = _Failed(error)
        finally:
            try:
                if hasattr(iterator, "close"):
                    iterator.close()
            finally:  # the consumer waits for it, whatever happens
                ready.put(last)

    thread = threading.Thread(target=produce, name="jaxrobust-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _FINISHED:
            if isinstance(item, _Failed):
                raise item.error
            room.release()
            yield item
    finally:
        stop.set()
        room.release()
        thread.join()
