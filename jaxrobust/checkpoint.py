"""Save and resume: atomic checkpoints of a whole training state (weights alone: weights.py).

A checkpoint directory holds one folder per saved step, and nothing else:

    <directory>/<step>/orbax/           the arrays, an ordinary Orbax checkpoint
    <directory>/<step>/manifest.json    the loop's own record, every leaf's shape and dtype, and the
                                        size and SHA-256 of every file

A step is written under a hidden name and renamed when complete, so that a kill at any moment leaves
the old checkpoints and, perhaps, the new one. `directory` must be on a file system with an atomic
rename that all processes see.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import processes
from jaxrobust.files import CheckpointError, atomic_write, check_same_arrays, sync_directory
from jaxrobust.weights import load_weights, read_metadata, save_weights

__all__ = [
    "CheckpointError",
    "atomic_write",
    "latest_step",
    "load_weights",
    "read_metadata",
    "restore",
    "save",
    "save_weights",
]

_ARRAYS = "orbax"
_MANIFEST = "manifest.json"
_FORMAT = "jaxrobust-checkpoint-1"
_UNFINISHED = re.compile(r"\.(saving|deleting)-\d+")


def save(
    directory: str | os.PathLike,
    step: int,
    state: Any,
    *,
    loop: dict[str, Any] | None = None,
    keep: int = 2,
) -> None:
    """Save a training state as the newest checkpoint of `directory`; returns when it is on disk.

    With several processes (`jax.distributed`) each one calls this with the same arguments.

    Args:
        directory: holds checkpoints of this run and nothing else; created if missing.
        step: number of the checkpoint; larger than every step that `directory` holds.
        state: pytree of arrays; typed PRNG keys and sharded arrays included.
        loop: what else the training loop needs to continue, as JSON: seed, epoch, position in the
            data order, best validation score, history.
        keep: how many checkpoints to keep, >= 1; older ones are deleted after the new one is whole.

    Raises:
        CheckpointError: `directory` holds something else, a checkpoint of another model, a damaged
            one, or a step that is not older. Nothing is written or deleted then.
        TypeError: a leaf of `state` is not an array or of 64 bits where JAX has 32, or `loop` is
            not JSON (tuples come back as lists).
        ValueError: `step` < 0, `keep` < 1, or `directory` is the address of a bucket.
    """
    directory = _local(directory)
    leaves = _named_leaves(state)
    loop = _checked_loop(loop)
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    _check_appendable(directory, step, _describe(leaves))

    temporary, final = directory / f".saving-{step}", directory / str(step)
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(directory)
        temporary.mkdir()
    _save_arrays(temporary / _ARRAYS, leaves)
    if jax.process_index() == 0:
        manifest = {"format": _FORMAT, "step": step, "loop": loop}
        manifest["leaves"] = _describe(leaves)
        manifest["files"] = {name: _fingerprint(temporary / name) for name in _files(temporary)}
        atomic_write(temporary / _MANIFEST, json.dumps(manifest, indent=1))
        os.rename(temporary, final)
        sync_directory(directory)
        _prune(directory, keep)
    processes.wait_for_all(f"jaxrobust-checkpoint-{step}")


def restore(
    directory: str | os.PathLike, like: Any, *, verify: bool = True
) -> tuple[int, Any, dict[str, Any]] | None:
    """Load the newest checkpoint of `directory`.

    What a kill left half-written is ignored without a word. A finished checkpoint with a damaged or
    missing file is an error, also when an older one is whole: going back in time unasked would hide
    a failing disk. Delete the damaged step's folder to continue from the older one.

    Args:
        directory: where `save` wrote; may be missing or empty.
        like: pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes, dtypes and
            shardings wanted. The devices may be others, and more or fewer, than at saving. Leaves
            with no sharding, or not committed to a device, come back uncommitted.
        verify: read every file and compare its SHA-256; False compares the sizes alone.

    Returns:
        (step, state, loop), `loop` being {} if none was saved; None if there is no checkpoint.

    Raises:
        CheckpointError: the newest checkpoint is damaged, is of another model than `like`, or
            `directory` holds something else. Nothing is changed on disk.
        ValueError: `directory` is the address of a bucket.
    """
    directory = _local(directory)
    steps = _steps(directory)
    if not steps:
        return None
    path = directory / str(steps[-1])
    manifest = _read_manifest(path, verify=verify)
    leaves = _named_leaves(like)
    check_same_arrays(path, manifest["leaves"], _describe(leaves))
    try:
        loaded = _load_arrays(path / _ARRAYS, leaves)
    except Exception as error:
        raise CheckpointError(f"{path}: Orbax could not read the arrays: {error}") from error
    return steps[-1], jax.tree.unflatten(jax.tree.structure(like), loaded), manifest["loop"]


def latest_step(directory: str | os.PathLike) -> int | None:
    """Return the newest finished step in `directory`, or None; reads names alone."""
    steps = _steps(_local(directory))
    return steps[-1] if steps else None


def _local(directory: str | os.PathLike) -> Path:
    """The absolute path; an address such as gs://bucket would become a folder on every host."""
    # One slash is what is left of two once it was a `Path`.
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", os.fspath(directory)):
        raise ValueError(
            "directory must lie in a file system that all hosts share, such as a mounted bucket, "
            f"got {os.fspath(directory)!r}"
        )
    return Path(os.path.abspath(directory))


def _steps(directory: Path) -> list[int]:
    """List the finished steps, ascending; an entry that `save` never makes is an error."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: expected a directory of checkpoints, found a file")
    names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    foreign = [name for name in names if not re.fullmatch(r"0|[1-9]\d*", name)]
    if foreign:
        found = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise CheckpointError(
            f"{directory}: expected a directory that is empty or holds one folder per step, "
            f"found {found}; give checkpoints a directory of their own"
        )
    return sorted(int(name) for name in names)


def _check_appendable(directory: Path, step: int, leaves: dict[str, str]) -> None:
    steps = _steps(directory)
    if not steps:
        return
    newest = directory / str(steps[-1])
    check_same_arrays(newest, _read_manifest(newest, verify=False)["leaves"], leaves)
    if step <= steps[-1]:
        raise CheckpointError(
            f"{directory}: step must be larger than the newest one there, {steps[-1]}, got {step}; "
            "restore that checkpoint, or choose another directory"
        )


def _read_manifest(path: Path, *, verify: bool) -> dict[str, Any]:
    """Read a step's manifest and check every file that it lists."""
    damaged = f"{path}: not a whole checkpoint of this library (damaged, or something else)"
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT or manifest["step"] != int(path.name):
            raise CheckpointError(
                f"{path}: expected {_FORMAT} at step {path.name}, "
                f"found {manifest['format']} at step {manifest['step']}"
            )
        files, _, _ = manifest["files"], manifest["leaves"], manifest["loop"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{damaged}: {_MANIFEST} cannot be read ({error!r})") from error
    for name, (size, digest) in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{damaged}: expected the file {name}, found none")
        found = (path / name).stat().st_size
        if found != size:
            raise CheckpointError(f"{damaged}: expected {size} bytes in {name}, found {found}")
        if verify and _fingerprint(path / name)[1] != digest:
            raise CheckpointError(
                f"{damaged}: the content of {name} has changed since it was saved"
            )
    return manifest


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Map names such as "params/conv/kernel" to leaves, in the order of the tree's own leaves."""
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"state must hold arrays only, got {type(leaf).__name__} at {name!r}; "
                "Python values belong in loop"
            )
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            held = jax.dtypes.canonicalize_dtype(leaf.dtype)
            if held != leaf.dtype:
                raise TypeError(
                    f"state must hold what JAX can, got {leaf.dtype} at {name!r}, which would come "
                    f"back as {held}: convert it, or enable jax_enable_x64"
                )
        if name in leaves:
            raise ValueError(f"state must have one leaf per name, got two at {name!r}")
        leaves[name] = leaf
    if not leaves:
        raise TypeError("state must hold at least one array, got none")
    return leaves


def _describe(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _checked_loop(loop: dict[str, Any] | None) -> dict[str, Any]:
    """Return `loop` as JSON will give it back; anything that would not survive is an error."""
    loop = {} if loop is None else loop
    try:
        _check_names(loop)
        return json.loads(json.dumps(loop))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"loop must be JSON-able (use int(), float(), .tolist()): {error}"
        ) from error


def _check_names(value: Any) -> None:
    """Refuses names that JSON would turn into strings."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"names must be strings, got {name!r}")
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            _check_names(part)


def _files(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def _fingerprint(path: Path) -> list:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _remove_unfinished(directory: Path) -> None:
    for name in os.listdir(directory):
        if _UNFINISHED.fullmatch(name):
            shutil.rmtree(directory / name)


def _prune(directory: Path, keep: int) -> None:
    for step in _steps(directory)[:-keep]:
        # Hidden first: a kill in the middle must not leave a step that looks finished.
        hidden = directory / f".deleting-{step}"
        os.rename(directory / str(step), hidden)
        shutil.rmtree(hidden)


def _stored(leaves: dict[str, Any]) -> dict[str, Any]:
    """Leave out arrays without elements: Orbax refuses them, and the manifest says all of them."""
    return {name: leaf for name, leaf in leaves.items() if 0 not in leaf.shape}


def _save_arrays(path: Path, leaves: dict[str, Any]) -> None:
    from orbax.checkpoint import v1 as ocp  # half a second to import

    ocp.save(path, _stored(leaves))


def _load_arrays(path: Path, like: dict[str, Any]) -> list[jax.Array]:
    from orbax.checkpoint import v1 as ocp

    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_wanted_sharding(leaf))
        for name, leaf in _stored(like).items()
    }
    loaded = ocp.load(path, wanted) if wanted else {}
    return [
        _placed_like(loaded[name], leaf) if name in loaded else jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in like.items()
    ]


def _wanted_sharding(leaf: Any) -> Any:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return getattr(leaf, "sharding", None) or default


def _placed_like(value: jax.Array, like: Any) -> jax.Array:
    """Free a leaf from its device where `like` is free: committed ones refuse to meet a mesh."""
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if getattr(like, "committed", getattr(like, "sharding", None) is not None):
        # On a mesh of one device Orbax gives a scalar key the spec (None,), one axis too many.
        misplaced = is_key and value.is_fully_addressable and value.sharding != like.sharding
        return jax.device_put(value, like.sharding) if misplaced else value
    if is_key:
        data = jnp.asarray(np.asarray(jax.random.key_data(value)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    return jnp.asarray(np.asarray(value))
