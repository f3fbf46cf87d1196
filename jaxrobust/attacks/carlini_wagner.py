"""The l2 attack of Carlini and Wagner: Adam in tanh space, its trade-off found by bisection."""

import functools

import jax
import jax.numpy as jnp

from jaxrobust import balls
from jaxrobust.attacks import inputs, loop, nearest
from jaxrobust.attacks.pgd import finite_gradient
from jaxrobust.attacks.value import Number, attack_value

# Images are drawn in from the box's faces by this share before arctanh, which is infinite there.
_EDGE = 1e-6
# Adam's decays and its guard (Kingma and Ba 2015).
_BETA1, _BETA2, _GUARD = 0.9, 0.999, 1e-8
# By what c grows while no search has succeeded yet.
_GROWTH = 10.0
_TINY = 1e-30


@attack_value(
    data=("step_size", "confidence", "trade_off"), meta=("searches", "steps", "bounds", "loop")
)
class CWL2(nearest.MinimumNorm):
    """Carlini and Wagner's minimum-norm attack, l2; made by `cw_l2`.

    minimise ||x(w) - x||^2 + c max(confidence - margin(x(w)), 0),  x(w) = box(tanh(w))

    by Adam from w(x), once per search; c rises tenfold until a search succeeds and is bisected from
    then on, per example. The first c is `trade_off` times the one at which a linear classifier of
    x's margin and gradient would just be crossed, 2 |margin| / |gradient|^2, so that the scale of
    the logits does not matter.

    Attributes:
        step_size: Adam's, in tanh space.
        confidence: margin that a success must have, in the unit of the logits.
        trade_off: the first c, in the unit above.
        searches: how many c are tried.
        steps: how many gradients each search takes.
        bounds: the box, finite.
        loop: the loop's form (`attacks.loop`).

    Source: Carlini and Wagner 2017, section VI A; the unit of c is ours.
    """

    step_size: Number = 0.01
    confidence: Number = 0.0
    trade_off: Number = 1.0
    searches: int
    steps: int
    bounds: tuple[float, float] = (0.0, 1.0)
    loop: str = "auto"

    def _nearest(self, logits_fn, x, classes, mask, args, targeted):
        carry, operands = _begin((logits_fn, targeted), self, x, classes, mask, args)
        carry = loop.iterate(
            _step,
            carry,
            self.searches * self.steps,
            operands=operands,
            static=(logits_fn, targeted, self.steps, self.bounds),
            form=self.loop,
        )
        ending = nearest.Ending(logits_fn, targeted, "l2")
        return nearest.finish(ending, x, operands[0], args, carry[-1])


@functools.partial(jax.jit, static_argnums=0)
def _begin(static, attack, x, classes, mask, args):
    """The loop's carry (w - w(x), Adam's two means, the search, best), and what steps share."""
    logits_fn, targeted = static
    frame = nearest.frame(x, classes, mask, attack.bounds)
    low, high = attack.bounds
    inner = jnp.clip(2 * (frame.x - low) / (high - low) - 1, -1, 1)
    start = jnp.arctanh(inner * (1 - _EDGE))
    margin_of = lambda logits: nearest.margin(logits, classes, targeted)  # noqa: E731
    grad, logits = nearest.gradient(margin_of, logits_fn, frame.x, args)
    best, _, _ = nearest.look(frame, nearest.nothing_yet(frame), frame.x, logits, targeted, "l2")
    slope = balls.norms(jnp.where(frame.high > frame.low, grad, 0), "l2")
    slope = jnp.where(slope > 0, slope, 1)
    c = attack.trade_off * 2 * jnp.maximum(jnp.abs(margin_of(logits)), _TINY) / slope / slope
    search = (c, jnp.zeros_like(c), jnp.full_like(c, jnp.inf), jnp.zeros_like(c, bool))
    shift, mean, square = (jnp.zeros_like(start) for _ in range(3))
    shared = (frame, start, attack.step_size, attack.confidence, args)
    return (shift, mean, square, search, best), shared


def _step(static, i, carry, operands):
    logits_fn, targeted, steps, bounds = static
    frame, start, step_size, confidence, args = operands
    *adam, search, best = carry
    j = i % steps
    ends = (j == 0) & (i > 0)
    search = jax.tree.map(lambda new, old: jnp.where(ends, new, old), _next(search), search)
    shift, mean, square = (jnp.where(j == 0, 0, value) for value in adam)
    c, low, high, found = search

    def objective(shift):
        x_adv = jnp.where(frame.high > frame.low, _image(start + shift, bounds), frame.x)
        logits = logits_fn(x_adv, *args)
        margin = nearest.margin(logits, frame.classes, targeted)
        distance = nearest.total(jnp.square(x_adv - frame.x))
        losses = distance + c * jnp.maximum(confidence - margin, 0)
        return losses.sum(), (x_adv, logits, margin, jnp.sqrt(distance))

    (_, seen), grad = jax.value_and_grad(objective, has_aux=True)(shift)
    grad = finite_gradient(grad)
    x_adv, logits, margin, size = seen
    moved = jnp.ones(size.shape, bool)
    success = nearest.succeeded(logits, frame.classes, targeted, moved) & (margin >= confidence)
    best = nearest.nearer(best, x_adv, size, success)
    mean = _BETA1 * mean + (1 - _BETA1) * grad
    square = _BETA2 * square + (1 - _BETA2) * jnp.square(grad)
    root = jnp.sqrt(square / (1 - _BETA2 ** (j + 1)))
    shift = shift - step_size * mean / (1 - _BETA1 ** (j + 1)) / (root + _GUARD)
    return shift, mean, square, (c, low, high, found | success), best


def _image(w, bounds):
    low, high = bounds
    return jnp.clip(low + (jnp.tanh(w) + 1) * ((high - low) / 2), low, high)


def _next(search):
    """The c to try next, between the largest that failed and the smallest that succeeded."""
    c, low, high, found = search
    low, high = jnp.where(found, low, c), jnp.where(found, c, high)
    c = jnp.where(jnp.isfinite(high), (low + high) / 2, c * _GROWTH)
    return c, low, high, jnp.zeros_like(found)


def cw_l2(
    searches: int = 9,
    steps: int = 200,
    *,
    step_size: Number = 0.01,
    confidence: Number = 0.0,
    trade_off: Number = 1.0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loop: str = "auto",
) -> CWL2:
    """Carlini and Wagner's l2 attack; arguments as the attributes of `CWL2`.

    Raises:
        ValueError: a count below 1, a step size or trade-off <= 0, confidence < 0, bounds that are
            not finite, or an unknown loop.
    """
    inputs.check_number("step_size", step_size, low=0, strict=True)
    inputs.check_number("confidence", confidence, low=0)
    inputs.check_number("trade_off", trade_off, low=0, strict=True)
    inputs.check_loop(loop)
    return CWL2(
        step_size=step_size,
        confidence=confidence,
        trade_off=trade_off,
        searches=inputs.check_steps(searches, "searches"),
        steps=inputs.check_steps(steps),
        bounds=inputs.check_bounds(bounds, finite=True),
        loop=loop,
    )
