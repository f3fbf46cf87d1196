"""Any folder that holds one sub-folder of image files per class."""

import os
from collections.abc import Sequence
from pathlib import Path

from jaxrobust.data.dataset import Dataset, Record, Source, to_memory
from jaxrobust.data.packages import require

# What the folders of splits are called: a tree that has one is no single class-per-folder set.
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def _images_under(folder: Path) -> list[Path]:
    """Image files at any depth, sorted; what is hidden is left out."""
    found = []
    # Splits and classes are often links to where the files are.
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where) / name for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def _folders_of(path: Path) -> list[Path]:
    return [one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")]


def _classes(root: Path, top: Path) -> tuple[str, ...]:
    """Names of the classes of all splits: a split that lacks one must not shift the others."""
    tops = {top}
    if top != root:
        tops |= {one for one in _folders_of(root) if one.name.lower() in _SPLITS}
    return tuple(sorted({one.name for split in tops for one in _folders_of(split)}))


def _split_root(path: Path, split: str) -> Path:
    if (path / split).is_dir():
        return path / split
    if split == "train":
        named = sorted(child.name for child in path.iterdir() if child.name.lower() in _SPLITS)
        if named:
            raise ValueError(
                f"split 'train' must be a folder {path / split} where there are others: {named} "
                "would be taken for classes"
            )
        return path
    raise ValueError(f"unknown split {split!r} of {path}: there is no folder {path / split}")


def folder_source(
    path: str | os.PathLike, split: str = "train", *, size: int | None = None
) -> Source:
    """Random access to a class-per-folder directory; files are opened as they are read.

    Args:
        path: the folder. If it holds a folder named like `split`, that one is read; otherwise
            "train" means the whole folder.
        split: "train", or the name of a sub-folder such as "val".
        size: side in pixels to resize and centre-crop to; None needs images of one shape.

    Returns:
        The source. Labels follow the sorted class names of all splits together (train, val, test
        and the like), of which this one may lack some; an index is the file's place among the
        sorted files of the whole folder.

    Raises:
        ValueError: no such folder or split, no classes in it, or a class's folder without images.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"path must be a folder with one sub-folder per class, got {root}")
    require("PIL.Image", "pillow", f"the image folder {root}")
    top = _split_root(root, split)
    if not _folders_of(top):
        raise ValueError(f"no classes: {top} holds no sub-folders")
    classes = _classes(root, top)
    index_of = {file: index for index, file in enumerate(_images_under(root))}
    examples: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        if not (top / name).is_dir():
            continue
        files = _images_under(top / name)
        if not files:
            raise ValueError(f"class folder {top / name} holds no images ({', '.join(SUFFIXES)})")
        examples += [(file, label) for file in files]

    def read(positions: Sequence[int]) -> list[Record]:
        chosen = [examples[position] for position in positions]
        return [Record(f.read_bytes(), label, index_of[f], str(f)) for f, label in chosen]

    return Source(read, len(examples), classes, channels=3, size=size)


def load_folder(
    path: str | os.PathLike, split: str = "train", *, size: int | None = None
) -> Dataset:
    """A class-per-folder directory as arrays, in the order of class and file name.

    Args:
        path: as for `folder_source`.
        split: as for `folder_source`.
        size: as for `folder_source`.

    Returns:
        images [n, h, w, 3] float32 in [0, 1], labels, indices and class names.

    Raises:
        ValueError: as for `folder_source`; or files are no readable images (all are named), or
            their shapes differ and `size` is None.
    """
    return to_memory(folder_source(path, split, size=size))
