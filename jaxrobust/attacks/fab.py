"""FAB: steps to the linearised decision boundary, biased towards the original image.

It looks for the smallest perturbation that misclassifies; an example counts as broken when that is
at most eps. Without eps it is a minimum-norm attack.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust import balls, metrics
from jaxrobust.attacks import classifier, hyperplane, inputs, scheduler
from jaxrobust.attacks.pgd import finite_gradient
from jaxrobust.attacks.value import Number, attack_value

_ALPHA_MAX, _OVERSHOOT, _BACK = 0.1, 1.05, 0.9


@attack_value(
    data=("eps",), meta=("norm", "steps", "targets", "restarts", "minimal", "bounds", "loop")
)
class FAB:
    """Fast adaptive boundary attack; made by `fab` and `fab_t`.

    Attributes:
        eps: radius: a number or [b]; inf where it was given as None. It is also the width of the
            random starts after the first.
        norm: "linf", "l2" or "l1".
        steps: iterations of a round.
        targets: None aims at the nearest boundary (one backward pass per class and step), a number
            at the likeliest wrong classes, one per round (one backward pass).
        restarts: rounds for each target; the first begins at the image itself.
        minimal: use all steps and rounds to shorten the perturbation, instead of stopping inside
            eps.
        bounds: the box.
        loop: the loop's form (`attacks.loop`).

    Source: Croce and Hein 2020 (FAB), algorithm 1, with alpha_max 0.1, eta 1.05, beta 0.9.
    """

    eps: Number
    norm: str
    steps: int = 100
    targets: int | None = None
    restarts: int = 1
    minimal: bool = False
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

        Raises:
            ValueError: also a mask or a map of radii: the boundary's distance has neither.
        """
        if mask is not None or jnp.ndim(self.eps) > 1:
            raise ValueError("FAB has one radius per image: it takes no mask and no map of eps")
        return classifier.break_batch(self, logits_fn, x, labels, key, None, args)

    def search(self, classes: int) -> "Search":
        """The attack without its radius, for so many classes."""
        targets = 1 if self.targets is None else min(self.targets, classes - 1)
        return Search(
            norm=self.norm,
            steps=self.steps,
            targeted=self.targets is not None,
            targets=targets,
            rounds=targets * self.restarts,
            minimal=self.minimal,
            bounds=self.bounds,
            loop=self.loop,
        )


class State(NamedTuple):
    """One search per example."""

    i: Array  # [b] iterations done
    delta: Array  # [b, ...] where it stands
    best: Array  # [b, ...] shortest adversarial perturbation
    size: Array  # [b] its norm, inf while there is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A `scheduler.Search`: one round is one run of FAB."""

    norm: str
    steps: int
    targeted: bool
    targets: int
    rounds: int
    minimal: bool
    bounds: tuple[float, float]
    loop: str
    draws: ClassVar[int] = 0

    @property
    def evaluations(self) -> int:
        """Iterations of a round."""
        return self.steps

    @property
    def chunk(self) -> int:
        """Iterations between two looks at the flags."""
        return -(-self.steps // 8)

    def begin(self, rows: scheduler.Rows) -> State:
        """At the image itself, and from the second round per target on half an eps away."""
        shape, batch = rows.x.shape, rows.x.shape[0]
        if self.norm == "linf":
            draw = lambda k: jax.random.uniform(k, shape[1:], minval=-1, maxval=1)  # noqa: E731
        else:
            draw = lambda k: jax.random.normal(k, shape[1:])  # noqa: E731
        noise = jax.vmap(draw)(rows.keys)
        length = inputs.wide(balls.norms(noise, self.norm), noise)
        moved = jnp.clip(rows.x + 0.5 * rows.eps * noise / length, *self.bounds) - rows.x
        again = (rows.rounds >= self.targets) & jnp.isfinite(rows.eps.reshape(batch))
        return State(
            i=inputs.per_example(rows.x, 0, jnp.int32),
            delta=jnp.where(inputs.wide(again, moved), moved, 0),
            best=jnp.zeros_like(rows.x),
            size=inputs.per_example(rows.x, jnp.inf),
        )

    def advance(self, logits_fn, state, rows, args):
        """Linearise, project, step, and look whether the new point is misclassified."""
        batch, shape = rows.x.shape[0], rows.x.shape
        flat = lambda a: a.reshape(batch, -1)  # noqa: E731
        wide = functools.partial(inputs.wide, like=rows.x)
        here = rows.x + state.delta
        linearise = _towards_target if self.targeted else _towards_nearest
        gap, w = linearise(logits_fn, here, rows, args, self.norm)
        offset = jnp.sum(flat(w) * flat(here), 1) - gap
        points = jnp.concatenate([flat(here), flat(rows.x)])
        moves = hyperplane.project(
            points, jnp.tile(flat(w), (2, 1)), jnp.tile(offset, 2), self.norm, self.bounds
        )
        near, origin = (m.reshape(shape) for m in jnp.split(moves, 2))
        sizes = jnp.maximum(balls.norms(moves, self.norm), 1e-8)
        alpha = jnp.minimum(sizes[:batch] / (sizes[:batch] + sizes[batch:]), _ALPHA_MAX)
        alpha = wide(alpha)
        point = (here + _OVERSHOOT * near) * (1 - alpha) + (rows.x + _OVERSHOOT * origin) * alpha
        point = jnp.clip(point, *self.bounds)
        delta = point - rows.x
        wrong = metrics.misclassified(logits_fn(point, *args), rows.labels)
        size = balls.norms(delta, self.norm)
        active = ~self._done(state, rows)
        shorter = active & wrong & (size < state.size)
        # A point beyond the boundary goes back towards the image, to meet it again from inside.
        delta = jnp.where(wide(wrong), _BACK * delta, delta)
        return State(
            i=state.i + active,
            delta=jnp.where(wide(active), delta, state.delta),
            best=jnp.where(wide(shorter), point - rows.x, state.best),
            size=jnp.where(shorter, size, state.size),
        )

    def _done(self, state, rows):
        inside = state.size <= rows.eps.reshape(-1)
        return (state.i >= self.steps) | (inside & (not self.minimal))

    def outcome(self, state, rows):
        """The shortest perturbation, if it is inside the ball."""
        ready = (not self.minimal) | (state.i >= self.steps)
        broken = (state.size <= rows.eps.reshape(-1)) & ready
        return broken, jnp.clip(rows.x + state.best, *self.bounds)


def _towards_target(logits_fn, x, rows, args, norm):
    """Gap z_t - z_y [b] and its gradient."""

    def total(x):
        logits = logits_fn(x, *args)
        gap = classifier.pick(logits, rows.targets) - classifier.pick(logits, rows.labels)
        return gap.sum(), gap

    gradient, gap = jax.grad(total, has_aux=True)(x)
    return finite_gradient(gap), finite_gradient(gradient)


def _towards_nearest(logits_fn, x, rows, args, norm):
    """Gap and gradient for the class whose linearised boundary is nearest."""
    logits, pull = jax.vjp(lambda x: logits_fn(x, *args), x)
    batch, classes = logits.shape
    own = jax.nn.one_hot(rows.labels, classes, dtype=logits.dtype)
    gaps = logits - classifier.pick(logits, rows.labels)[:, None]

    def nearer(c, best):
        gradient = finite_gradient(pull(jax.nn.one_hot(c, classes, dtype=logits.dtype) - own)[0])
        gap, length = gaps[:, c], _DUAL[norm](gradient.reshape(batch, -1))
        out = (rows.labels == c) | jnp.isnan(gap)
        distance = jnp.where(out, jnp.inf, jnp.abs(gap) / (length + 1e-12))
        closer = distance < best[0]
        keep = lambda new, old: jnp.where(inputs.wide(closer, new), new, old)  # noqa: E731
        return jax.tree.map(keep, (distance, gap, gradient), best)

    # One by one, and only the nearest kept: a thousand classes have a thousand gradients.
    none = (jnp.full_like(gaps[:, 0], jnp.inf), jnp.zeros_like(gaps[:, 0]), jnp.zeros_like(x))
    _, gap, gradient = jax.lax.fori_loop(0, classes, nearer, none)
    return finite_gradient(gap), gradient


_DUAL: dict[str, Callable] = {
    "linf": lambda g: jnp.abs(g).sum(1),
    "l2": lambda g: jnp.sqrt(jnp.square(g).sum(1)),
    "l1": lambda g: jnp.abs(g).max(1),
}


def fab(
    norm: str,
    eps: Number | None = None,
    *,
    steps: int = 100,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    loop: str = "auto",
) -> FAB:
    """FAB towards the nearest boundary; arguments as the attributes of `FAB`.

    Without `eps` it returns the smallest perturbation found.

    Raises:
        ValueError: a negative eps or, in linf, one beyond the box, fewer than one step or restart,
            an unknown norm or loop, or bounds the wrong way round.
    """
    return _fab(norm, eps, steps, None, restarts, bounds, loop)


def fab_t(
    norm: str,
    eps: Number | None = None,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    loop: str = "auto",
) -> FAB:
    """FAB towards the likeliest wrong classes, one by one; arguments as the attributes of `FAB`.

    Raises:
        ValueError: as `fab`, or fewer than one target.
    """
    targets = inputs.check_steps(targets, "targets")
    return _fab(norm, eps, steps, targets, restarts, bounds, loop)


def _fab(norm, eps, steps, targets, restarts, bounds, loop):
    balls.ball(norm)
    restarts = inputs.check_steps(restarts, "restarts")
    if eps is None and restarts > 1:
        raise ValueError(
            f"restarts must be 1 without eps, whose half is where others begin, got {restarts}"
        )
    if bounds is None:
        raise ValueError("FAB needs bounds: it projects on the box")
    bounds = inputs.check_bounds(bounds)
    inputs.check_eps(eps, norm, bounds)
    inputs.check_loop(loop)
    return FAB(
        eps=math.inf if eps is None else eps,
        norm=norm,
        steps=inputs.check_steps(steps),
        targets=targets,
        restarts=restarts,
        minimal=eps is None,
        bounds=bounds,
        loop=loop,
    )
