"""Pairs of an image and its caption: in memory (Pairs) or decoded when asked for (PairSource).

    pairs, counts = load_pairs("cc3m/train.tsv", size=64)
    source = pair_source("cc3m/train.tsv", size=224)
    pairs = source.pairs()  # the same on disk
    for shard in source.shards(4096): ...

A bad row is counted and logged, or raises; none is dropped in silence.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jaxrobust.data.dataset import Record, Source, to_memory
from jaxrobust.data.decoding import decoding_pool, is_readable
from jaxrobust.data.packages import require
from jaxrobust.data.pair_faults import check_on_bad, row_faults, sift
from jaxrobust.data.pair_tables import read_rows
from jaxrobust.data.stored_images import Images, stored

_CHECKED_AT_ONCE = 4096  # files whose checks are queued together


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """Images with their captions; `pairs[:16]` are the first of them.

    Attributes:
        images: [n, h, w, c] float32 in [0, 1]: an array, or `StoredImages`, of which
            `np.asarray(images[rows])` decodes some.
        captions: n texts.
        indices: [n] int32, an id that stays with the pair.
        labels: [n] int32 in [0, len(class_names)) for zero-shot tests; None without classes.
        class_names: one name per class, in the order of the labels.
    """

    images: Images
    captions: tuple[str, ...]
    indices: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"] | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: Any) -> Any:
        """One pair as a dict; or the pairs of a slice or an index array."""
        if not isinstance(rows, int | np.integer):
            return self.take(rows)
        image = np.asarray(self.images[[rows]])[0]
        return {"image": image, "caption": self.captions[rows], "index": self.indices[rows]}

    def __repr__(self) -> str:
        return f"Pairs({len(self)} images with captions, {len(self.class_names)} classes)"

    def replace(self, **columns: Any) -> "Pairs":
        """The same pairs with other columns."""
        return dataclasses.replace(self, **columns)

    def take(self, rows: Any) -> "Pairs":
        """The pairs at `rows`, a slice or an index array, with everything that is theirs."""
        places = np.arange(len(self))[rows]
        return self.replace(
            images=self.images[rows],
            captions=tuple(self.captions[place] for place in places),
            indices=self.indices[rows],
            labels=None if self.labels is None else self.labels[rows],
        )


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Pairs with random access; images are decoded when they are asked for.

    Attributes:
        source: the images, for `batches` and `stream`. A pair's class is its own caption: the
            label is its row and `class_names` are the captions, so that `tokens[batch["label"]]`
            are the texts of a batch.
        indices: [n] int32, the ids that the pairs have.
        counts: "rows" of the table, "kept", and how many had each of `FAULTS`.
    """

    source: Source
    indices: Int[np.ndarray, "n"]
    counts: Mapping[str, int]

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, in the order of the rows."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def take(
        self, positions: Sequence[int] | Int[np.ndarray, "b"], pool: Executor | None = None
    ) -> Pairs:
        """The pairs at `positions`, decoded by `pool`'s threads.

        Args:
            positions: b rows in [0, len(self)).
            pool: as for `Source.take`.

        Returns:
            b pairs.

        Raises:
            ValueError: as for `Source.take`.
        """
        images, rows, indices, _ = self.source.take(positions, pool)
        return Pairs(images, tuple(self.captions[row] for row in rows), indices)

    def pairs(self) -> Pairs:
        """All pairs, with images that stay on disk."""
        return Pairs(stored(self.source), self.captions, self.indices)

    def shards(self, size: int, *, start: int = 0, workers: int = 4) -> Iterator[Pairs]:
        """All pairs in their order, `size` at a time; the last shard may be smaller.

        Args:
            size: pairs per shard, >= 1.
            start: number of shards to skip, at no cost.
            workers: decoding threads.

        Raises:
            ValueError: size < 1 or start < 0, before the first shard is asked for.
        """
        for name, value, least in (("size", size, 1), ("start", start, 0)):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

        def decoded() -> Iterator[Pairs]:
            with decoding_pool(workers) as pool:
                for first in range(start * size, len(self), size):
                    yield self.take(range(first, min(first + size, len(self))), pool)

        return decoded()


def pair_source(
    path: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    size: int | None = None,
    on_bad: str = "skip",
    verify: bool = True,
    phrases: int = 5,
    seed: int = 0,
    quoted: bool = True,
    workers: int = 4,
) -> PairSource:
    """Random access to the pairs of a table; only paths and captions are held in memory.

    Args:
        path: .tsv or .csv with a heading (CC3M), .jsonl, or .json: a list of records, or Visual
            Genome's region_descriptions.json beside its VG_100K and VG_100K_2.
        root: where relative image paths begin; None is the table's folder.
        image_column: name of the column with image paths; None takes "image", "filepath", "path",
            "file_name" and the like.
        caption_column: name of the column with captions; None takes "caption", "title", "text" ...
        size: side in pixels to resize and centre-crop to; None needs images of one shape.
        on_bad: "skip" counts bad rows (`FAULTS`) and logs one line, "raise" refuses the table.
        verify: decode every image once now, so that a corrupt one is found now; without, only
            missing files are, and a corrupt one raises when it is taken.
        phrases: of Visual Genome, region phrases per caption at most, >= 1; 5 in SafeCLIP.
        seed: of Visual Genome, which phrases.
        quoted: of .tsv and .csv: a cell in double quotes may hold delimiters and line ends; False
            takes quotes for letters.
        workers: threads that verify.

    Returns:
        The source; an index is the row's number in the table.

    Raises:
        ValueError: an argument is out of its range, the table cannot be read or has no good row,
            or it has a bad one and `on_bad` is "raise".
        FileNotFoundError: no such table.
    """
    table = Path(path).expanduser()
    folder = table.parent if root is None else Path(root).expanduser()
    for name, value in (("size", size), ("phrases", phrases), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    check_on_bad(on_bad)
    require("PIL.Image", "pillow", f"the image-text table {table}")
    rows = list(read_rows(table, folder, image_column, caption_column, phrases, seed, quoted))
    faults = row_faults(rows)
    whole = [place for place, fault in enumerate(faults) if not fault]
    files = [folder / rows[place].image for place in whole]
    for place, fault in zip(whole, _image_faults(files, verify, workers), strict=True):
        faults[place] = fault
    kept, counts = sift(rows, faults, str(table), on_bad)
    kept_files = [folder / row.image for row in kept]

    def read(positions: Sequence[int]) -> list[Record]:
        return [
            Record(kept_files[p].read_bytes(), p, kept[p].number, str(kept_files[p]))
            for p in positions
        ]

    captions = tuple(row.caption.strip() for row in kept)
    indices = np.array([row.number for row in kept], np.int32)
    return PairSource(Source(read, len(kept), captions, channels=3, size=size), indices, counts)


def load_pairs(
    path: str | os.PathLike, *, size: int | None = None, workers: int = 4, **options: Any
) -> tuple[Pairs, Mapping[str, int]]:
    """The pairs of a table as arrays, in its order.

    Args:
        path: as for `pair_source`.
        size: as for `pair_source`.
        workers: threads that verify and decode.
        options: root, image_column, caption_column, on_bad, phrases, seed and
            quoted of `pair_source`.

    Returns:
        The pairs, and the counts: "rows" of the table, "kept", and each of `FAULTS`.

    Raises:
        ValueError, FileNotFoundError: as for `pair_source`; or the arrays would not fit.
    """
    pairs = pair_source(path, size=size, workers=workers, **options)
    loaded = to_memory(pairs.source, workers)
    return Pairs(loaded.images, pairs.captions, loaded.indices), pairs.counts


def _image_faults(files: Sequence[Path], verify: bool, workers: int) -> Iterator[str]:
    def fault(file: Path) -> str:
        try:
            if not verify:
                return "" if file.is_file() else "image missing"
            encoded = file.read_bytes()
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return "image missing"
        return "" if is_readable(encoded) else "image corrupt"

    with decoding_pool(workers) as pool, tqdm(total=len(files), disable=None, delay=1) as bar:
        for first in range(0, len(files), _CHECKED_AT_ONCE):
            some = files[first : first + _CHECKED_AT_ONCE]
            yield from pool.map(fault, some)
            bar.update(len(some))
