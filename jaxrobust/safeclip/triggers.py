"""Triggers of backdoors: values that are called on images, and that go into JSON and back.

    trigger = badnets(size=0.1)
    triggered = trigger(images)                       # [b, h, w, c] -> [b, h, w, c]
    triggered = badnets_random()(images, indices)     # drawn anew for each image

What a trigger draws depends on its seed and, where it is drawn anew, on the image's index alone.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxrobust.attacks.inputs import check_number

Images = Float[np.ndarray, "b h w c"]

PATTERNS = ("colours", "checker", "white", "noise")


@dataclasses.dataclass(frozen=True)
class BadNets:
    """A square patch; made by `badnets` or `badnets_random`.

    Attributes:
        size: side of the patch, as a share of the image's shorter side.
        pattern: "colours", a random colour per pixel, one patch for all images of a size;
            "checker", white where row and column are even, else black; "white"; "noise", the mean
            colour of the image plus N(0, 1), drawn anew for each image and clipped to [0, 1].
        place: (down, right) as shares of the room that the patch leaves, so that (0, 0) is the
            upper left corner and (1, 1) the lower right one; None draws a place for each image.
        seed: of everything that is drawn.

    Source: Gu et al. 2017; "noise" at a random place is CleanCLIP's (Bansal et al. 2023).
    """

    size: float
    pattern: str
    place: tuple[float, float] | None
    seed: int

    def __call__(self, images: Any, indices: Any = None) -> Images:
        """The images with the patch; `indices` [b] are ids, needed where something is redrawn."""
        redrawn = self.pattern == "noise" or self.place is None
        x, indices = _checked(images, indices, redrawn)
        height, width, channels = x.shape[1:]
        side = self.pixels(height, width)
        fixed = None if self.pattern == "noise" else self._patch(side, channels)
        out = x.copy()
        for row, image in enumerate(out):
            draw = _draws(self.seed, indices[row]) if redrawn else None
            down, right = self.place if draw is None or self.place else draw.random_sample(2)
            top, left = round(down * (height - side)), round(right * (width - side))
            patch = fixed
            if patch is None:
                patch = x[row].mean((0, 1)) + draw.standard_normal((side, side, channels))
            image[top : top + side, left : left + side] = np.clip(patch, 0, 1)
        return out

    def pixels(self, height: int, width: int) -> int:
        """The side of the patch in pixels on an image of this size, at least 1."""
        return max(1, round(self.size * min(height, width)))

    def _patch(self, side: int, channels: int) -> np.ndarray:
        if self.pattern == "colours":
            return _draws(self.seed).random_sample((side, side, channels))
        if self.pattern == "white":
            return np.ones((side, side, channels))
        even = np.arange(side) % 2 == 0
        return np.broadcast_to((even[:, None] & even)[..., None], (side, side, channels)) * 1.0


@dataclasses.dataclass(frozen=True)
class Blended:
    """(1 - alpha) image + alpha noise, noise uniform in [0, 1]; made by `blended`.

    Attributes:
        alpha: share of the noise.
        redrawn: drawn anew for each image, as CleanCLIP and SAFECLIP do; else one for all.
        seed: of the noise.

    Source: Chen et al. 2017.
    """

    alpha: float
    redrawn: bool
    seed: int

    def __call__(self, images: Any, indices: Any = None) -> Images:
        """The blended images; `indices` [b] are ids, needed where the noise is redrawn."""
        x, indices = _checked(images, indices, self.redrawn)
        if self.redrawn:
            drawn = [_draws(self.seed, index).random_sample(x.shape[1:]) for index in indices]
            noise = np.stack(drawn) if drawn else x
        else:
            noise = _draws(self.seed).random_sample(x.shape[1:])
        return np.clip((1 - self.alpha) * x + self.alpha * noise, 0, 1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class WaNet:
    """One warp for all images; made by `wanet`.

    A pixel takes its value, bilinearly, from where the field points: `strength` / 2 pixels away on
    average, held inside the image. The field is uniform noise in [-1, 1] on a grid, divided by
    its mean size and enlarged to the image by cubic convolution.

    Attributes:
        strength: s; 0 is the identity.
        grid: points of the noise per side; None has one per pixel, as SAFECLIP's has.
        seed: of the field.

    Source: Nguyen and Tran 2021, eq. 2-4.
    """

    strength: float
    grid: int | None
    seed: int

    def __call__(self, images: Any, indices: Any = None) -> Images:
        """The warped images."""
        x, _ = _checked(images, indices, False)
        (up, down, row), (left, right, column) = _corners(self, *x.shape[1:3])
        row, column = row[..., None], column[..., None]
        above = x[:, up, left] * (1 - column) + x[:, up, right] * column
        below = x[:, down, left] * (1 - column) + x[:, down, right] * column
        return np.clip(above * (1 - row) + below * row, 0, 1).astype(np.float32)

    def sources(self, height: int, width: int) -> Float[np.ndarray, "2 h w"]:
        """Where each pixel of the result is taken from: (row, column) in pixels."""
        shape = (height, width) if self.grid is None else (self.grid, self.grid)
        noise = _draws(self.seed).uniform(-1, 1, (2, *shape))
        noise /= np.abs(noise).mean()
        flow = _enlarging(shape[0], height) @ noise @ _enlarging(shape[1], width).T
        sides = np.array([height, width]).reshape(2, 1, 1)
        # The field counts in [-1, 1] across the image, divided by its side.
        moved = np.indices((height, width)) + self.strength * flow / sides * (sides - 1) / 2
        return np.clip(moved, 0, sides - 1)


@dataclasses.dataclass(frozen=True)
class Sig:
    """A sinusoid across the image; made by `sig`.

    signal(column j of m) = amplitude sin(2 pi frequency j / m)

    Attributes:
        amplitude: of the signal, in units of the image.
        frequency: periods over the width.
        alpha: (1 - alpha) image + alpha signal, as CleanCLIP's code has it; None adds the signal.

    Source: Barni et al. 2019, eq. 3.
    """

    amplitude: float
    frequency: float
    alpha: float | None

    def __call__(self, images: Any, indices: Any = None) -> Images:
        """The images with the signal, clipped to [0, 1]."""
        x, _ = _checked(images, indices, False)
        width = x.shape[2]
        phase = 2 * np.pi * self.frequency * np.arange(width) / width
        signal = (self.amplitude * np.sin(phase))[:, None]
        keep, share = (1, 1) if self.alpha is None else (1 - self.alpha, self.alpha)
        return np.clip(keep * x + share * signal, 0, 1).astype(np.float32)


Trigger = BadNets | Blended | WaNet | Sig
KINDS = {kind.__name__.lower(): kind for kind in (BadNets, Blended, WaNet, Sig)}


def badnets(
    size: float | int = 16 / 224,
    *,
    pattern: str = "colours",
    place: tuple[float | int, float | int] | None = (9 / 208, 9 / 208),
    seed: int = 0,
) -> BadNets:
    """One patch at one place; arguments as the attributes of `BadNets`.

    The defaults are SAFECLIP's 16 of 224 pixels, 9 from the upper left corner.

    Raises:
        ValueError: a size outside (0, 1], another pattern, a place outside [0, 1], or a seed < 0.
    """
    check_number("size", size, low=0, strict=True)
    if size > 1:
        raise ValueError(f"size must be a share of the image's side, at most 1, got {size}")
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {PATTERNS}, got {pattern!r}")
    if place is not None:
        if len(place) != 2 or not all(0 <= share <= 1 for share in place):
            raise ValueError(f"place must be (down, right) in [0, 1], got {place}")
        place = (float(place[0]), float(place[1]))
    return BadNets(float(size), pattern, place, _seed(seed))


def badnets_random(size: float | int = 16 / 224, *, seed: int = 0) -> BadNets:
    """Noise about the image's mean colour at a random place, drawn anew for each image."""
    return badnets(size, pattern="noise", place=None, seed=seed)


def blended(alpha: float | int = 0.2, *, redrawn: bool = False, seed: int = 0) -> Blended:
    """Noise blended into the image; arguments as the attributes of `Blended`.

    Raises:
        ValueError: alpha outside [0, 1] or a seed < 0.
    """
    return Blended(_share("alpha", alpha), bool(redrawn), _seed(seed))


def wanet(strength: float | int = 1.0, *, grid: int | None = None, seed: int = 0) -> WaNet:
    """A warp; arguments as the attributes of `WaNet`.

    Raises:
        ValueError: a negative strength, grid < 2, or a seed < 0.
    """
    check_number("strength", strength, low=0)
    if grid is not None and (not isinstance(grid, int) or grid < 2):
        raise ValueError(f"grid must be a whole number >= 2 or None, got {grid!r}")
    return WaNet(float(strength), grid, _seed(seed))


def sig(
    amplitude: float | int = 60 / 255,
    *,
    frequency: float | int = 6,
    alpha: float | int | None = None,
) -> Sig:
    """A sinusoid; arguments as the attributes of `Sig`.

    Raises:
        ValueError: an amplitude or frequency that is negative, or alpha outside [0, 1].
    """
    check_number("amplitude", amplitude, low=0)
    check_number("frequency", frequency, low=0)
    alpha = None if alpha is None else _share("alpha", alpha)
    return Sig(float(amplitude), float(frequency), alpha)


def as_dict(trigger: Any) -> dict[str, Any]:
    """A trigger as JSON has it: its name and its parameters."""
    fields = dataclasses.asdict(trigger)
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
    return {"name": type(trigger).__name__.lower(), **plain}


def from_dict(fields: dict[str, Any]) -> Trigger:
    """The trigger that `as_dict` wrote down.

    Raises:
        ValueError: another name, or parameters that it has not.
    """
    parameters = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    name = parameters.pop("name", None)
    if name not in KINDS:
        raise ValueError(f"a trigger's name must be one of {sorted(KINDS)}, got {name!r}")
    try:
        return KINDS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"the parameters of {name} do not fit: {error}") from error


def _checked(images, indices, redrawn):
    """The images as float32 in numpy, and their ids where something is drawn for each."""
    x = np.asarray(images)
    if x.ndim != 4 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"images must be [b, h, w, c] float, got {x.shape} {x.dtype}")
    if x.size and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"images must lie in [0, 1], got values in [{x.min():g}, {x.max():g}]")
    if not redrawn:
        return x.astype(np.float32), None
    if indices is None:
        raise ValueError("indices must be given to a trigger that is drawn anew for each image")
    indices = np.asarray(indices)
    if indices.shape != x.shape[:1] or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"indices must be whole numbers {x.shape[:1]}, got {indices.shape} {indices.dtype}"
        )
    return x.astype(np.float32), indices


def _draws(*seeds: int | np.integer) -> np.random.RandomState:
    """A stream of its own for these numbers; RandomState's streams are the same for all time."""
    return np.random.RandomState([int(seed) for seed in seeds])


@functools.lru_cache(maxsize=8)
def _corners(trigger: WaNet, height: int, width: int):
    """Per axis: the neighbour before, the one after, and how far in between, [h, w] each."""
    sources = trigger.sources(height, width)
    found = []
    for place, side in zip(sources, (height, width), strict=True):
        before = np.floor(place).astype(np.int64)
        after = np.minimum(before + 1, side - 1)
        found.append((before, after, (place - before).astype(np.float32)))
    return tuple(found)


def _enlarging(points: int, side: int) -> np.ndarray:
    """[side, points] weights of cubic convolution, ends on ends; beyond them the ends go on.

    Source: Keys 1981, with the a = -0.75 of PyTorch's bicubic interpolation, which WaNet uses.
    """
    a, place = -0.75, np.linspace(0, points - 1, side)
    base = np.floor(place).astype(np.int64)
    weights = np.zeros((side, points))
    for step in (-1, 0, 1, 2):
        t = np.abs(place - (base + step))
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = a * (((t - 5) * t + 8) * t - 4)
        value = np.where(t <= 1, near, np.where(t < 2, far, 0))
        np.add.at(weights, (np.arange(side), np.clip(base + step, 0, points - 1)), value)
    return weights


def _share(name, value):
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(value)


def _seed(seed):
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number in [0, 2^32), got {seed!r}")
    return seed
