"""The spatial threat: a small rotation and shift of the picture, searched exhaustively.

attack = spatial(shift=0.1, rotation=30)    # attack(logits_fn, x, labels, key)
"""

import dataclasses
import functools
import itertools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxrobust import metrics
from jaxrobust.attacks import classifier, inputs, scheduler
from jaxrobust.attacks.value import Number, attack_value


@attack_value(data=("eps",), meta=("shift", "rotation", "grid", "bounds", "loop"))
class Spatial:
    """The worst of a grid of rotations and shifts; made by `spatial`.

    Attributes:
        eps: the share of `shift` and `rotation` that is allowed: a number or [b].
        shift: furthest shift, in sides of the image.
        rotation: widest rotation to either side, in degrees.
        grid: how many shifts down, shifts to the right, and rotations are tried.
        bounds: the box; what enters from outside has its lower value.
        loop: the loop's form (`attacks.loop`).

    Source: Engstrom et al. 2019 (Exploring the landscape of spatial robustness), grid search.
    """

    eps: Number = 1.0
    shift: float = 0.1
    rotation: float = 30.0
    grid: tuple[int, int, int] = (5, 5, 31)
    bounds: tuple[float, float] = (0.0, 1.0)
    loop: str = "auto"
    draws: ClassVar[int] = 0

    def __call__(
        self,
        logits_fn: classifier.LogitsFn,
        x: ArrayLike,
        labels: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
    ) -> Array:
        """Attacks a batch; arguments, result and errors as `ClassifierAPGD.__call__`.

        The search is the same for every key, and `mask` must be None: all pixels move together.
        """
        if mask is not None:
            raise ValueError("mask must be None for a spatial attack, which moves the whole image")
        return classifier.break_batch(self, logits_fn, x, labels, key, None, args)

    def search(self, classes: int) -> "Search":
        """The attack without its `eps`."""
        return Search(
            moves=_moves(self.shift, self.rotation, self.grid), bounds=self.bounds, loop=self.loop
        )


class State(NamedTuple):
    """One search per example."""

    i: Array  # [b] the move that comes next
    fooled: Array  # [b] bool: by the move before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A `scheduler.Search`: one round goes through all moves, the widest first."""

    moves: tuple[tuple[float, float, float], ...]
    bounds: tuple[float, float]
    loop: str
    rounds: ClassVar[int] = 1
    targets: ClassVar[int] = 1
    draws: ClassVar[int] = 0
    minimal: ClassVar[bool] = False
    norm: ClassVar[str] = "linf"

    @property
    def evaluations(self) -> int:
        """One forward pass per move."""
        return len(self.moves)

    @property
    def chunk(self) -> int:
        """Moves between two looks at the flags."""
        return min(25, len(self.moves))

    def begin(self, rows: scheduler.Rows) -> State:
        """Before the first move."""
        inputs.check_pictures(rows.x)
        each = functools.partial(inputs.per_example, rows.x)
        return State(each(0, jnp.int32), each(False, bool))

    def advance(self, logits_fn, state, rows, args):
        """One move per example."""
        wrong = metrics.misclassified(logits_fn(self._moved(state.i, rows), *args), rows.labels)
        active = (state.i < len(self.moves)) & ~state.fooled
        return State(state.i + active, state.fooled | active & wrong)

    def outcome(self, state, rows):
        """The image as it was moved last."""
        return state.fooled, self._moved(state.i - 1, rows)

    def _moved(self, number, rows):
        table = jnp.asarray(self.moves, rows.x.dtype)
        chosen = table[jnp.clip(number, 0, len(self.moves) - 1)] * rows.eps.reshape(-1, 1)
        return move(rows.x, *chosen.T, fill=self.bounds[0])


def move(
    x: Float[Array, "b h w c"],
    down: Float[Array, " b"],
    right: Float[Array, " b"],
    angle: Float[Array, " b"],
    fill: float = 0.0,
) -> Float[Array, "b h w c"]:
    """Rotates each image about its middle and then shifts it, bilinearly.

    Args:
        x: [b, h, w, c].
        down: [b] shift in heights.
        right: [b] shift in widths.
        angle: [b] degrees, counter-clockwise.
        fill: what enters from outside.
    """
    return jax.vmap(functools.partial(_move_one, fill=fill))(x, down, right, angle)


def _move_one(image, down, right, angle, fill):
    height, width = image.shape[:2]
    middle = (height - 1) / 2, (width - 1) / 2
    row = (jnp.arange(height) - middle[0] - down * height)[:, None]
    column = (jnp.arange(width) - middle[1] - right * width)[None, :]
    cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    # Where each pixel of the result comes from: the inverse rotation, with rows pointing down.
    source = [cos * row + sin * column + middle[0], cos * column - sin * row + middle[1]]
    sample = functools.partial(
        jax.scipy.ndimage.map_coordinates, coordinates=source, order=1, mode="constant", cval=fill
    )
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


@functools.lru_cache(maxsize=32)
def _moves(shift, rotation, grid):
    """All (down, right, angle), the widest first: most examples that fall do so early."""
    ends = (shift, shift, rotation)
    axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in grid]
    moves = sorted(itertools.product(*axes), key=lambda move: -float(np.square(move).sum()))
    return tuple(tuple(float(s * e) for s, e in zip(m, ends, strict=True)) for m in moves)


def spatial(
    eps: Number = 1.0,
    *,
    shift: float | int = 0.1,
    rotation: float | int = 30.0,
    grid: tuple[int, ...] = (5, 5, 31),
    bounds: tuple[float, float] = (0.0, 1.0),
    loop: str = "auto",
) -> Spatial:
    """The worst rotation and shift of a grid; arguments as the attributes of `Spatial`.

    Raises:
        ValueError: eps outside [0, 1], a shift outside [0, 1), a rotation outside [0, 180], a
            grid that is not three whole numbers >= 1, or bounds that are not finite.
    """
    inputs.check_number("eps", eps, low=0, high=1)
    if not 0 <= shift < 1:
        raise ValueError(f"shift must be in sides of the image, in [0, 1), got {shift!r}")
    if not 0 <= rotation <= 180:
        raise ValueError(f"rotation must be in degrees, in [0, 180], got {rotation!r}")
    if len(grid) != 3:
        raise ValueError(f"grid must be three whole numbers >= 1, got {grid!r}")
    inputs.check_loop(loop)
    return Spatial(
        eps=eps,
        shift=float(shift),
        rotation=float(rotation),
        grid=tuple(inputs.check_steps(count, "grid") for count in grid),
        bounds=inputs.check_bounds(bounds, finite=True),
        loop=loop,
    )
