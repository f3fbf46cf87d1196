"""What the processes of one job tell each other; nothing to do where there is one."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(answer: bool) -> bool:
    """Process 0's answer on every process: what clocks and files say may differ between them."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def wait_for_all(name: str) -> None:
    """Returns when every process has come to the place in the program that has this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_all_processes(share: np.ndarray) -> np.ndarray:
    """[n / processes, ...] of each process, joined in their order on every one."""
    if jax.process_count() == 1:
        return share
    found = np.asarray(multihost_utils.process_allgather(_bytes(share), tiled=True))
    return found.view(share.dtype).reshape(-1, *share.shape[1:])


def from_first_process(array: np.ndarray) -> np.ndarray:
    """Process 0's array on every process: what a library computed need not be equal to the bit."""
    if jax.process_count() == 1:
        return array
    found = np.asarray(multihost_utils.broadcast_one_to_all(_bytes(array)))
    return found.view(array.dtype).reshape(array.shape)


def _bytes(array: np.ndarray) -> np.ndarray:
    """[n, ...] as [n, bytes]: on the way float64 would become float32."""
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
