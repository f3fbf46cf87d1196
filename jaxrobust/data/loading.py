"""Named data sets: prepare once into ArrayRecord through TFDS, then load or open them."""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any

from jaxrobust.data.dataset import Dataset, Record, Source, to_memory
from jaxrobust.data.folder import folder_source
from jaxrobust.data.packages import require

FOLDER_PREFIX = "folder:"


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a name is loaded: the builder's module and class, its config, and the pixel's scale."""

    module: str
    builder: str
    config: str | None = None
    channels: int = 3
    size: int | None = None
    levels: int = 255


_EMBEDDED = "jaxrobust.data.builders"
_CLASSIC = "jaxrobust.data.classic"
ENTRIES = {
    "mnist5k": Entry(_EMBEDDED, "JaxrobustMnist5k", channels=1),
    "digits": Entry(_EMBEDDED, "JaxrobustDigits", channels=1, levels=16),
    "cifar10": Entry(_CLASSIC, "JaxrobustCifar10"),
    "cifar100": Entry(_CLASSIC, "JaxrobustCifar100"),
    "svhn": Entry(_CLASSIC, "JaxrobustSvhn"),
    "imagenette": Entry(_CLASSIC, "JaxrobustImagenette", config="160px", size=160),
    "imagenette/160px": Entry(_CLASSIC, "JaxrobustImagenette", config="160px", size=160),
    "imagenette/320px": Entry(_CLASSIC, "JaxrobustImagenette", config="320px", size=320),
    "tiny_imagenet": Entry(_CLASSIC, "JaxrobustTinyImagenet", size=64),
    "cub200": Entry("jaxrobust.data.birds", "JaxrobustCub200", size=224),
    "cutouts": Entry("jaxrobust.data.cutouts", "JaxrobustCutouts"),
    "stamps": Entry("jaxrobust.data.cutouts", "JaxrobustStamps"),
    "emoji": Entry("jaxrobust.data.emoji", "JaxrobustEmoji"),
}


def names() -> tuple[str, ...]:
    """The names that `load` and `source` know, besides "folder:/path"."""
    return tuple(ENTRIES)


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    size: int | None = None,
) -> Dataset:
    """A whole split as arrays; the first call prepares the set on disk.

    The order is fixed and mixes the classes, so that `images[:200]` of the embedded sets is a
    balanced sample. Splits of one set never overlap.

    Args:
        name: one of `names()`, or "folder:/path" for a folder with one sub-folder per class.
        split: a split or a TFDS expression: "train", "train+validation", "test[:200]",
            "train[:90%]". mnist5k and digits have train, validation and test.
        data_dir: where prepared sets live; None is `$TFDS_DATA_DIR` or ~/tensorflow_datasets.
        size: side in pixels to resize and centre-crop to; None keeps the set's own.

    Returns:
        images [n, h, w, c] float32 in [0, 1], labels, indices and class names; of cub200,
        cutouts, stamps and emoji also salience [n, h, w, 1], the depicted thing's own map.

    Raises:
        ValueError: the name or the split is unknown, an archive is not the expected one, or the
            arrays would not fit (use `source`).
        ImportError: a package that carries the data or reads it is missing.
        ConnectionError: an archive cannot be downloaded.
    """
    return to_memory(source(name, split, data_dir=data_dir, size=size))


def source(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    size: int | None = None,
) -> Source:
    """A split with random access, decoded as it is read; for sets larger than memory.

    Args:
        name: as for `load`.
        split: as for `load`.
        data_dir: as for `load`.
        size: as for `load`.

    Returns:
        An object with `len`, `[position]` and `take(positions)`; `batches` takes it as it takes a
        `Dataset`.

    Raises:
        ValueError, ImportError, ConnectionError: as for `load`.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be >= 1 pixel, got {size}")
    if name.startswith(FOLDER_PREFIX):
        return folder_source(name.removeprefix(FOLDER_PREFIX), split, size=size)
    if name not in ENTRIES:
        raise ValueError(
            f"unknown data set {name!r}; known: {', '.join(names())}, and {FOLDER_PREFIX}/path"
        )
    entry = ENTRIES[name]
    require("PIL.Image", "pillow", f"data set {name!r}")
    return _open(
        prepared(entry, data_dir), split, dataclasses.replace(entry, size=size or entry.size)
    )


def _builder(entry: Entry, data_dir: str | os.PathLike | None) -> Any:
    builder_class = getattr(importlib.import_module(entry.module), entry.builder)
    config = {"config": entry.config} if entry.config else {}
    # As text, since a bucket's "gs://" would not survive pathlib.
    directory = os.path.expanduser(os.fspath(data_dir)) if data_dir is not None else None
    return builder_class(data_dir=directory, file_format="array_record", **config)


def prepared(entry: Entry, data_dir: str | os.PathLike | None) -> Any:
    """A builder whose files are on disk; the first call puts them there."""
    import tensorflow_datasets as tfds

    builder = _builder(entry, data_dir)
    # TFDS renames a finished folder into place, so that its existence is enough; `is_prepared`
    # would log a warning where there is none yet.
    if builder.data_path.exists():
        return builder
    # TFDS would look for a prepared copy in its cloud bucket; these builders are not there.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except OSError:
        # Each process prepares in its own temporary folder and renames it; whoever comes second
        # fails to rename onto the first one's result, which is as good as its own.
        if not builder.data_path.exists():
            raise
    return _builder(entry, data_dir)


def _open(builder: Any, split: str, entry: Entry) -> Source:
    import tensorflow_datasets as tfds

    known = tuple(builder.info.splits)
    images = [name for name in ("image", "salience") if name in builder.info.features]
    raw = {name: tfds.decode.SkipDecoding() for name in images}
    try:
        stored = builder.as_data_source(split, decoders=raw)
    except ValueError as error:
        raise ValueError(
            f"unknown or empty split {split!r} of {builder.name}; it has {known}, and slices and "
            "sums of them such as 'train[:90%]' and 'train+test'"
        ) from error

    def read(positions: Sequence[int]) -> list[Record]:
        rows = stored.__getitems__(positions)
        return [
            Record(
                row["image"],
                int(row["label"]),
                int(row["index"]),
                f"{builder.name} {place}",
                row.get("salience"),
            )
            for place, row in zip(positions, rows, strict=True)
        ]

    class_names = tuple(builder.info.features["label"].names)
    return Source(read, len(stored), class_names, entry.channels, entry.size, entry.levels)
