"""Maps of a whole data set: computed by one compiled program, and kept on disk by example id."""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxrobust import inference
from jaxrobust.files import atomic_write
from jaxrobust.keys import example_keys, numbered_keys

Method = Callable[..., Array]
Maps = Float[np.ndarray, "n h w 1"]


def compute(
    method: Method,
    apply: Callable[..., Any],
    variables: Any,
    images: Any,
    labels: Any,
    *,
    key: Array | None = None,
    indices: Any = None,
    batch_size: int = 250,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "n h w 1"]:
    """The scores of all images: one compiled program, which works through them in batches.

    Args:
        method: (apply, x, labels, keys) -> [b, h, w, 1], such as `gradient` or
            `partial(grad_cam, tap="layer3")`. The same object every time compiles once.
        apply: (variables, x, ...) -> logits, `Model.apply`.
        variables: the model's.
        images: [n, h, w, c] float32 in [0, 1].
        labels: [n] the classes that are explained.
        key: one typed key, for methods that draw.
        indices: [n] ids of the examples, which are folded into the key, so that a map does not
            depend on the others that are made with it; by default row numbers.
        batch_size: images at a time, rounded up to a multiple of the devices, which hold up to four
            batches.
        mesh: this process's devices, over which a batch is spread; one device by default. With
            several processes all must call it: each one explains its share and gets all scores.
        progress: show a progress bar.

    Returns:
        [n, h, w, 1] scores.

    Raises:
        TypeError: key is not a typed key.
        ValueError: batch_size < 1, no images, or images and labels that do not fit.
    """
    images, labels = np.asarray(images, np.float32), np.asarray(labels, np.int32)
    if images.ndim != 4 or labels.shape != (len(images),):
        raise ValueError(
            f"images must be [n, h, w, c] with labels [n], got {images.shape} and {labels.shape}"
        )
    if key is not None and indices is not None:
        key = numbered_keys(key, indices)
    keys = None if key is None else example_keys(key, len(images))

    def read(rows: np.ndarray) -> tuple:
        return images[rows], labels[rows], None if keys is None else keys[rows]

    return inference.over_set(
        _Look(method, apply), variables, read, len(images), batch_size=batch_size, mesh=mesh,
        progress=progress, label="salience",
    )  # fmt: skip


class _Look(NamedTuple):
    """What is compiled for."""

    method: Method
    apply: Callable[..., Any]

    def __call__(self, variables: Any, batch: tuple, axis_name: str | None) -> Array:
        """[b, h, w, 1] scores."""
        return self.method(lambda x, **options: self.apply(variables, x, **options), *batch)


def made_by(method: Method, variables: Any, **further: Any) -> dict[str, Any]:
    """What a cached map depends on besides its image: a fingerprint for `cached`.

    Args:
        method: a function, or `functools.partial` of one; its settings must print fully.
        variables: of the model: any other weights are another fingerprint.
        further: what else decides, JSON-able: data set, seed, area.
    """
    settings = {}
    while isinstance(method, functools.partial):
        settings = {**method.keywords, **settings}
        method = method.func
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return {
        "method": method.__qualname__,
        "settings": {name: repr(value) for name, value in sorted(settings.items())},
        "variables": digest.hexdigest(),
        **further,
    }


def cached(
    directory: str | Path,
    fingerprint: Mapping[str, Any],
    indices: Int[np.ndarray, "n"],
    make: Callable[[Int[np.ndarray, "m"]], Any],
) -> Maps:
    """Maps from disk, after making those that are not there yet.

    Each fingerprint has a file of its own, so that maps of other weights are never taken for these.
    With several processes all must call it, on one directory, since `compute` needs them all.

    Args:
        directory: of the cache; created.
        fingerprint: what made the maps, JSON-able, such as `made_by` gives.
        indices: [n] ids of the examples, `Dataset.indices`.
        make: positions [m] among the n -> their maps [m, h, w, 1]; called at most once.

    Returns:
        [n, h, w, 1] float32, in the order of `indices`.

    Raises:
        ValueError: the file is damaged, or `make` returned another number of maps or NaN.
    """
    text = json.dumps(dict(fingerprint), sort_keys=True)
    path = Path(directory) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
    ids, maps = _read(path)
    new = np.flatnonzero(~np.isin(indices, ids))
    if len(new):
        made = np.asarray(make(new), np.float32)
        if len(made) != len(new) or np.isnan(made).any():
            raise ValueError(f"make must return {len(new)} maps without NaN, got {made.shape}")
        ids = np.concatenate([ids, indices[new]])
        maps = made if maps is None else np.concatenate([maps, made])
        stream = io.BytesIO()
        np.savez_compressed(stream, indices=ids, maps=maps, fingerprint=text)
        atomic_write(path, stream.getvalue())
    order = np.argsort(ids)
    return maps[order[np.searchsorted(ids, indices, sorter=order)]]


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    if not path.exists():
        return np.empty(0, np.int32), None
    try:
        # From memory: numpy leaves a damaged file open.
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            return stored["indices"], stored["maps"]
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise ValueError(f"{path} is damaged ({error}): delete it to make its maps anew") from error
