"""Whether a setting lies above its controls where clean and robust accuracy are traded."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxrobust import metrics

# Resamples that are held at a time.
_AT_ONCE = 4000


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


def margin(
    setting: np.ndarray,
    controls: Mapping[str, np.ndarray],
    row: int,
    *,
    resamples: int = 4000,
    comparisons: int = 1,
    seed: int = 0,
) -> Margin:
    """How far a setting lies above everything that its controls reach.

    Whoever has two networks can toss a coin for each image, so that the controls reach every point
    between two of theirs; the setting is compared with the best such mixture that is at least as
    accurate on clean images. Where no control is that accurate, it is compared with the most
    accurate one.

    Clean accuracy is drawn anew with the images as robust accuracy is, and the mixture is looked
    for in every resample: where the controls' line is steep, a few clean images move it by far.

    Args:
        setting: [seeds, rows, images] outcomes, of which row 0 is the clean one.
        controls: by name, of the same shape.
        row: the row that is compared.
        resamples: of the images, for the interval.
        comparisons: how many such intervals are to hold at once, at 95 % (Bonferroni); the more,
            the more resamples it takes.
        seed: of the resamples.
    """
    everyone = np.stack([setting, *controls.values()])[:, :, [0, row]]
    each = everyone.mean(1, dtype=float)  # [1 + controls, 2, images]: over seeds
    count = each.shape[-1]
    random, differences = np.random.default_rng(seed), []
    for done in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - done)
        draws = random.multinomial(count, np.full(count, 1 / count), size)
        drawn = np.einsum("bn,mkn->bmk", draws / count, each)
        differences.append(drawn[:, 0, 1] - _reached(drawn)[0])
    tail = 0.025 / comparisons
    above = np.quantile(np.concatenate(differences), (tail, 1 - tail))
    means = each.mean(-1)[None]
    best, high, low, share = (found[0] for found in _reached(means))
    names = list(controls)
    rivals = (names[high],) if share == 1 else (names[high], names[low])
    interval = metrics.Interval(float(means[0, 0, 1] - best), *map(float, above))
    return Margin(interval, rivals, float(share))


def _reached(points: np.ndarray) -> tuple[np.ndarray, ...]:
    """The best mixtures of controls that are as accurate on clean images as a setting.

    Args:
        points: [b, 1 + m, 2] clean and robust accuracy of the setting and of m controls.

    Returns:
        [b] each: robust accuracy of the mixture, the control of higher clean accuracy, the other
        one, and the first one's share.
    """
    clean, robust = points[:, 1:, 0], points[:, 1:, 1]
    wanted = np.minimum(points[:, 0, 0], clean.max(1))[:, None, None]
    high, low = clean[:, :, None], clean[:, None, :]
    enough = high >= wanted
    mixes = enough & (low < wanted)
    share = np.where(mixes, (wanted - low) / np.where(mixes, high - low, 1), 1)
    height = share * robust[:, :, None] + (1 - share) * robust[:, None, :]
    height = np.where(enough, height, -np.inf).reshape(len(points), -1)
    place = height.argmax(1)
    found = np.unravel_index(place, high.shape[1:2] + low.shape[2:])
    rows = np.arange(len(points))
    return height[rows, place], *found, share.reshape(len(points), -1)[rows, place]


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
