"""Weights alone, as safetensors: a file that any framework reads and that can run no code."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.files import CheckpointError, atomic_write, check_same_arrays


def save_weights(
    path: str | os.PathLike,
    variables: Mapping,
    *,
    metadata: Mapping | None = None,
) -> None:
    """Write a model's variables to a safetensors file, whole or not at all.

    Call it on one process; arrays sharded over several processes must be gathered first.

    Args:
        path: file to create or replace.
        variables: nested dict of arrays; a leaf's name in the file is its keys joined by "/".
            Every dtype is kept, bfloat16 too. Empty dicts leave no trace.
        metadata: strings stored beside the arrays, such as the model's name and config as JSON.

    Raises:
        TypeError: a node is not a dict with string keys, a leaf is not an array or is a PRNG key,
            or metadata holds anything but strings.
        ValueError: there is no array, or a key is empty or holds "/".
    """
    from safetensors.numpy import save

    metadata = dict(metadata or {})
    for name, text in metadata.items():
        if not (isinstance(name, str) and isinstance(text, str)):
            raise TypeError(f"metadata must map str to str, got {name!r}: {type(text).__name__}")
    arrays = {name: np.array(leaf, order="C") for name, leaf in _flatten(variables)}
    if not arrays:
        raise ValueError("variables must hold at least one array, got none")
    atomic_write(path, _with_sorted_metadata(save(arrays, metadata=metadata)))


def load_weights(path: str | os.PathLike, like: Mapping | None = None) -> dict[str, Any]:
    """Read variables from a safetensors file.

    Args:
        path: file that `save_weights`, or another library, wrote.
        like: nested dict of arrays or `jax.ShapeDtypeStruct` that the file must match, name by
            name; arrays committed to devices give theirs to what is loaded. None takes the file
            as it is. Numbers of 64 bits come in 32, float64 rounded, unless JAX is told to use 64.

    Returns:
        Nested dict of arrays, with the structure of `like` if it is given.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or no safetensors file, holds numbers that JAX would
            change, or does not match `like`: all missing, unexpected and differing names are listed
            in the one error.
    """
    path = Path(path)
    arrays = _read(path)[0]
    if like is None:
        return _nest(path, arrays)
    check_same_arrays(path, _shapes(arrays), _shapes(dict(_flatten(like))))
    return _fill(path, like, arrays)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the strings stored beside the arrays of a safetensors file ({} if there are none)."""
    return _read(Path(path), arrays=False)[1]


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file, whoever wrote it, under the file's own names."""
    return _read(Path(path))[0]


def _with_sorted_metadata(data: bytes) -> bytes:
    """Rewrite the header, whose metadata come in random order: equal weights, equal bytes.

    A file is the header's length (8 bytes, little-endian), the header as JSON, padded with spaces
    to a multiple of 8 bytes, and the arrays.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _read(path: Path, *, arrays: bool = True) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none")
    try:
        with safe_open(path, framework="np") as file:
            names = sorted(file.keys()) if arrays else []
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, found {path.stat().st_size} bytes that are not "
            f"one (damaged, or another format): {error}"
        ) from error


def _flatten(variables: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in variables.items():
        if not isinstance(key, str):
            raise TypeError(f"variables must have string keys, got {key!r} under {prefix!r}")
        if not key or "/" in key:
            raise ValueError(f'keys must not be empty or hold "/", got {key!r} under {prefix!r}')
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
            continue
        if not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            kind = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"weights must be arrays of numbers, got {kind} at {prefix + key!r}")
        yield prefix + key, value


def _shapes(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}


def _nest(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{path}: {name!r} lies under another array's name")
        node[last] = _unchanged(path, name, array)
    return nested


def _unchanged(path: Path, name: str, array: np.ndarray) -> jax.Array:
    """As JAX's array, of 32 bits where JAX has no more: rounded perhaps, but no other number."""
    with np.errstate(over="ignore"):  # numpy's warning would come before our error
        kept = jnp.asarray(array)
    if kept.dtype == array.dtype:
        return kept
    floats = np.issubdtype(array.dtype, np.floating)
    found = np.asarray(kept)
    same = np.isfinite(found) == np.isfinite(array) if floats else found == array
    if not same.all():
        raise CheckpointError(
            f"{path}: {name} holds {array.dtype} numbers that {kept.dtype} cannot: expected "
            'jax.config.update("jax_enable_x64", True) before'
        )
    return kept


def _fill(path: Path, like: Mapping, arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    filled = {}
    for key, leaf in like.items():
        name = prefix + key
        if isinstance(leaf, Mapping):
            filled[key] = _fill(path, leaf, arrays, name + "/")
        elif getattr(leaf, "committed", False):
            filled[key] = jax.device_put(arrays[name], leaf.sharding)
        else:
            filled[key] = _unchanged(path, name, arrays[name])
    return filled
