"""Image-text tables row by row: TSV, CSV, JSON lines, JSON records and Visual Genome's regions."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IMAGE_COLUMNS = ("image", "image_path", "filepath", "path", "file_name", "filename", "file")
CAPTION_COLUMNS = ("caption", "title", "text", "sentence", "captions")
_DELIMITERS = {".tsv": "\t", ".csv": ","}
_LINES, _JSON = (".jsonl", ".ndjson"), ".json"
_VISUAL_GENOME_FOLDERS = ("", "VG_100K", "VG_100K_2")


class Row(NamedTuple):
    """One row of a table as it was found.

    Attributes:
        number: its place in the table, from 0, a heading not counted.
        image: path of its image, relative or not; None if it has none.
        caption: what stands where the caption should; anything that JSON can hold.
        broken: the row itself could not be read.
    """

    number: int
    image: str | None
    caption: Any
    broken: bool = False


def read_rows(
    path: Path,
    root: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    phrases: int = 5,
    seed: int = 0,
    quoted: bool = True,
) -> Iterator[Row]:
    """The rows of a table, good and bad alike.

    Args:
        path: .tsv or .csv with a heading, .jsonl or .ndjson, or .json: a list of records, or Visual
            Genome's region_descriptions.json.
        root: where image paths begin; Visual Genome's pictures are looked for in it.
        image_column: name of the image path's column; None takes the usual names.
        caption_column: name of the caption's column; None takes the usual names.
        phrases: of Visual Genome, how many of a picture's region phrases make its caption, >= 1.
        seed: of Visual Genome, which phrases.
        quoted: of .tsv and .csv: a cell in double quotes may hold delimiters and line ends; False
            takes quotes for letters.

    Returns:
        Iterator over all rows in their order.

    Raises:
        ValueError: a file of another kind, a column is not there, or broken quotes.
    """
    columns = (image_column, caption_column)
    kind = path.suffix.lower()
    if kind in _DELIMITERS:
        return _table_rows(path, _DELIMITERS[kind], columns, quoted)
    if kind in _LINES:
        with open(path, encoding="utf-8-sig") as file:
            return _record_rows([_parsed(line) for line in file if line.strip()], path, columns)
    if kind != _JSON:
        known = ", ".join((*_DELIMITERS, *_LINES, _JSON))
        raise ValueError(f"path must end in one of {known}, got {path}")
    records = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of records, got a {type(records).__name__}")
    if records and isinstance(records[0], dict) and "regions" in records[0]:
        return _region_rows(records, root, phrases, seed)
    return _record_rows(records, path, columns)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _column(path: Path, found: Iterable[str], asked: str | None, usual: tuple, what: str) -> str:
    """The name of a column: the one asked for, or the first usual one that is there."""
    found = list(found)
    names = usual if asked is None else (asked,)
    lowered = {str(name).strip().lower(): name for name in reversed(found)}
    for name in names:
        if name in found:
            return name
        if asked is None and name in lowered:
            return lowered[name]
    raise ValueError(
        f"{path} has no {what} column {' or '.join(map(repr, names))}, only {found}: "
        f"give {what}_column="
    )


def _table_rows(path: Path, delimiter: str, columns: tuple, quoted: bool) -> Iterator[Row]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    with open(path, encoding="utf-8-sig", newline="") as file:
        # Strict, since a lone quote would else swallow the rows up to the next one unnoticed.
        table = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            heading = next(table, [])
            image, caption = (
                heading.index(_column(path, heading, asked, usual, what))
                for asked, usual, what in zip(
                    columns, (IMAGE_COLUMNS, CAPTION_COLUMNS), ("image", "caption"), strict=True
                )
            )
            for number, cells in enumerate(cells for cells in table if cells):
                if len(cells) == len(heading):
                    yield Row(number, cells[image].strip(), cells[caption])
                else:
                    yield Row(number, None, None, broken=True)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {table.line_num}: {error}; give quoted=False if quotes stand for "
                "themselves"
            ) from error


def _record_rows(records: list, path: Path, columns: tuple) -> Iterator[Row]:
    fields = {str(name): None for one in records if isinstance(one, dict) for name in one}
    image = _column(path, fields, columns[0], IMAGE_COLUMNS, "image")
    caption = _column(path, fields, columns[1], CAPTION_COLUMNS, "caption")
    for number, record in enumerate(records):
        if isinstance(record, dict):
            name = record.get(image)
            yield Row(number, name if isinstance(name, str) else None, record.get(caption))
        else:
            yield Row(number, None, None, broken=True)


def _region_rows(records: list, root: Path, phrases: int, seed: int) -> Iterator[Row]:
    """Visual Genome: a picture's caption is some of its region phrases, joined by "; "."""
    for number, record in enumerate(records):
        record = record if isinstance(record, dict) else {}
        regions = record.get("regions") or []
        sound = isinstance(regions, list) and all(isinstance(one, dict) for one in regions)
        identity = record.get("id", regions[0].get("image_id") if sound and regions else None)
        if not (sound and isinstance(identity, int) and 0 <= identity < 2**32):
            yield Row(number, None, None, broken=True)
            continue
        names = [str(Path(folder) / f"{identity}.jpg") for folder in _VISUAL_GENOME_FOLDERS]
        place = next((name for name in names if (root / name).is_file()), names[0])
        texts = (str(region.get("phrase") or "").strip() for region in regions)
        distinct = list(dict.fromkeys(text for text in texts if text))
        random = np.random.RandomState([seed, identity])
        chosen = sorted(random.permutation(len(distinct))[:phrases])
        yield Row(number, place, "; ".join(distinct[i] for i in chosen) if distinct else None)
