"""Whether a setting lies above its controls where clean and robust accuracy are traded."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxrobust import metrics


class Margin(NamedTuple):
    """Robust accuracy above that of the controls at equal clean accuracy.

    Attributes:
        interval: the difference with its bootstrap interval, paired over images.
        rivals: the control, or the two controls, that do best there.
        share: of the first of them in the mixture.
    """

    interval: metrics.Interval
    rivals: tuple[str, ...]
    share: float

    @property
    def above(self) -> bool:
        """Whether no mixture of controls is as good, beyond doubt."""
        return self.interval.low > 0


def margin(setting: np.ndarray, controls: Mapping[str, np.ndarray], row: int) -> Margin:
    """How far a setting lies above everything that its controls reach.

    Whoever has two networks can toss a coin for each image, so that the controls reach every point
    between two of theirs; the setting is compared with the best such mixture that is at least as
    accurate on clean images. Where no control is that accurate, it is compared with the most
    accurate one.

    Args:
        setting: [seeds, rows, images] outcomes, of which row 0 is the clean one.
        controls: by name, of the same shape.
        row: the row that is compared.
    """
    clean = {name: outcomes[:, 0].mean() for name, outcomes in controls.items()}
    robust = {name: outcomes[:, row].mean() for name, outcomes in controls.items()}
    wanted = min(setting[:, 0].mean(), max(clean.values()))
    reached = [(robust[name], (name,), 1.0) for name in controls if clean[name] >= wanted]
    for high, low in itertools.permutations(controls, 2):
        if clean[high] >= wanted > clean[low]:
            share = (wanted - clean[low]) / (clean[high] - clean[low])
            mixed = share * robust[high] + (1 - share) * robust[low]
            reached.append((mixed, (high, low), float(share)))
    _, rivals, share = max(reached, key=lambda found: found[0])
    mixture = share * controls[rivals[0]][:, row].astype(float)
    if len(rivals) == 2:
        mixture = mixture + (1 - share) * controls[rivals[1]][:, row]
    return Margin(metrics.paired_bootstrap(setting[:, row], mixture), rivals, share)


def boundary(clean: np.ndarray, robust: np.ndarray) -> np.ndarray:
    """The corners of what mixtures of some points reach, from the most robust to the cleanest.

    Args:
        clean: [n] accuracies.
        robust: [n] likewise.

    Returns:
        [m, 2] points (clean, robust), no one of which a mixture of others is better than in both.
    """
    corners: list[np.ndarray] = []
    for point in sorted(np.stack([clean, robust], 1).tolist(), reverse=True):
        if corners and point[1] <= corners[-1][1]:
            continue
        while len(corners) > 1 and _is_below(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(np.array(point))
    return np.array(corners[::-1])


def _is_below(right, middle, left) -> bool:
    """Whether the middle point lies on or under the line between its neighbours."""
    share = (middle[0] - left[0]) / (right[0] - left[0])
    return middle[1] <= share * right[1] + (1 - share) * left[1]
