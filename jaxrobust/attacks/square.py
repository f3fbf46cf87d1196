"""Square attack: random search with square-shaped changes, by queries of the logits alone.

Every example draws its own windows and colours, so its result does not depend on its batch; the
reference draws one window per batch. A proposal that raises the margin, or misclassifies, is kept.
"""

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust import balls, losses, metrics
from jaxrobust.attacks import box, classifier, inputs, scheduler
from jaxrobust.attacks.value import Number, attack_value

# After each of these queries, of 10,000, the windows' share of the image is halved.
_SHRINK_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@attack_value(
    data=("eps",),
    meta=("norm", "queries", "share", "rescale", "edges", "restarts", "bounds", "loop"),
)
class Square:
    """Square attack; made by `square`.

    Attributes:
        eps: radius: a number, [b], or in linf a map per pixel.
        norm: "linf", "l2" or "l1".
        queries: forward passes per example and restart, after the first.
        share: of the image that the first windows cover.
        rescale: fit the schedule of sizes to `queries`; without it, to 10,000, as AutoAttack does.
        edges: let windows reach the last row and column, as the paper has it. The published code,
            and with it AutoAttack, never does, which weakens it on small images.
        restarts: random starts.
        bounds: the box.
        loop: the loop's form (`attacks.loop`).

    Source: Andriushchenko et al. 2020 (Square attack), algorithms 1-3; l1: Croce and Hein 2021.
    """

    eps: Number
    norm: str
    queries: int = 5000
    share: float = 0.8
    rescale: bool = True
    edges: bool = True
    restarts: int = 1
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
        """Attacks a batch; arguments, result and errors as `ClassifierAPGD.__call__`."""
        if self.norm != "linf" and (mask is not None or jnp.ndim(self.eps) > 1):
            raise ValueError(f"Square takes a mask or a map of eps in linf only, got {self.norm}")
        return classifier.break_batch(self, logits_fn, x, labels, key, mask, args)

    def search(self, classes: int) -> "Search":
        """The attack without its radius."""
        return Search(
            norm=self.norm,
            queries=self.queries,
            share=self.share,
            rescale=self.rescale,
            edges=self.edges,
            rounds=self.restarts,
            bounds=self.bounds,
            loop=self.loop,
        )


class State(NamedTuple):
    """One search per example; query 0 is the random start itself."""

    i: Array  # [b]
    delta: Array  # [b, h, w, c] the best so far
    margin: Array  # [b] by which the true class is ahead there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A `scheduler.Search`: one round is one random search."""

    norm: str
    queries: int
    share: float
    rescale: bool
    edges: bool
    rounds: int
    bounds: tuple[float, float]
    loop: str
    targets: ClassVar[int] = 1
    draws: ClassVar[int] = 0
    minimal: ClassVar[bool] = False

    @property
    def evaluations(self) -> int:
        """Queries of a round, the start's among them."""
        return self.queries + 1

    @property
    def chunk(self) -> int:
        """Queries between two looks at the flags."""
        return min(50, self.evaluations)

    def begin(self, rows: scheduler.Rows) -> State:
        """Vertical stripes in linf, a grid of tiles else."""
        inputs.check_pictures(rows.x)
        shape = rows.x.shape[1:]
        start = _stripes if self.norm == "linf" else functools.partial(_tiles, self.norm)
        delta = jax.vmap(lambda key: start(jax.random.fold_in(key, 0), shape))(rows.keys)
        return State(
            i=inputs.per_example(rows.x, 0, jnp.int32),
            delta=self._inside(delta * rows.eps if self.norm == "linf" else delta, rows),
            margin=inputs.per_example(rows.x, jnp.inf),
        )

    def advance(self, logits_fn, state, rows, args):
        """One query per example."""
        wide = functools.partial(inputs.wide, like=rows.x)
        proposal = jnp.where(wide(state.i == 0), state.delta, self._proposal(state, rows))
        logits = logits_fn(rows.x + proposal, *args)
        margin = -losses.margin(logits, rows.labels)
        # A tie may be either; no answer is a wrong one.
        wrong, least = metrics.misclassified(logits, rows.labels), jnp.finfo(margin.dtype).tiny
        margin = jnp.where(wrong, jnp.minimum(margin, 0), jnp.maximum(margin, least))
        margin = jnp.where(jnp.isnan(margin), -jnp.inf, margin)
        active = (state.i <= self.queries) & (state.margin > 0)
        better = active & ((margin < state.margin) | (margin <= 0))
        return State(
            i=state.i + active,
            delta=jnp.where(wide(better), proposal, state.delta),
            margin=jnp.where(better, margin, state.margin),
        )

    def _proposal(self, state, rows):
        height, width = rows.x.shape[1:3]
        sides = _sides(self.norm, self.queries, self.share, self.rescale, (height, width))
        kinds = np.unique(sides)
        kind = jnp.asarray(np.searchsorted(kinds, sides))
        kind = kind[jnp.clip(state.i - 1, 0, self.queries - 1)]
        keys = jax.vmap(jax.random.fold_in)(rows.keys, state.i)
        if self.norm == "linf":
            move = functools.partial(_coloured_window, kinds, self.edges)
            delta = state.delta + 2 * rows.eps * jax.vmap(move)(keys, state.delta, kind)
        else:
            eps = rows.eps.reshape(-1)
            move = functools.partial(_moved_mass, self.norm, kinds, self.edges)
            delta = jax.vmap(move)(keys, state.delta, kind, eps)
        return self._inside(delta, rows)

    def _inside(self, delta, rows):
        """Scaled (l2), projected (l1) or cut (linf) to the ball, then cut to the box."""
        low, high = box.room(rows.x, self.bounds)
        if self.norm == "l2":
            length = inputs.wide(balls.norms(delta, "l2"), delta)
            return jnp.clip(delta * rows.eps / (length + 1e-12), low, high)
        return balls.ball(self.norm).project(delta, rows.eps, low, high)

    def outcome(self, state, rows):
        """The best point, if it is misclassified."""
        return state.margin <= 0, box.finish(rows.x, state.delta, rows.eps, self.bounds)


@functools.lru_cache(maxsize=64)
def _sides(norm: str, queries: int, share: float, rescale: bool, image: tuple) -> np.ndarray:
    """Side of the window at every query."""
    sides = []
    for i in range(queries):
        at = int(i / queries * 10000) if rescale else i
        covered = share / 2 ** sum(at > limit for limit in _SHRINK_AT)
        side = max(round(math.sqrt(covered * image[0] * image[1])), 1)
        if norm != "linf":  # two bumps of opposite sign, with a middle
            side = max(side, 3) + (max(side, 3) % 2 == 0)
        sides.append(min(side, *image))
    return np.asarray(sides, np.int32)


def _signs(key, channels):
    return jax.random.rademacher(key, (channels,), jnp.float32)


def _stripes(key, shape):
    """A sign per column and channel."""
    _, width, channels = shape
    signs = jax.random.rademacher(key, (1, width, channels), jnp.float32)
    return jnp.broadcast_to(signs, shape)


def _corner(key, shape, side, edges):
    """The window's upper left corner."""
    places = jnp.asarray(shape[:2]) - side + edges
    return jnp.floor(jax.random.uniform(key, (2,)) * places).astype(jnp.int32)


def _window(corner, shape, side):
    """[h, w, 1] whether a pixel lies in the window."""
    inside = lambda axis: (  # noqa: E731
        (jnp.arange(shape[axis]) >= corner[axis]) & (jnp.arange(shape[axis]) < corner[axis] + side)
    )
    return (inside(0)[:, None] & inside(1))[:, :, None]


def _coloured_window(kinds, edges, key, delta, kind):
    """A window of one sign per channel, and 0 elsewhere."""
    place, colour = jax.random.split(key)
    side = jnp.asarray(kinds)[kind]
    window = _window(_corner(place, delta.shape, side, edges), delta.shape, side)
    return window * _signs(colour, delta.shape[2])


def _moved_mass(norm, kinds, edges, key, delta, kind, eps):
    """Moves the norm inside two windows, and what is left of eps, to a bump in the first."""
    places, others, colour, turn = jax.random.split(key, 4)
    side = jnp.asarray(kinds)[kind]
    corner = _corner(places, delta.shape, side, edges)
    first = _window(corner, delta.shape, side)
    second = _window(_corner(others, delta.shape, side, edges), delta.shape, side)
    bump = jnp.asarray(_bumps(norm, tuple(kinds.tolist()), delta.shape[:2]))[kind]
    bump = jnp.where(jax.random.bernoulli(turn), bump[0], bump[1])
    bump = jnp.roll(bump, corner, (0, 1))[:, :, None] * _signs(colour, delta.shape[2])
    power = 2 if norm == "l2" else 1
    size = lambda a, axes: (jnp.abs(a) ** power).sum(axes) ** (1 / power)  # noqa: E731
    kept = size(delta * (first | second), (0, 1))
    new = first * (bump + delta / (1e-12 + size(delta * first, (0, 1))))
    spare = jnp.maximum(eps**power - size(delta, None) ** power, 0) / delta.shape[2]
    length = (spare + kept**power) ** (1 / power) * (1 if norm == "l2" else delta.shape[2])
    new = new / (1e-12 + size(new, (0, 1))) * length
    return jnp.where(first, new, jnp.where(second, 0, delta))


@functools.lru_cache(maxsize=64)
def _bumps(norm: str, kinds: tuple, image: tuple) -> np.ndarray:
    """[kinds, 2, h, w] for each side the bump and its transpose, in the upper left corner."""
    bumps = np.zeros((len(kinds), 2, *image), np.float32)
    for kind, side in enumerate(kinds):
        bump = _bump(norm, side)
        bumps[kind, 0, :side, :side], bumps[kind, 1, :side, :side] = bump, bump.T
    return bumps


def _bump(norm, side):
    """Two pyramids of opposite sign, of norm 1."""
    upper = _pyramid(norm, side // 2, side)
    return _unit(norm, np.concatenate([upper, -_pyramid(norm, side - side // 2, side)]))


def _pyramid(norm, height, width):
    """Nested rectangles, each adding 1 / r^2 (l2) or 1 / r^4 (l1) for the r-th from inside."""
    delta = np.zeros((height, width))
    middle = [height // 2, width // 2]
    for r in range(max(height // 2, width // 2) + 1):
        top, left = middle[0] - r, middle[1] - r
        rows = slice(max(top, 0), min(top + 2 * r + 1, height))
        columns = slice(max(left, 0), min(left + 2 * r + 1, width))
        delta[rows, columns] += 1 / (r + 1) ** (2 if norm == "l2" else 4)
    return _unit(norm, delta)


def _unit(norm, delta):
    size = np.sqrt(np.square(delta).sum()) if norm == "l2" else np.abs(delta).sum()
    return delta / size if size > 0 else delta


def _tiles(norm, key, shape):
    """A grid of five by five bumps, each of random sign per channel and turned at random."""
    side = max(min(shape[:2]) // 5, 1)
    rows, columns = shape[0] // side, shape[1] // side
    margin = (shape[0] - 5 * side) // 2 if rows == 5 and columns == 5 else 0
    colour, turn = jax.random.split(key)
    bump = _bump(norm, side).astype(np.float32)
    turned = jax.random.bernoulli(turn, shape=(rows, columns, 1, 1, 1))
    tile = jnp.where(turned, bump[None, None, :, :, None], bump.T[None, None, :, :, None])
    signs = jax.random.rademacher(colour, (rows, columns, 1, 1, shape[2]), jnp.float32)
    grid = (tile * signs).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * side, columns * side, shape[2])
    below, right = shape[0] - rows * side - margin, shape[1] - columns * side - margin
    return jnp.pad(grid, ((margin, below), (margin, right), (0, 0)))


def square(
    norm: str,
    eps: Number,
    *,
    queries: int = 5000,
    share: float = 0.8,
    rescale: bool = True,
    edges: bool = True,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    loop: str = "auto",
) -> Square:
    """Square attack; arguments as the attributes of `Square`.

    Raises:
        ValueError: a negative eps or, in linf, one beyond the box, no query or restart, a share
            outside (0, 1], an unknown norm or loop, or bounds that are None or the wrong way round.
    """
    balls.ball(norm)
    if bounds is None:
        raise ValueError("bounds must be (low, high), got None")
    bounds = inputs.check_bounds(bounds)
    inputs.check_eps(eps, norm, bounds)
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    inputs.check_loop(loop)
    return Square(
        eps=eps,
        norm=norm,
        queries=inputs.check_steps(queries, "queries"),
        share=share,
        rescale=rescale,
        edges=edges,
        restarts=inputs.check_steps(restarts, "restarts"),
        bounds=bounds,
        loop=loop,
    )
