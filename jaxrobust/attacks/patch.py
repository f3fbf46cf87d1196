"""The patch threat: a window of any content, at the place where the network is most sensitive.

attack = patch(size=5)          # attack(logits_fn, x, labels, key)
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust.attacks import apgd_step, classifier, inputs, scheduler
from jaxrobust.attacks.apgd import ClassifierAPGD, apgd_ce
from jaxrobust.attacks.apgd import Search as Filling
from jaxrobust.attacks.value import Number, attack_value


@attack_value(data=("eps",), meta=("size", "attack"))
class Patch:
    """Auto-PGD inside a window; made by `patch`.

    Attributes:
        eps: how far a pixel of the window may move: a number or [b].
        size: height and width of the window in pixels.
        attack: what fills the window: a `ClassifierAPGD` in linf. Each of its restarts has a
            place of its own: the first where the gradient is largest, the others drawn.
    """

    eps: Number
    size: tuple[int, int]
    attack: ClassifierAPGD
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

        Raises:
            ValueError: also for a window that is larger than the image.
        """
        return classifier.break_batch(self, logits_fn, x, labels, key, mask, args)

    @property
    def bounds(self) -> tuple[float, float]:
        """The box."""
        return self.attack.bounds

    def search(self, classes: int) -> "Search":
        """The attack without its radius, for so many classes."""
        return Search(size=self.size, inner=self.attack.search(classes))


class State(NamedTuple):
    """One search per example."""

    placed: Array  # [b] bool: the window has its place
    window: Array  # [b, h, w, 1], 1 inside
    run: apgd_step.State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A `scheduler.Search`: one gradient to find the place, then a run of Auto-PGD inside."""

    size: tuple[int, int]
    inner: Filling
    targets: ClassVar[int] = 1
    draws: ClassVar[int] = 0
    minimal: ClassVar[bool] = False
    norm: ClassVar[str] = "linf"

    @property
    def rounds(self) -> int:
        """Places."""
        return self.inner.rounds

    @property
    def evaluations(self) -> int:
        """Gradients in a round."""
        return self.inner.evaluations + 1

    @property
    def chunk(self) -> int:
        """Iterations between two looks at the flags."""
        return self.inner.chunk

    @property
    def loop(self) -> str:
        """The loop's form."""
        return self.inner.loop

    def begin(self, rows: scheduler.Rows) -> State:
        """No place yet: the random start covers the image, and is cut to the window later."""
        inputs.check_pictures(rows.x)
        height, width = rows.x.shape[1:3]
        if self.size[0] > height or self.size[1] > width:
            raise ValueError(f"size must fit into {height}x{width} images, got {self.size}")
        placed, window = inputs.per_example(rows.x, False, bool), jnp.zeros_like(rows.x[..., :1])
        return State(placed, window, self.inner.begin(rows))

    def advance(self, logits_fn, state, rows, args):
        """The window's place at first, and then one step."""
        placed = inputs.wide(state.placed, rows.x)
        x = rows.x + jnp.where(placed, state.run.delta, 0)
        loss, wrong, grad = classifier.evaluate(logits_fn, self.inner.loss, x, rows, args)
        window = jnp.where(placed, state.window, self._window(grad, rows))
        moved = apgd_step.advance(
            state.run, loss, wrong, grad, rows.x, window * rows.eps, bounds=self.inner.bounds,
            norm=self.norm, steps=self.inner.steps, large_radii=False, rho=self.inner.rho,
        )  # fmt: skip
        cut = state.run._replace(delta=state.run.delta * window, before=state.run.before * window)
        run = jax.tree.map(
            lambda new, old: jnp.where(inputs.wide(state.placed, new), new, old),
            moved,
            cut,
        )
        return State(jnp.ones_like(state.placed), window, run)

    def _window(self, grad, rows):
        """[b, h, w, 1]: where the gradient is largest, or, in later rounds, anywhere."""
        height, width = self.size
        weight = jnp.abs(grad).sum(-1)
        sums = jax.lax.reduce_window(
            weight, 0.0, jax.lax.add, (1, height, width), (1, 1, 1), "valid"
        )
        shape = sums.shape[1:]
        best = sums.reshape(len(sums), -1).argmax(1)
        count = shape[0] * shape[1]
        drawn = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), 0, count))
        place = jnp.where(rows.rounds == 0, best, drawn(rows.keys))
        top, left = place // shape[1], place % shape[1]
        inside = lambda start, side, whole: (  # noqa: E731
            (jnp.arange(whole) >= start[:, None]) & (jnp.arange(whole) < start[:, None] + side)
        )
        row, column = inside(top, height, weight.shape[1]), inside(left, width, weight.shape[2])
        return (row[:, :, None] & column[:, None, :])[..., None].astype(rows.x.dtype)

    def outcome(self, state, rows):
        """The first misclassified iterate."""
        return self.inner.outcome(state.run, rows)


def patch(
    size: int | tuple[int, ...],
    *,
    eps: Number | None = None,
    places: int = 5,
    steps: int = 100,
    bounds: tuple[float, float] = (0.0, 1.0),
    loop: str = "auto",
) -> Patch:
    """An adversarial patch for each image.

    Args:
        size: of the window in pixels: one side, or (height, width).
        eps: how far its pixels may move; None is any content.
        places: windows that are tried for an example that holds.
        steps: iterations of Auto-PGD at each.
        bounds: the box.
        loop: the loop's form.

    Raises:
        ValueError: a size that is not one or two whole numbers >= 1, places < 1, infinite bounds
            without eps, or as `apgd`.

    Source: Brown et al. 2017 (Adversarial patch); a place for each image: Rao et al. 2020
    (Adversarial training against location-optimized adversarial patches).
    """
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size must be one or two whole numbers of pixels >= 1, got {size!r}")
    sides = tuple(inputs.check_steps(side, "size") for side in sides)
    places = inputs.check_steps(places, "places")
    low, high = inputs.check_bounds(bounds, finite=eps is None)
    inner = apgd_ce("linf", 0.0, restarts=places, steps=steps, bounds=(low, high), loop=loop)
    eps = high - low if eps is None else eps
    inputs.check_eps(eps, "linf", (low, high))
    return Patch(eps=eps, size=sides, attack=dataclasses.replace(inner, eps=None))
