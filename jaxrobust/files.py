"""Files that are written whole or not at all, and the error for one that is damaged or foreign."""

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

_LISTED = 20  # names per line of an error; a foreign model differs in hundreds


class CheckpointError(ValueError):
    """A checkpoint or weights file is damaged, foreign, or does not fit what is asked for."""


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a file whole or not at all, through a temporary file in the same directory.

    Args:
        path: file to create or replace; its directory is created.
        content: bytes, or text that is stored as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def temporary_beside(path: Path) -> Path:
    """A name in the same directory that no other process has, on this host or another."""
    return path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name}")


def sync_directory(path: str | os.PathLike) -> None:
    """Make a rename in this directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_same_arrays(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare what a file holds with what is asked for; raise one error that lists all differences.

    Args:
        path: the file or directory, for the message.
        found: array name -> dtype and shape ("float32[3, 2]") in the file.
        expected: the same of what is asked for.

    Raises:
        CheckpointError: they differ.
    """
    both = found.keys() & expected.keys()
    differences = {
        "missing": [f"{name} {expected[name]}" for name in expected.keys() - found.keys()],
        "unexpected": [f"{name} {found[name]}" for name in found.keys() - expected.keys()],
        "different": [
            f"{name} is {found[name]}, expected {expected[name]}"
            for name in both
            if found[name] != expected[name]
        ],
    }
    lines = [
        f"  {kind} ({len(names)}): "
        + "; ".join(sorted(names)[:_LISTED])
        + " ..." * (len(names) > _LISTED)
        for kind, names in differences.items()
        if names
    ]
    if lines:
        raise CheckpointError("\n".join([f"{path}: holds another model or state:", *lines]))
