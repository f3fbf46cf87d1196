"""What was poisoned, and in which data: written to JSON, hashed, and checked against the data."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxrobust.data import stored_images
from jaxrobust.data.pairs import Pairs
from jaxrobust.files import atomic_write

FORMAT = 2  # in 1 the images' bytes themselves were hashed, not their digests
# Copies of one image under another class's captions; a trigger under another class's captions; a
# trigger on images of the class itself.
KINDS = ("targeted", "backdoor", "label_consistent")


@dataclasses.dataclass(frozen=True)
class Poison:
    """One attack on one class.

    Attributes:
        kind: of `KINDS`.
        target: name of the adversarial class.
        indices: ids of the m poisoned pairs.
        captions: their m captions.
        sources: m ids of the pairs that they were made of.
        trigger: `triggers.as_dict` of the trigger; None for targeted poisons.
        seed: of everything that was drawn.
        canary: planted by the defender.
    """

    kind: str
    target: str
    indices: tuple[int, ...]
    captions: tuple[str, ...]
    sources: tuple[int, ...]
    trigger: dict[str, Any] | None = None
    seed: int = 0
    canary: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        lengths = {len(self.indices), len(self.captions), len(self.sources)}
        if len(lengths) != 1:
            raise ValueError(
                "indices, captions and sources must be of one length, got "
                f"{len(self.indices)}, {len(self.captions)} and {len(self.sources)}"
            )


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All poisons of a data set.

    Attributes:
        clean: `fingerprint` of the pairs before.
        poisoned: `fingerprint` of the pairs after.
        poisons: one entry per attack and class.
    """

    clean: str
    poisoned: str
    poisons: tuple[Poison, ...]

    @property
    def sha256(self) -> str:
        """Hex digest of the content."""
        content = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The content with its digest, as JSON has it."""
        return {**self._content(), "sha256": self.sha256}

    def save(self, path: str | Path) -> None:
        """Writes the manifest, whole or not at all."""
        atomic_write(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def _content(self):
        plain = dataclasses.asdict(self)
        # As the file has it, so that a manifest and its copy from a file are equal.
        return json.loads(json.dumps({"format": FORMAT, **plain}))


def load(path: str | Path) -> Manifest:
    """Reads a manifest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, edited, or of another format.
    """
    try:
        return from_dict(json.loads(Path(path).read_text("utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a manifest: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_dict(fields: Any) -> Manifest:
    """The manifest that `Manifest.to_dict` gave.

    Raises:
        ValueError: it is of another format, or its digest is not that of its content.
    """
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    fields = dict(fields)
    del fields["format"]
    digest = fields.pop("sha256", None)
    try:
        poisons = tuple(Poison(**_as_tuples(poison)) for poison in fields.pop("poisons"))
        manifest = Manifest(poisons=poisons, **fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the manifest does not have the expected fields: {error}") from error
    if manifest.sha256 != digest:
        raise ValueError(
            f"the manifest's content has SHA-256 {manifest.sha256}, it says {digest}: it was "
            "changed after it was written"
        )
    return manifest


def _as_tuples(poison):
    return {key: tuple(v) if isinstance(v, list) else v for key, v in poison.items()}


def record(clean: Pairs, poisoned: Pairs, poisons: Collection[Poison]) -> Manifest:
    """The manifest of poisons that turn one set of pairs into another."""
    return Manifest(fingerprint(clean), fingerprint(poisoned), tuple(poisons))


def fingerprint(pairs: Pairs) -> str:
    """SHA-256 over the ids, captions and pixels of all pairs; their order does not count.

    Raises:
        ValueError: an id occurs twice.
    """
    indices = np.asarray(pairs.indices, np.int64)
    order = np.argsort(indices, kind="stable")
    twice = indices[order][1:] == indices[order][:-1]
    if twice.any():
        raise ValueError(
            f"indices must be unique, got {indices[order][1:][twice][0]} more than once"
        )
    images = stored_images.digests(pairs.images)
    digest = hashlib.sha256(f"{pairs.images.dtype.str}{pairs.images.shape[1:]}".encode())
    for row in order:
        caption = pairs.captions[row].encode("utf-8", "surrogatepass")
        digest.update(f"{indices[row]} {len(caption)} ".encode())
        digest.update(caption)
        digest.update(images[row])
    return digest.hexdigest()


def check(manifest: Manifest, pairs: Pairs, *, clean: bool = False) -> None:
    """Refuses pairs that a manifest does not belong to.

    Args:
        manifest: what was poisoned.
        pairs: the whole poisoned set, in any order.
        clean: the pairs are those before the poisoning.

    Raises:
        ValueError: they are other pairs, or differ in an id, a caption or a pixel.
    """
    names = ("clean", "poisoned") if clean else ("poisoned", "clean")
    expected, other = (getattr(manifest, name) for name in names)
    found = fingerprint(pairs)
    if found == expected:
        return
    reason = f"these are the {names[1]} ones" if found == other else f"these have {found}"
    raise ValueError(
        f"the manifest does not belong to these {len(pairs.captions)} pairs: the {names[0]} pairs "
        f"that it was made for have SHA-256 {expected}, {reason}"
    )


def join(*manifests: Manifest) -> Manifest:
    """One manifest of attacks that were made one after the other.

    Args:
        manifests: at least one, in the order of the attacks.

    Raises:
        ValueError: none, or one was not made on the outcome of the one before.
    """
    if not manifests:
        raise ValueError("manifests must be at least one, got none")
    for number, (before, after) in enumerate(itertools.pairwise(manifests)):
        if before.poisoned != after.clean:
            raise ValueError(
                f"manifest {number + 1} was made for pairs with SHA-256 {after.clean}, the one "
                f"before it left {before.poisoned}"
            )
    poisons = tuple(poison for manifest in manifests for poison in manifest.poisons)
    return Manifest(manifests[0].clean, manifests[-1].poisoned, poisons)


def poisoned(
    manifest: Manifest,
    indices: Int[np.ndarray, "n"],
    *,
    kinds: Collection[str] = KINDS,
    canary: bool | None = None,
) -> Bool[np.ndarray, "n"]:
    """Which rows are poisoned.

    Args:
        manifest: what was poisoned.
        indices: [n] ids, `Pairs.indices`, in any order and number.
        kinds: which kinds count.
        canary: only the canaries, or only what is none; None has both.

    Returns:
        [n] bool.

    Raises:
        ValueError: another kind.
    """
    if not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be among {KINDS}, got {tuple(kinds)}")
    chosen = [
        index
        for poison in manifest.poisons
        if poison.kind in kinds and canary in (None, poison.canary)
        for index in poison.indices
    ]
    return np.isin(np.asarray(indices), np.array(chosen, np.int64))
