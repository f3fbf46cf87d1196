"""What can be wrong with a row of an image-text table: found, counted, and said in one line."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from jaxrobust.data.pair_tables import Row

_LOG = logging.getLogger("jaxrobust.data")
FAULTS = (
    *("row malformed", "caption missing", "caption not a text", "caption empty"),
    *("duplicate row", "image missing", "image corrupt"),
)
_NAMED = 3  # bad rows of each kind that a message names


def check_on_bad(on_bad: str) -> None:
    """Refuses anything but "skip" and "raise"."""
    if on_bad not in ("skip", "raise"):
        raise ValueError(f"on_bad must be 'skip' or 'raise', got {on_bad!r}")


def row_faults(rows: Iterable[Row]) -> list[str]:
    """What is wrong with each row's text, one of `FAULTS`, or ""; images are not looked at.

    A caption needs no letters: "2019" and "!!!" are captions. A row that repeats image and caption
    of an earlier one is a duplicate, another caption of the same image is not.
    """
    seen: set[tuple[str, str]] = set()
    faults = []
    for row in rows:
        fault = _text_fault(row)
        if not fault:
            pair = (row.image, row.caption.strip())
            fault = "duplicate row" if pair in seen else ""
            seen.add(pair)
        faults.append(fault)
    return faults


def _text_fault(row: Row) -> str:
    caption = row.caption
    if row.broken:
        return "row malformed"
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        return "caption missing"
    if not isinstance(caption, str):
        return "caption not a text"
    if not caption.strip():
        return "caption empty"
    # What tables say that were written from a missing value.
    if caption.strip().lower() in ("nan", "none", "null", "<na>"):
        return "caption missing"
    return "" if row.image else "image missing"


def sift(
    rows: Sequence[Row], faults: Sequence[str], name: str, on_bad: str
) -> tuple[list[Row], Mapping[str, int]]:
    """The good rows, after the bad ones were counted and reported in one line.

    Args:
        rows: of a table.
        faults: one of `FAULTS` or "" for each row.
        name: of the table; begins the message.
        on_bad: "skip" or "raise".

    Returns:
        The good rows and the counts.

    Raises:
        ValueError: no row is good, or one is bad and `on_bad` is "raise".
    """
    kept = [row for row, fault in zip(rows, faults, strict=True) if not fault]
    counts = Counter(faults)
    found = {fault: counts[fault] for fault in FAULTS}
    report = f"{name}: {len(kept)} of {len(rows)} pairs kept"
    for fault in (fault for fault in FAULTS if found[fault]):
        bad = [row for row, own in zip(rows, faults, strict=True) if own == fault][:_NAMED]
        places = ", ".join(f"row {r.number}" + (f" {r.image}" if r.image else "") for r in bad)
        more = ", ..." if found[fault] > len(bad) else ""
        report += f"; {fault} {found[fault]} ({places}{more})"
    if not kept or (on_bad == "raise" and len(kept) < len(rows)):
        raise ValueError(report)
    _LOG.log(logging.INFO if len(kept) == len(rows) else logging.WARNING, "%s", report)
    return kept, {"rows": len(rows), "kept": len(kept), **found}
