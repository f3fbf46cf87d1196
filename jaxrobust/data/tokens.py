"""Captions to token ids: byte-level BPE trained on captions, or CLIP's own vocabulary.

    tokenizer = bpe_tokenizer(captions, vocabulary=2048, length=32)
    tokens = tokenizer(["a red apple", "🍎", ""])        # [3, 32] int32, padded with 0

Every row is start, text, end, zeros. A text that is too long loses its last tokens, never its end:
CLIP reads a text there. Bytes are the alphabet, so that any script, an emoji or nothing at all is a
text; and what a caption says is never taken for a control token, since captions may be an
attacker's.
"""

import dataclasses
import functools
import gzip
import html
import json
import os
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxrobust.data.packages import require
from jaxrobust.files import atomic_write

START, END = "<|startoftext|>", "<|endoftext|>"
BYTES = 256
_FORMAT = "jaxrobust.tokenizer/1"
_CLIP_MERGES = 49_152 - 2 * BYTES - 2 + BYTES  # lines of its file that CLIP uses: 48,894
_NOT_BPE_FILE = (OSError, EOFError, zlib.error, UnicodeDecodeError)
# How CLIP cuts a text into words, after lower-casing (its clip/simple_tokenizer.py).
_CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

_CONTROL = (*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF)
_LIGATURES = (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07))
_PLAIN = {
    **{0xFF01 + i: 0x21 + i for i in range(94)},  # full width
    **dict.fromkeys(_CONTROL),
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u02bc"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in _LIGATURES},
    0x149: "'n",
    0xFB05: "\u017ft",  # NFKC would shorten its long s
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Captions to ids, as a value: equal definitions are equal tokenizers.

    Attributes:
        definition: JSON of the package `tokenizers`.
        length: of a row, its start and its end included.
        start: id before every text.
        end: id behind every text; the largest of all, so that `argmax` finds it.
    """

    definition: str
    length: int
    start: int
    end: int

    def __post_init__(self) -> None:
        _check_length(self.length)

    @property
    def vocabulary(self) -> int:
        """Number of ids, which a text encoder must have."""
        return max(self.start, self.end) + 1

    def __call__(self, captions: Iterable[Any]) -> Int32[np.ndarray, "n length"]:
        """Ids of captions.

        Args:
            captions: texts, cleaned here: character references resolved, composed (NFC),
                lower-cased, every run of white space one space.

        Returns:
            [n, length] int32: start, ids, end, and 0 behind it.

        Raises:
            ValueError: captions is one string, or holds something else than strings.
        """
        built = _built(self.definition)
        cleaned = [clean(caption) for caption in _strings(captions)]
        rows = np.zeros((len(cleaned), self.length), np.int32)
        for row, found in zip(
            rows, built.encode_batch(cleaned, add_special_tokens=False), strict=True
        ):
            ids = [self.start, *found.ids[: self.length - 2], self.end]
            row[: len(ids)] = ids
        return rows

    def save(self, path: str | os.PathLike) -> None:
        """Write one JSON file, whole or not at all."""
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        content["definition"] = json.loads(self.definition)
        atomic_write(path, json.dumps(content, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or no tokenizer of this package.
        """
        content = _read_json(path)
        if content.pop("format", None) != _FORMAT:
            raise ValueError(f"{path}: no tokenizer that `Tokenizer.save` wrote")
        try:
            content["definition"] = _canonical(json.dumps(content["definition"]))
            loaded = cls(**content)
            for name in ("length", "start", "end"):
                if type(content[name]) is not int:
                    raise TypeError(f"{name} must be a whole number, got {content[name]!r}")
            _built(loaded.definition)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: a damaged tokenizer: {error}") from error
        return loaded


def bpe_tokenizer(
    captions: Iterable[Any], *, vocabulary: int = 4096, length: int = 77
) -> Tokenizer:
    """Byte-level byte-pair encoding, trained on captions.

    Equal captions, in any order, give an equal tokenizer. Id 0 is padding and stands for nothing
    else; start and end are the last two ids.

    Args:
        captions: texts to learn from; those that will be trained on, never test captions.
        vocabulary: number of ids at most, >= 259: padding, 256 bytes, start and end are always
            there; fewer if the captions have no more pairs that occur twice.
        length: of a row, >= 3.

    Returns:
        The tokenizer; its `vocabulary` is the number of ids it really has.

    Raises:
        ImportError: the package tokenizers is not installed.
        ValueError: captions is one string or holds something else than strings, or a number is out
            of its range.

    Source: Sennrich et al. 2016; on bytes, Radford et al. 2019, section 2.2.
    """
    if vocabulary < BYTES + 3:
        raise ValueError(f"vocabulary must be >= {BYTES + 3}, got {vocabulary}")
    _check_length(length)
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        special_tokens=["<|padding|>"],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([clean(caption) for caption in _strings(captions)], trainer)
    size = tokenizer.get_vocab_size()
    return Tokenizer(_canonical(tokenizer.to_str()), length, start=size, end=size + 1)


def clip_tokenizer(path: str | os.PathLike, *, length: int = 77) -> Tokenizer:
    """CLIP's own tokenizer, from the file that holds its vocabulary.

    Cleaning is CLIP's but for the mending of texts that were decoded by the wrong code page (the
    package ftfy).

    Args:
        path: OpenAI's "bpe_simple_vocab_16e6.txt.gz", or a "tokenizer.json" as Hugging Face's
            CLIP models have.
        length: of a row, >= 3.

    Returns:
        The tokenizer; 49,408 ids for CLIP's published vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package tokenizers is not installed.
        ValueError: the file is damaged or of neither layout.
    """
    _check_length(length)
    if Path(path).suffix == ".json":
        return _from_json(path, length)
    merges = _read_merges(path)
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    package = _package()
    try:
        ids = {word: place for place, word in enumerate(words)}
        model = package.models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>")
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"{path}: {error}") from error
    tokenizer = package.Tokenizer(model)
    cut = package.pre_tokenizers.Split(package.Regex(_CLIP_WORDS), "removed", invert=True)
    by_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = package.pre_tokenizers.Sequence([cut, by_bytes])
    size = len(words)
    return Tokenizer(_canonical(tokenizer.to_str()), length, start=size, end=size + 1)


def clean(caption: str) -> str:
    """A caption as tokenizers see it: references resolved, composed (NFC), lower case, one space.

    Character references are resolved twice, as CLIP does ("&amp;lt;" is found in web captions).
    Curly quotes, ligatures and full-width letters become plain ones and control characters go, as
    by ftfy, which CLIP applies. Halves of a character that JSON may hold, and UTF-8 may not,
    become "?".
    """
    caption = html.unescape(html.unescape(caption)).encode("utf-8", "replace").decode()
    caption = unicodedata.normalize("NFC", caption.translate(_PLAIN))
    return " ".join(caption.split()).lower()


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in byte-level vocabularies, in CLIP's order of ids.

    Printable bytes stand for themselves; the others follow from U+0100 on.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(BYTES - len(shown))]


def _from_json(path: str | os.PathLike, length: int) -> Tokenizer:
    """A Hugging Face tokenizer.json of CLIP's kind, without its own padding and cutting."""
    package, content = _package(), json.dumps(_read_json(path))
    try:
        tokenizer = package.Tokenizer.from_str(content)
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"{path}: no tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    start, end = (tokenizer.token_to_id(name) for name in (START, END))
    if start is None or end is None:
        raise ValueError(f"{path}: has no {START} and {END}, which CLIP's has")
    if end != tokenizer.get_vocab_size() - 1:
        raise ValueError(f"{path}: {END} must be the last of the ids, got {end}")
    return Tokenizer(_canonical(tokenizer.to_str()), length, start, end)


def _read_merges(path: str | os.PathLike) -> list[tuple[str, str]]:
    """Pairs of a file of merges, gzipped or plain; its first line is a comment."""
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except FileNotFoundError:
        raise
    except _NOT_BPE_FILE as error:
        raise ValueError(f"{path}: no gzipped text of merges: {error}") from error
    lines = text.split("\n")[1 : _CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines if line.strip()]
    wrong = next((pair for pair in merges if len(pair) != 2), None)
    if wrong is not None or not merges:
        raise ValueError(f"{path}: no list of merges, two words a line; got {wrong}")
    return merges


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold one JSON object, got {type(content).__name__}")
    return content


def _package() -> Any:
    return require("tokenizers", "tokenizers", "a caption's tokenizer")


@functools.lru_cache(maxsize=8)
def _built(definition: str) -> Any:
    """The package's own object; control tokens within a text are text."""
    try:
        tokenizer = _package().Tokenizer.from_str(definition)
    except ImportError:
        raise
    except Exception as error:  # the package raises Exception itself
        raise ValueError(str(error)) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _canonical(definition: str) -> str:
    return json.dumps(json.loads(definition), ensure_ascii=False, separators=(",", ":"))


def _strings(captions: Iterable[Any]) -> list[str]:
    if isinstance(captions, str):
        raise ValueError(f"captions must be a sequence of strings, got the string {captions!r}")
    captions = list(captions)
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"captions[{row}] must be a string, got {caption!r}")
    return captions


def _check_length(length: int) -> None:
    if not isinstance(length, int) or length < 3:
        raise ValueError(f"length must be an integer >= 3, got {length!r}")
