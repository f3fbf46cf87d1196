"""What a data set is: arrays in memory (Dataset) or records decoded when asked for (Source)."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxrobust.data.decoding import decoded_or_none, decoding_pool, stored_shape

# Labels of a set without class names beyond this are ids of something else.
_MOST_CLASSES = 10**6
# Records by which a set on disk is told from another: reading all may take an hour.
_SAMPLED = 16


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A whole split in memory; `dataset[:16]` are its first examples, `dataset[0]` the first one.

    Attributes:
        images: [n, h, w, c] float32 in [0, 1].
        labels: [n] int32 in [0, len(class_names)).
        indices: [n] int32, an id that stays with the example whatever the split or order.
        class_names: one name per class, in the order of the labels.
        salience: [n, h, w, 1] float32 in [0, 1], 1 where the depicted thing is; None without maps.
            (An attack's `mask` is the opposite, 1 where a pixel may change.)
    """

    images: Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]
    indices: Int[np.ndarray, "n"]
    class_names: tuple[str, ...]
    salience: Float[np.ndarray, "n h w 1"] | None = None

    @classmethod
    def of(cls, images: Any, labels: Any, class_names: Sequence[str] | None = None) -> "Dataset":
        """A data set of one's own arrays, checked; an example's index is its row.

        Args:
            images: [n, h, w, c] float in [0, 1].
            labels: [n] whole numbers, from 0.
            class_names: one per class; None calls them "0", "1", ...

        Raises:
            TypeError, ValueError: as `check_dataset`; or there are more classes than 10^6, and
                no names for them.
        """
        labels = np.asarray(labels)
        if class_names is None:
            class_names = map(str, range(_classes_of(labels)))
        rows = np.arange(len(labels), dtype=np.int32)
        dataset = cls(np.asarray(images), labels, rows, tuple(class_names))
        check_dataset(dataset)
        images, labels = np.asarray(images, np.float32), np.asarray(labels, np.int32)
        return dataset.replace(images=images, labels=labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> Any:
        """One example as a dict, as of a `Source`; or the examples of a slice or an index array."""
        if not isinstance(rows, int | np.integer):
            return self.take(rows)
        one = {"image": self.images[rows], "label": self.labels[rows], "index": self.indices[rows]}
        return one if self.salience is None else {**one, "salience": self.salience[rows]}

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        salience = "" if self.salience is None else ", with salience"
        return f"Dataset({len(self)} images {shape}, {len(self.class_names)} classes{salience})"

    def replace(self, **columns: Any) -> "Dataset":
        """The same data set with other columns."""
        return dataclasses.replace(self, **columns)

    def take(self, rows: Any) -> "Dataset":
        """The examples at `rows`, a slice or an index array, with everything that is theirs."""
        return self.replace(
            images=self.images[rows],
            labels=self.labels[rows],
            indices=self.indices[rows],
            salience=None if self.salience is None else self.salience[rows],
        )


def _classes_of(labels):
    """How many classes labels without names have."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be whole numbers, got {labels.dtype}")
    most = int(labels.max(initial=0))
    if most >= _MOST_CLASSES:
        raise ValueError(f"labels must be numbers of classes or come with class_names, got {most}")
    return most + 1


def check_images(images: Any, bounds: tuple[float, float] | None = (0.0, 1.0)) -> np.ndarray:
    """Images as an array, or an error where they are not n >= 1 float images in their box.

    Args:
        images: [n, h, w, c].
        bounds: the box; None for none.

    Raises:
        TypeError: no array, or not floating point.
        ValueError: not [n, h, w, c], none, a NaN, or values outside the box by more than rounding.
    """
    try:
        images = np.asarray(images)
    except ValueError as error:  # of unequal shapes, as are the fields of a data set
        found = type(images).__name__
        raise TypeError(f"images must be an array [n, h, w, c], got {found}") from error
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be [n, h, w, c] with n >= 1, got shape {images.shape}")
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}")
    least, most = (-np.inf, np.inf) if bounds is None else bounds
    low, high = float(images.min()), float(images.max())
    if not (low >= least - 1e-6 and high <= most + 1e-6):
        raise ValueError(
            f"images must lie in [{least:g}, {most:g}], got values from {low:g} to {high:g}"
        )
    return images


def check_dataset(dataset: Dataset) -> None:
    """Refuses a data set whose columns do not fit together.

    Args:
        dataset: any.

    Raises:
        TypeError: images are no floats, or labels or indices no whole numbers.
        ValueError: images as of `check_images`, columns of unequal length, labels that name no
            class, or salience maps of other images or outside [0, 1].
    """
    images = check_images(dataset.images)
    for name in ("labels", "indices"):
        column = np.asarray(getattr(dataset, name))
        if column.shape != (len(images),):
            raise ValueError(f"{name} must be [{len(images)}], got shape {column.shape}")
        if not np.issubdtype(column.dtype, np.integer):
            raise TypeError(f"{name} must be whole numbers, got {column.dtype}")
    low, high = int(np.min(dataset.labels)), int(np.max(dataset.labels))
    if low < 0 or high >= len(dataset.class_names):
        raise ValueError(
            f"labels must lie in [0, {len(dataset.class_names)}), the classes that have a name, "
            f"got {low} to {high}"
        )
    if dataset.salience is None:
        return
    maps = np.asarray(dataset.salience)
    if maps.shape != (*images.shape[:3], 1):
        raise ValueError(f"salience must be {(*images.shape[:3], 1)}, got shape {maps.shape}")
    if not (maps.min() >= 0 and maps.max() <= 1):
        raise ValueError(f"salience must lie in [0, 1], got {maps.min()} to {maps.max()}")


class Examples(NamedTuple):
    """Some decoded examples of a `Source`; the fields are those of `Dataset`."""

    images: Float[np.ndarray, "b h w c"]
    labels: Int[np.ndarray, "b"]
    indices: Int[np.ndarray, "b"]
    salience: Float[np.ndarray, "b h w 1"] | None


class Record(NamedTuple):
    """One stored example: encoded image bytes and what belongs to them."""

    encoded: bytes
    label: int
    index: int
    origin: str
    salience: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A split on disk with random access; images are decoded when they are asked for.

    Attributes:
        read: positions in [0, count) -> records, in the same order.
        count: number of examples.
        class_names: one name per class, in the order of the labels.
        channels: 1 or 3, of the decoded images.
        size: side in pixels of the decoded square images; None keeps each image as it is.
        levels: stored value of a fully bright pixel (255; 16 for the 8x8 digits).
    """

    read: Callable[[Sequence[int]], list[Record]]
    count: int
    class_names: tuple[str, ...]
    channels: int = 3
    size: int | None = None
    levels: int = 255

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        if not -self.count <= position < self.count:
            raise IndexError(f"position must be below {self.count}, got {position}")
        examples = self.take([position % self.count])
        one = {"image": examples.images, "label": examples.labels, "index": examples.indices}
        if examples.salience is not None:
            one["salience"] = examples.salience
        return {name: column[0] for name, column in one.items()}

    def take(
        self, positions: Sequence[int] | Int[np.ndarray, "b"], pool: Executor | None = None
    ) -> Examples:
        """The examples at `positions`, decoded by `pool`'s threads.

        Args:
            positions: b places in [0, len(self)).
            pool: where to decode large images; None decodes in the calling thread.

        Returns:
            Images, labels, indices and, where the records have them, salience maps that were
            resized and cropped with their images.

        Raises:
            ValueError: an image or a map cannot be read, the images differ in shape and `size` is
                None, or a map has another size than its image.
        """
        records = self.read([int(position) for position in positions])
        # Below some 16 kB handing an image to a thread costs more than decoding it.
        threads = pool is not None and sum(len(r.encoded) for r in records) > 2**14 * len(records)
        apply = pool.map if threads else map
        images = _stack(apply(self._decode, records), records)
        images /= np.float32(self.levels)
        salience = None
        if records[0].salience is not None:
            salience = _stack(apply(self._decode_salience, records), records, "salience maps")
            salience /= np.float32(255)
        labels = np.array([record.label for record in records], np.int32)
        indices = np.array([record.index for record in records], np.int32)
        return Examples(images, labels, indices, salience)

    def fingerprint(self, among: Int[np.ndarray, "k"] | None = None) -> str:
        """What tells the set from another, in hexadecimal: how it is read, and some records.

        Args:
            among: positions of the records that matter, in any order; None for all.
        """
        read_as = (self.count, self.channels, self.size, self.levels)
        found = hashlib.sha256(repr(read_as).encode())
        for name in self.class_names:  # Of pairs these are all captions.
            found.update(repr(name).encode())
        among = np.arange(self.count) if among is None else np.unique(among)
        some = np.linspace(0, len(among) - 1, min(_SAMPLED, len(among))).astype(int)
        for record in self.read([int(position) for position in among[some]]):
            # Not the salience, which `training.fit` does not compare.
            found.update(f"{record.label} {record.index} {len(record.encoded)} ".encode())
            found.update(record.encoded)
        return found.hexdigest()

    def _decode(self, record: Record) -> np.ndarray | None:
        return decoded_or_none(record.encoded, self.channels, self.size, self.levels)

    def _decode_salience(self, record: Record) -> UInt8[np.ndarray, "h w 1"] | None:
        # Before any resizing, after which a map of another shape would be displaced unnoticed.
        shape, expected = stored_shape(record.salience), stored_shape(record.encoded)
        if shape != expected:
            raise ValueError(
                f"the salience map of {record.origin} must have its image's size {expected}, "
                f"got {shape}"
            )
        return decoded_or_none(record.salience, 1, self.size)


def _stack(
    decoded: Iterator[np.ndarray | None], records: list[Record], what: str = "images"
) -> Float[np.ndarray, "b h w c"]:
    """Puts images into one float32 array as they come, so that no second copy is alive."""
    stacked, unreadable = None, []
    for row, (image, record) in enumerate(zip(decoded, records, strict=True)):
        if image is None:
            unreadable.append(record.origin)
            continue
        if stacked is None:
            stacked = np.empty((len(records), *image.shape), np.float32)
        if image.shape != stacked.shape[1:]:
            raise ValueError(
                f"{what} differ in shape: {record.origin} is {image.shape}, those before it "
                f"{stacked.shape[1:]}; give size= to resize and crop them"
            )
        stacked[row] = image
    if unreadable:
        raise ValueError(
            f"cannot read {len(unreadable)} of {len(records)} {what}: {', '.join(unreadable)}"
        )
    if stacked is None:
        raise ValueError("positions must name at least one example, got none")
    return stacked


def to_memory(source: Source, workers: int = 4) -> Dataset:
    """Decodes a whole source into arrays.

    Args:
        source: what to read.
        workers: decoding threads.

    Returns:
        The data set, in the source's order.

    Raises:
        ValueError: the arrays would take more than half of the machine's memory.
    """
    first = source[0]
    shape = first["image"].shape
    pixels = first["image"].size + (first["salience"].size if "salience" in first else 0)
    needed, most = 4 * len(source) * pixels, eager_limit()
    if needed > most:
        raise ValueError(
            f"{len(source)} images of {shape} take {needed / 1024**3:.1f} GiB as float32, more "
            f"than half of the memory, {most / 1024**3:.1f}: use jaxrobust.data.source, whose "
            "batches are decoded as they are needed, or a slice such as split='train[:10%]'"
        )
    with decoding_pool(workers) as pool:
        images, labels, indices, salience = source.take(range(len(source)), pool)
    return Dataset(images, labels, indices, source.class_names, salience)


def eager_limit() -> int:
    """Bytes that arrays of a whole split may take: half of the memory, or 4 GiB if nobody tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):  # Windows
        return 4 * 1024**3
