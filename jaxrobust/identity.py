"""What tells runs apart: digests of arrays and descriptions of settings, the same everywhere."""

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.files import CheckpointError


def digest(tree: Any) -> str:
    """SHA-256 of a tree of arrays, in hexadecimal: of names, shapes, dtypes and contents."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype.str}{leaf.shape}".encode())
        found.update(leaf)
    return found.hexdigest()


def describe(thing: Any) -> Any:
    """What something is, as JSON that is the same in every process: for comparing runs.

    Args:
        thing: numbers, strings and containers are themselves, arrays their `digest`; what has a
            `config` (models, objectives) is that; dataclasses and named tuples, attacks among them,
            are their fields, and functions their name with what a `functools.partial` holds.
    """
    if thing is None or isinstance(thing, bool | int | float):
        return thing
    if isinstance(thing, str):
        return re.sub(r" at 0x[0-9a-f]+", "", thing)
    if isinstance(thing, functools.partial):
        named = {"function": thing.func, "arguments": thing.args, **thing.keywords}
        return describe(named)
    if isinstance(thing, dict):
        return {str(name): describe(value) for name, value in thing.items()}
    if isinstance(getattr(thing, "config", None), dict):
        return describe(thing.config)
    if isinstance(thing, np.ndarray | np.generic | jax.Array):
        return "traced" if isinstance(thing, jax.core.Tracer) else digest(thing)
    kind = type(thing).__qualname__
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        return {"type": kind, **describe(fields)}
    if hasattr(thing, "_asdict"):
        return {"type": kind, **describe(thing._asdict())}
    if isinstance(thing, list | tuple):
        return [describe(part) for part in thing]
    return getattr(thing, "__qualname__", kind)


def check_same_run(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuses to go on with another run: names the first thing in which two descriptions differ.

    Raises:
        CheckpointError: they differ.
    """
    _compare(path, "", json.loads(json.dumps(expected)), found)


def _compare(path: Path, name: str, ours: Any, theirs: Any) -> None:
    if ours == theirs:
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            inner = f"{name}.{key}" if name else key
            _compare(path, inner, ours.get(key), theirs.get(key))
    raise CheckpointError(f"{path}: expected a run with {name} {ours}, found {theirs}")
