"""Random variants of captions by EDA: swap, deletion, and with a dictionary also synonyms.

found = text_views(captions, views=2, seed=0)
first, second = zip(*found.variants)
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

_LOG = logging.getLogger("jaxrobust.data")
Synonyms = Mapping[str, Sequence[str]]
_INSERT_TRIES = 10  # as EDA's code, before it gives up on finding a word with synonyms
_UNCHANGED = ("caption empty", "no letters", "one word")
_WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")


class TextViews(NamedTuple):
    """Variants of captions.

    Attributes:
        variants: for each caption its variants.
        counts: how many captions were kept as they are and why: "caption empty", "no letters",
            "one word"; and "captions", all of them.
    """

    variants: tuple[tuple[str, ...], ...]
    counts: Mapping[str, int]


def text_views(
    captions: Sequence[str],
    views: int = 2,
    *,
    seed: int,
    rate: float = 0.1,
    synonyms: Synonyms | None = None,
    indices: Sequence[int] | Int[np.ndarray, "n"] | None = None,
    lower: bool = False,
    letters_only: bool = False,
) -> TextViews:
    """Variants of each caption: one of EDA's operations, chosen at random, is applied once.

    Swap exchanges two words and deletion drops each word with probability `rate`; with a dictionary
    replacement changes words to synonyms and insertion adds synonyms of words at random places.
    Swap, replacement and insertion make max(1, floor(rate * words)) edits. Variant v of a caption
    is a function of (seed, index, v) and its text alone.

    Args:
        captions: n texts; words are what white space separates.
        views: variants per caption, >= 1.
        seed: of the run, >= 0.
        rate: share of words that are edited, in [0, 1]; 0.1 in SafeCLIP.
        synonyms: word in lower case -> its synonyms; None leaves out replacement and insertion.
        indices: [n] ids >= 0 that stay with the captions; None is their places.
        lower: put captions and so variants into lower case.
        letters_only: keep only letters a to z and spaces, in lower case, as EDA's code does; a
            caption of which nothing would be left is kept as it is.

    Returns:
        The variants, and counts of captions that were kept as they are, lower case apart, because
        they are empty, have no letter of any script, or are one word.

    Raises:
        ValueError: views, seed or rate is out of its range, or indices differ from captions in
            number or are negative.

    Source: Wei and Zou 2019, section 2; one operation per variant as in SafeCLIP's public code.
    """
    for name, value, least in (("views", views, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2^32, got {seed}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    ids = np.arange(len(captions)) if indices is None else np.asarray(indices)
    if len(ids) != len(captions) or (len(ids) and ids.min() < 0):
        raise ValueError(
            f"indices must be {len(captions)} ids >= 0, one per caption, got {len(ids)}"
            + (f" from {ids.min()} on" if len(ids) else "")
        )
    counts = {"captions": len(captions), **dict.fromkeys(_UNCHANGED, 0)}
    variants = []
    for number, caption in zip(ids, captions, strict=True):
        text, reason = _prepared(caption, lower, letters_only)
        if reason:
            counts[reason] += 1
            variants.append((text,) * views)
            continue
        words = text.split()
        randoms = (np.random.RandomState([seed, int(number), view]) for view in range(views))
        variants.append(tuple(" ".join(_variant(words, r, rate, synonyms)) for r in randoms))
    kept = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    _LOG.info("text views: %s; what is empty, without letters or one word is kept as it is", kept)
    return TextViews(tuple(variants), counts)


def _prepared(caption: str, lower: bool, letters_only: bool) -> tuple[str, str]:
    """The text that variants are made of, and why there are none, or ""."""
    if not caption.strip():
        return caption, "caption empty"
    text = caption.lower() if lower or letters_only else caption
    if letters_only:
        # EDA: apostrophes vanish, what else is no letter parts words.
        text = " ".join(re.sub("[^a-z ]", " ", re.sub("['\u2019]", "", text)).split())
    if not any(letter.isalpha() for letter in text):
        return caption, "no letters"
    return text, "" if len(text.split()) > 1 else "one word"


def _variant(
    words: list[str], random: np.random.RandomState, rate: float, synonyms: Synonyms | None
) -> list[str]:
    edits = max(1, int(rate * len(words))) if rate else 0
    operation = random.randint(2 if synonyms is None else 4)
    if operation == 0:
        return _swapped(words, random, edits)
    if operation == 1:
        return _thinned(words, random, rate)
    change = _replaced if operation == 2 else _enlarged
    return change(words, random, edits, synonyms)


def _swapped(words: list[str], random: np.random.RandomState, edits: int) -> list[str]:
    words = list(words)
    for _ in range(edits):
        first = random.randint(len(words))
        second = (first + 1 + random.randint(len(words) - 1)) % len(words)
        words[first], words[second] = words[second], words[first]
    return words


def _thinned(words: list[str], random: np.random.RandomState, rate: float) -> list[str]:
    stays = random.random_sample(len(words)) >= rate
    left = [word for word, stay in zip(words, stays, strict=True) if stay]
    return left or [words[random.randint(len(words))]]


def _synonym(word: str, random: np.random.RandomState, synonyms: Synonyms) -> str | None:
    """A synonym other than the word itself, punctuation around it kept; None if there is none."""
    core = re.sub(r"^\W+|\W+$", "", word)
    others = [one for one in synonyms.get(core.lower(), ()) if one.lower() != core.lower()]
    if not core or not others:
        return None
    return word.replace(core, others[random.randint(len(others))], 1)


def _replaced(
    words: list[str], random: np.random.RandomState, edits: int, synonyms: Synonyms
) -> list[str]:
    words, done = list(words), 0
    for place in random.permutation(len(words)):
        found = _synonym(words[place], random, synonyms) if done < edits else None
        if found is not None:
            words[place] = found
            done += 1
    return words


def _enlarged(
    words: list[str], random: np.random.RandomState, edits: int, synonyms: Synonyms
) -> list[str]:
    words = list(words)
    for _ in range(edits):
        for _ in range(_INSERT_TRIES):
            found = _synonym(words[random.randint(len(words))], random, synonyms)
            if found is not None:
                words.insert(random.randint(len(words) + 1), found)
                break
    return words


def wordnet_synonyms(folder: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """The synonyms that WordNet's data files give: words that share a sense.

    Args:
        folder: holds data.noun, data.verb, data.adj and data.adv (Debian's wordnet-base puts them
            into /usr/share/wordnet).

    Returns:
        Word -> synonyms, sorted, in lower case and with spaces; words without any are left out.

    Raises:
        FileNotFoundError: one of the files is not there.
    """
    found: dict[str, set[str]] = {}
    for name in _WORDNET_FILES:
        path = Path(folder) / name
        if not path.is_file():
            raise FileNotFoundError(f"folder must hold {', '.join(_WORDNET_FILES)}; no {path}")
        for line in path.read_text("utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            # offset, file, type, number of words in hexadecimal, then word and sense in turns
            fields = line.split(" ")
            count = int(fields[3], 16)
            words = {re.sub(r"\(\w+\)$", "", one) for one in fields[4 : 4 + 2 * count : 2]}
            words = {word.replace("_", " ").lower() for word in words}
            for word in words:
                found.setdefault(word, set()).update(words - {word})
    return {word: tuple(sorted(others)) for word, others in found.items() if others}
