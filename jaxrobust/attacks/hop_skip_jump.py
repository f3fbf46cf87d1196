"""HopSkipJump: a minimum-norm attack that sees nothing of a model but the classes it predicts."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust.attacks import inputs, loop, nearest
from jaxrobust.attacks.value import attack_value
from jaxrobust.keys import example_keys, fold

NORMS = ("linf", "l2")
# Blends of an image and its random start that are looked at, and how often a start is drawn anew.
_BLENDS = 50
_DRAWS = 1000
# A step is halved so often at most; then the example stays where it is.
_HALVINGS = 30


@attack_value(
    data=(), meta=("norm", "steps", "evaluations", "max_evaluations", "chunk", "gamma", "bounds")
)
class HopSkipJump:
    """A walk along the decision boundary; made by `hop_skip_jump`.

    Each step estimates the boundary's normal from the classes of noisy copies, jumps along it to
    the adversarial side, and returns to the boundary by bisection towards x.

    Attributes:
        norm: "l2" or "linf", what is made small.
        steps: how many jumps.
        evaluations: noisy copies in the first step; in step t (from 0) sqrt(t + 1) times as many.
        max_evaluations: the most noisy copies of a step.
        chunk: noisy copies per call of the model; their number is rounded to whole chunks.
        gamma: the bisection ends at gamma / d^1.5 of the way (l2) or gamma / d^2 of the distance
            (linf), for d numbers in an image.
        bounds: the box, finite: starts are drawn from it.

    Source: Chen et al. 2020 (HopSkipJumpAttack), algorithm 2.
    """

    norm: str
    steps: int
    evaluations: int
    max_evaluations: int
    chunk: int
    gamma: float
    bounds: tuple[float, float]

    def __call__(
        self,
        logits_fn: nearest.LogitsFn,
        x: ArrayLike,
        labels: ArrayLike,
        key: Array | None = None,
        mask: ArrayLike | None = None,
        args: tuple = (),
        targets: ArrayLike | None = None,
        *,
        starts: ArrayLike | None = None,
    ) -> Array:
        """Attacks a batch.

        Args:
            logits_fn: (x, *args) -> [b, classes], of which only the largest entry's place is used.
            x: [b, ...] float in `bounds`.
            labels: [b] the true classes.
            key: one typed key, or [b]; needed.
            mask: broadcasts to x; a pixel may change where it is > 0.
            args: arrays (or trees of them) that `logits_fn` takes besides x.
            targets: None, or [b] classes to reach. Noise is rarely of a given class: give `starts`.
            starts: [b, ...] images, in `bounds`, that already are what the attack wants; drawn
                uniformly from the box by default. Rows without a start come back as they are.

        Returns:
            x_adv, of x's shape and type: the nearest found, or x bit for bit.

        Raises:
            TypeError, ValueError: names the argument, its value and what was expected.
        """
        call = nearest.checked(logits_fn, x, labels, mask, args, targets, self.bounds)
        x, classes, mask, args, targeted = call
        if starts is not None:
            starts = inputs.check_images(inputs.constant(starts), self.bounds)
            if starts.shape != x.shape:
                raise ValueError(f"starts must have x's shape {x.shape}, got {starts.shape}")
        keys = example_keys(key, x.shape[0])
        if x.shape[0] == 0:
            return x
        static = (logits_fn, targeted, self)
        carry, operands = _begin(static, x, classes, mask, keys, starts, args)
        carry = loop.iterate(
            _hop, carry, self.steps, operands=operands, static=static, form="fused"
        )
        ending = nearest.Ending(logits_fn, targeted, self.norm, nearest.HARD_PUSHES, by_class=True)
        return nearest.finish(ending, x, operands[0], args, carry[-1])


@functools.partial(jax.jit, static_argnums=0)
def _begin(static, x, classes, mask, keys, starts, args):
    """The loop's carry (point on the boundary, whether there is one, best), and what is shared."""
    _, _, attack = static
    frame = nearest.frame(x, classes, mask, attack.bounds)
    is_adv = _oracle(static, frame, args)
    start_keys, keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
    done = is_adv(frame.x)
    zero = inputs.per_example(frame.x, 0.0)
    best = nearest.nearer(nearest.nothing_yet(frame), frame.x, zero, done)
    if starts is None:
        start, found = _draw(is_adv, frame, start_keys, attack.bounds, done)
        start = _first_blend(is_adv, frame, start, found)
    else:
        start = jnp.clip(starts.astype(frame.x.dtype), frame.low, frame.high)
        found = is_adv(start)
    point = _to_boundary(attack, is_adv, frame, start)
    best = nearest.nearer(best, point, nearest.norms(point - frame.x, attack.norm), found)
    return (point, found & ~done, best), (frame, keys, args)


def _oracle(static, frame, args) -> Callable[[Array], Array]:
    """Whether images are what the attack wants, by their class alone: [b, ...] or [n * b, ...]."""
    logits_fn, targeted, _ = static

    def is_adv(x):
        classes = jnp.tile(frame.classes, x.shape[0] // frame.classes.shape[0])
        return (logits_fn(x, *args).argmax(1) == classes) == targeted

    return is_adv


def _draw(is_adv, frame, keys, bounds, done):
    """Uniform noise, drawn anew for each example until the attack could start there."""

    def draw(state):
        i, start, found = state
        own = fold(keys, i)
        shape, dtype = frame.x.shape[1:], frame.x.dtype
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, *bounds))(own)
        start = jnp.where(inputs.wide(found, start), start, jnp.clip(noise, frame.low, frame.high))
        return i + 1, start, found | is_adv(start)

    more = lambda state: (state[0] < _DRAWS) & ~(state[2] | done).all()  # noqa: E731
    _, start, found = jax.lax.while_loop(more, draw, (0, frame.x, jnp.zeros_like(done)))
    return start, found


def _first_blend(is_adv, frame, start, found):
    """The first point on the straight way from x to its start that is adversarial."""

    def look(state):
        i, share, open_ = state
        hit = open_ & is_adv(_blend(frame, start, jnp.full_like(share, i / _BLENDS)))
        return i + 1, jnp.where(hit, i / _BLENDS, share), open_ & ~hit

    more = lambda state: (state[0] < _BLENDS) & state[2].any()  # noqa: E731
    share = inputs.per_example(frame.x, 1.0)
    _, share, _ = jax.lax.while_loop(more, look, (1, share, found))
    return _blend(frame, start, share)


def _blend(frame, point, share):
    """`share` of the way from x to the point; the point itself at 1."""
    share = inputs.wide(share, point)
    return jnp.where(share < 1, frame.x + share * (point - frame.x), point)


def _to_boundary(attack, is_adv, frame, point):
    """Back towards x by bisection, as far as the class allows."""
    d = math.prod(point.shape[1:])
    theta = attack.gamma / (d**1.5 if attack.norm == "l2" else d**2)
    if attack.norm == "l2":
        at = functools.partial(_blend, frame, point)
        high = inputs.per_example(frame.x, 1.0)
    else:
        high = nearest.norms(point - frame.x, "linf")

        def at(radius):
            radius = inputs.wide(radius, point)
            return frame.x + jnp.clip(point - frame.x, -radius, radius)

    def halve(_, state):
        low, high, nearest_one = state
        middle = (low + high) / 2
        candidate = at(middle)
        hit = is_adv(candidate)
        kept = jnp.where(inputs.wide(hit, point), candidate, nearest_one)
        return jnp.where(hit, low, middle), jnp.where(hit, middle, high), kept

    count = max(1, math.ceil(-math.log2(min(theta, 0.5))))
    # More halvings than a float has digits change nothing.
    state = (jnp.zeros_like(high), high, point)
    return jax.lax.fori_loop(0, min(count, 24), halve, state)[2]


def _hop(static, i, carry, operands):
    """One step: estimate the normal, jump, return to the boundary."""
    _, _, attack = static
    point, active, best = carry
    frame, keys, args = operands
    is_adv = _oracle(static, frame, args)
    distance = nearest.norms(point - frame.x, attack.norm)
    radius = attack.gamma * distance / math.prod(point.shape[1:])
    radius = jnp.where(i == 0, 0.1 * nearest.widths(attack.bounds), radius)
    keys = fold(keys, i)
    direction = _normal(attack, is_adv, frame, point, radius, keys, i)
    if attack.norm == "linf":
        direction = jnp.sign(direction)
    length = distance / jnp.sqrt(i + 1.0).astype(distance.dtype)
    moved, jumped = _jump(is_adv, frame, point, direction, length, active)
    back = _to_boundary(attack, is_adv, frame, moved)
    point = jnp.where(inputs.wide(jumped, point), back, point)
    best = nearest.nearer(best, point, nearest.norms(point - frame.x, attack.norm), active)
    return point, active, best


def _normal(attack, is_adv, frame, point, radius, keys, i):
    """The direction in which noisy copies of the point are adversarial most often, [b, ...]."""
    chunk, shape = attack.chunk, point.shape[1:]
    noise = jax.random.normal
    if attack.norm == "linf":
        noise = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)
    free, radius = frame.high > frame.low, jnp.maximum(inputs.wide(radius, point), 1e-12)

    def look(c, sums):
        own = fold(keys, c)
        draw = jax.vmap(lambda key: noise(key, (chunk, *shape), point.dtype), out_axes=1)
        step = jax.vmap(nearest.unit)(jnp.where(free, draw(own), 0))  # [chunk, b, ...]
        copies = jnp.clip(point + radius * step, frame.low, frame.high)
        step = (copies - point) / radius
        hit = is_adv(copies.reshape(-1, *shape)).reshape(step.shape[:2])
        vote = jnp.where(hit, 1.0, -1.0).astype(point.dtype)
        votes, voted, steps = sums
        weighted = vote.reshape(*vote.shape, *(1,) * len(shape)) * step
        return votes + vote.sum(0), voted + weighted.sum(0), steps + step.sum(0)

    most = jnp.minimum(attack.evaluations * jnp.sqrt(i + 1.0), attack.max_evaluations)
    chunks = jnp.maximum(jnp.round(most / chunk), 1).astype(int)
    zero = jnp.zeros_like(point)
    votes, voted, steps = jax.lax.fori_loop(
        0, chunks, look, (inputs.per_example(frame.x, 0.0), zero, zero)
    )
    count = (chunks * chunk).astype(point.dtype)
    mean = inputs.wide(votes / count, point)
    # Where all agree there is no contrast: then simply away from, or along, all of them.
    return nearest.unit(voted - jnp.where(jnp.abs(mean) < 1, mean, 0) * steps)


def _jump(is_adv, frame, point, direction, length, active):
    """Along the direction, half as far each time until the class is right; and whether it was."""

    def halve(state):
        i, length, moved, done = state
        candidate = point + inputs.wide(length, point) * direction
        candidate = jnp.clip(candidate, frame.low, frame.high)
        hit = ~done & is_adv(candidate)
        return i + 1, length / 2, jnp.where(inputs.wide(hit, point), candidate, moved), done | hit

    more = lambda state: (state[0] < _HALVINGS) & ~state[3].all()  # noqa: E731
    _, _, moved, done = jax.lax.while_loop(more, halve, (0, length, point, ~active))
    return moved, done & active


def hop_skip_jump(
    norm: str = "l2",
    steps: int = 64,
    *,
    evaluations: int = 100,
    max_evaluations: int = 10_000,
    chunk: int = 20,
    gamma: float = 1.0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> HopSkipJump:
    """HopSkipJump in l2 or linf; arguments as the attributes of `HopSkipJump`.

    Raises:
        ValueError: an unknown norm, a count below 1, gamma <= 0, or bounds that are not finite.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    evaluations = inputs.check_steps(evaluations, "evaluations")
    inputs.check_number("gamma", gamma, low=0, strict=True)
    return HopSkipJump(
        norm=norm,
        steps=inputs.check_steps(steps),
        evaluations=evaluations,
        max_evaluations=inputs.check_steps(max_evaluations, "max_evaluations"),
        chunk=min(inputs.check_steps(chunk, "chunk"), evaluations),
        gamma=gamma,
        bounds=inputs.check_bounds(bounds, finite=True),
    )
