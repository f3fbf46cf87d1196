"""From scores to maps: the top fraction, soft maps, dilation, and the checks of a map."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxrobust.attacks.inputs import check_number, check_steps

Maps = Float[Array, "b h w 1"]


def top_fraction(scores: ArrayLike, area: ArrayLike) -> Maps:
    """Marks the k highest scores of each map, k = round(area h w); exactly k, whatever the ties.

    Among equal scores, the pixel that comes first in reading order is taken first.

    Args:
        scores: [b, h, w, 1], the larger the more salient.
        area: share of the pixels in [0, 1]: a number, or [b] for one per example.

    Returns:
        [b, h, w, 1] of 0 and 1.

    Raises:
        ValueError: area outside [0, 1] or of another shape, or a NaN among the scores.

    Source: SIP-AT (Redgrave and Czajka 2025), whose automatic maps are the top k pixels.
    """
    scores = check_scores(scores)
    area = check_area(area, len(scores))
    count = jnp.floor(area * (scores.shape[1] * scores.shape[2]) + 0.5)
    return (_places(scores) < _per_example(count)).astype(scores.dtype)


def rank_map(scores: ArrayLike, area: ArrayLike) -> Maps:
    """A soft map of a given protected area: a power of the scores' ranks.

    S_p = q_p^(1/area - 1), where q_p in (0, 1) is the share of the pixels that p outranks. Its mean
    is `area` (but for the rule of midpoints), however the scores are distributed.

    Args:
        scores: [b, h, w, 1], the larger the more salient; ties as in `top_fraction`.
        area: mean of the map, in [0, 1]: a number, or [b].

    Returns:
        [b, h, w, 1] in [0, 1].

    Raises:
        ValueError: as for `top_fraction`.
    """
    scores = check_scores(scores)
    area = _per_example(check_area(area, len(scores)))
    rank = 1 - (_places(scores) + 0.5) / (scores.shape[1] * scores.shape[2])
    power = 1 / jnp.where(area > 0, area, 1) - 1
    return jnp.where(area > 0, rank.astype(scores.dtype) ** power, 0)


def soft(scores: ArrayLike) -> Maps:
    """Scores stretched to [0, 1], each map by itself; a constant map becomes 0.

    Raises:
        ValueError: the shape is not [b, h, w, 1], or a NaN among the scores.
    """
    scores = check_scores(scores)
    low, high = (f(scores, (1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    spread = high - low
    return jnp.where(spread > 0, (scores - low) / jnp.where(spread > 0, spread, 1), 0)


def stand_out(scores: ArrayLike, deviations: float = 1.0) -> Maps:
    """Marks the pixels whose squared score lies `deviations` above the mean of its map.

    1 where (s^2 - mean) / standard deviation > deviations; a constant map becomes 0. PART's rule
    for what is important, but for the colours: its code paints the squared map with a colour scale
    first and asks each colour channel by itself.

    Raises:
        ValueError: the shape is not [b, h, w, 1], or a NaN among the scores.

    Source: Zhang et al. 2024 (PART), the authors' code.
    """
    squared = jnp.square(check_scores(scores))
    mean, deviation = (f(squared, (1, 2, 3), keepdims=True) for f in (jnp.mean, jnp.std))
    return (squared - mean > deviations * deviation).astype(squared.dtype)


def dilate(maps: ArrayLike, radius: int) -> Maps:
    """The largest value within `radius` pixels in both directions (a square window).

    Raises:
        ValueError: radius is no whole number >= 1.
    """
    check_steps(radius, "radius")
    maps, side = jnp.asarray(maps), 2 * radius + 1
    return jax.lax.reduce_window(maps, -jnp.inf, jax.lax.max, (1, side, side, 1), (1,) * 4, "SAME")


def blur(scores: ArrayLike, sigma: float) -> Maps:
    """Gaussian blur of standard deviation `sigma` pixels > 0, cut off after 3 sigma.

    At the border the weights that fall outside are shared out among the rest.
    """
    check_number("sigma", sigma, low=0, strict=True)
    scores = jnp.asarray(scores)
    for axis in (1, 2):
        place = np.arange(scores.shape[axis])
        away = place[:, None] - place[None, :]
        weights = np.exp(-((away / sigma) ** 2) / 2) * (np.abs(away) <= 3 * sigma)
        weights = (weights / weights.sum(1, keepdims=True)).astype(scores.dtype)
        scores = jnp.moveaxis(
            jnp.tensordot(weights, scores, (1, axis), precision="highest"), 0, axis
        )
    return scores


def invert(maps: ArrayLike) -> Maps:
    """1 - S: what was salient is not any more, and the other way round."""
    return 1 - jnp.asarray(maps)


def area(maps: ArrayLike) -> Float[Array, " b"]:
    """The protected share of each example: the mean of its map."""
    return jnp.asarray(maps).mean((1, 2, 3))


def check_maps(maps: Any, images: Any, name: str = "salience") -> None:
    """Refuses maps that do not fit their images.

    Args:
        maps: expected to be [b, h, w, 1] in [0, 1], with the images' b, h and w. Values of traced
            maps are not looked at.
        images: [b, h, w, c].
        name: what to call the maps in an error.

    Raises:
        ValueError: another shape, a NaN, or a value outside [0, 1].
    """
    expected = (*np.shape(images)[:3], 1)
    if np.shape(maps) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {np.shape(maps)}")
    if isinstance(maps, jax.core.Tracer) or not np.size(maps):
        return
    low, high = _extremes(maps)
    if np.isnan(low):
        rows = np.flatnonzero(np.isnan(np.asarray(maps)).any((1, 2, 3)))
        raise ValueError(f"{name} must not hold NaN, got some in rows {rows[:10].tolist()}")
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1], got values in [{low:g}, {high:g}]")


def check_scores(scores: ArrayLike) -> Array:
    """Scores as an array, after checks of shape and for NaN.

    Raises:
        ValueError: the shape is not [b, h, w, 1], or there is a NaN.
    """
    scores = jnp.asarray(scores)
    if scores.ndim != 4 or scores.shape[-1] != 1:
        raise ValueError(f"scores must have shape [b, h, w, 1], got {scores.shape}")
    traced = isinstance(scores, jax.core.Tracer)
    if not traced and scores.size and np.isnan(_extremes(scores)[0]):
        raise ValueError("scores must not hold NaN")
    return scores


def check_area(area: ArrayLike, batch: int) -> Array:
    """A protected area as an array of rank 0 or [b].

    Raises:
        ValueError: another shape, or a value outside [0, 1].
    """
    area = jnp.asarray(area, jnp.float32)
    if area.shape not in ((), (batch,)):
        raise ValueError(f"area must be a number or [{batch}], got shape {area.shape}")
    if not isinstance(area, jax.core.Tracer) and area.size:
        low, high = _extremes(area)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"area must be in [0, 1], got {low if not low >= 0 else high:g}")
    return area


def _extremes(values) -> tuple[float, float]:
    """Smallest and largest value, concrete also where a constant is met inside a trace."""
    with jax.ensure_compile_time_eval():
        return float(jnp.min(values)), float(jnp.max(values))


def _places(scores) -> Array:
    """Each pixel's place when sorted by falling score, [b, h, w, 1]; ties in reading order."""
    flat = scores.reshape(len(scores), -1)
    order = jnp.argsort(-flat, axis=1, stable=True)
    return jnp.argsort(order, axis=1).reshape(scores.shape)


def _per_example(values):
    return values[:, None, None, None] if values.ndim else values
