"""Which setting of SAFECLIP the canaries speak for; no label of an attack is looked at."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from experiments.safeclip_settings import CANARIES, CHOSEN

KINDS = ("targeted", "backdoor")


def chosen(cells: Collection[dict], candidates: Collection[str], limit: float) -> str | None:
    """The candidate that canaries speak for: the most useful of those that stop them.

    Those count whose success on canaries, targeted and triggered, is within the limit or within
    what unpoisoned networks err by; without one, the candidate that lets by the least. Useful is
    the mean of zero-shot accuracy and retrieval on the validation pictures.

    Args:
        cells: of the results file.
        candidates: names that may be chosen.
        limit: success in [0, 1] that a setting may leave.

    Returns:
        None as long as no candidate has met the canaries.
    """
    met = on_canaries(cells, candidates)
    allowed = bars(met, limit)
    worst = {name: excess(metrics, allowed) for name, metrics in met.items()}
    stopping = [name for name in met if worst[name] <= 0]
    if stopping:
        return max(stopping, key=lambda name: usefulness(met[name]))
    return min(met, key=worst.get, default=None)


def stale(cells: Collection[dict], candidates: Collection[str], limit: float) -> set[str]:
    """Settings of recommended rows that canaries do not, or no longer, speak for."""
    settings = {c["metrics"]["setting"] for c in cells if c["key"]["method"] == CHOSEN}
    return settings - {chosen(cells, candidates, limit)}


def on_canaries(cells: Collection[dict], candidates: Collection[str]) -> dict[str, dict]:
    """The metrics of all candidates that have met the canaries, by name."""
    return {
        cell["key"]["method"]: cell["metrics"]
        for cell in cells
        if cell["key"]["attack"] == CANARIES and cell["key"]["method"] in candidates
    }


def bars(met: Mapping[str, dict], limit: float) -> dict[str, float]:
    """How often each kind of canary may succeed: as often as without any poison, or the limit.

    The unpoisoned network is one on every machine, trained anew; its mean is one bar for all.
    """
    errs = {
        kind: [
            share_of(found["base"], kind)["estimate"] for found in met.values() if "base" in found
        ]
        for kind in KINDS
    }
    return {kind: max(limit, np.mean(found)) if found else limit for kind, found in errs.items()}


def excess(metrics: dict[str, Any], allowed: Mapping[str, float]) -> float:
    """By how much the worse kind of canary succeeds more often than it may."""
    return max(share_of(metrics, kind)["estimate"] - allowed[kind] for kind in KINDS)


def usefulness(metrics: dict[str, Any]) -> float:
    """Mean of zero-shot accuracy and of retrieval both ways."""
    return (metrics["zero_shot"]["top1"] + recall(metrics)) / 2


def share_of(metrics: dict[str, Any], kind: str) -> dict:
    """How often a poison succeeded: counts and share."""
    return metrics[kind]["success"] if kind == "backdoor" else metrics[kind]


def recall(metrics: dict[str, Any]) -> float:
    """Recall at 5, mean of both ways."""
    ways = ("image_to_text", "text_to_image")
    return float(np.mean([metrics["retrieval"][f"{way}_r5"] for way in ways]))
