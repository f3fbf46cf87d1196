"""How the benchmarks measure: warm-up apart, interleaved repeats in one process, medians."""

import time
from collections.abc import Callable, Mapping

import numpy as np


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, repeats: int, seconds: float = 300.0
) -> dict[str, dict[str, float]]:
    """Times functions in turn, A B C A B C ..., so that a drifting machine slows all alike.

    Args:
        runs: by name; each returns only when its work is done.
        repeats: rounds at most, at least 1.
        seconds: no further round begins after so long.

    Returns:
        By name: first_seconds (the first call, compilation included), seconds_median,
        seconds_min, seconds_max and repeats of the later ones.
    """
    first, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        first[name] = _seconds(run)
        _seconds(run)  # caches and allocators settle on the second call
    begun = time.perf_counter()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_seconds(run))
        if time.perf_counter() - begun > seconds:
            break
    return {
        name: {
            "first_seconds": first[name],
            "seconds_median": float(np.median(values)),
            "seconds_min": min(values),
            "seconds_max": max(values),
            "repeats": len(values),
        }
        for name, values in times.items()
    }


def _seconds(run):
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun
