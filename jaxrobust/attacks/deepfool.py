"""DeepFool: straight to the nearest boundary of the linearised network, again and again."""

import functools

import jax
import jax.numpy as jnp

from jaxrobust import balls
from jaxrobust.attacks import inputs, loop, nearest
from jaxrobust.attacks.pgd import finite_gradient
from jaxrobust.attacks.value import Number, attack_value

NORMS = ("linf", "l2")

# Added to every step, in units of the box's width: the authors' 1e-4.
_LEAST_STEP = 1e-4
_TINY = 1e-30


@attack_value(data=("overshoot",), meta=("norm", "steps", "candidates", "bounds", "loop"))
class DeepFool(nearest.MinimumNorm):
    """DeepFool, in l2 or linf; made by `deepfool`.

    x <- x + (1 + overshoot) (|z_k - z_y| / ||g_k||_dual) d(g_k),  g_k = grad (z_k - z_y)

    for the wrong class k whose linearised boundary is nearest; d is the direction of steepest
    ascent in the norm. An example stops at its first success.

    Attributes:
        overshoot: by what share a step goes beyond the linearised boundary.
        norm: "l2" or "linf".
        steps: how many steps at most; once all examples have stopped, further ones cost nothing.
        candidates: how many of the likeliest wrong classes are looked at; None for all.
        bounds: the box.
        loop: the loop's form (`attacks.loop`).

    Source: Moosavi-Dezfooli et al. 2016, algorithm 2.
    """

    overshoot: Number = 0.02
    norm: str
    steps: int
    candidates: int | None = 10
    bounds: tuple[float, float] = (0.0, 1.0)
    loop: str = "auto"

    def _nearest(self, logits_fn, x, classes, mask, args, targeted):
        carry, operands = _begin((logits_fn, targeted), self, x, classes, mask, args)
        carry = loop.iterate(
            _step,
            carry,
            self.steps,
            operands=operands,
            static=(logits_fn, targeted, self.norm, self.bounds),
            form=self.loop,
        )
        ending = nearest.Ending(logits_fn, targeted, self.norm)
        return nearest.finish(ending, x, operands[0], args, carry[-1], carry[0])


@functools.partial(jax.jit, static_argnums=0)
def _begin(static, attack, x, classes, mask, args):
    """The loop's carry (point, whether it has stopped, best), and what its steps share.

    Every example moves along differences z_up - z_down, of [b, k] or [b, 1] classes each: from its
    label to each of k wrong classes, or from each of k other classes to its target.
    """
    logits_fn, targeted = static
    frame = nearest.frame(x, classes, mask, attack.bounds)
    logits = logits_fn(frame.x, *args)
    own = jax.nn.one_hot(classes, logits.shape[1], dtype=bool)
    count = min(logits.shape[1] - 1, attack.candidates or logits.shape[1])
    others = jax.lax.top_k(jnp.where(own, -jnp.inf, logits), count)[1]
    hot = functools.partial(jax.nn.one_hot, num_classes=logits.shape[1], dtype=logits.dtype)
    sign = -1 if targeted else 1
    differences = sign * jnp.moveaxis(hot(others) - hot(classes)[:, None], 1, 0)
    carry = (
        jnp.copy(frame.x),
        inputs.per_example(frame.x, False, bool),
        nearest.nothing_yet(frame),
    )
    return carry, (frame, differences, attack.overshoot, args)


def _step(static, i, carry, operands):
    stay = lambda carry, _: carry  # noqa: E731
    return jax.lax.cond(carry[1].all(), stay, functools.partial(_move, static), carry, operands)


def _move(static, carry, operands):
    logits_fn, targeted, norm, bounds = static
    x_adv, done, best = carry
    frame, differences, overshoot, args = operands
    logits, pull = jax.vjp(lambda x: logits_fn(x, *args), x_adv)
    best, success, _ = nearest.look(frame, best, x_adv, logits, targeted, norm)
    done = done | success
    grads = jax.vmap(lambda difference: pull(difference)[0])(differences)  # [k, b, ...]
    grads = jnp.where(frame.high > frame.low, finite_gradient(grads), 0)
    gaps = (differences * logits).sum(2)  # [k, b], < 0 before its boundary
    size_of = functools.partial(balls.norms, norm="l2" if norm == "l2" else "l1")
    distances = jnp.abs(gaps) / jnp.maximum(jax.vmap(size_of)(grads), _TINY)
    distances = jnp.where(jnp.isnan(distances), jnp.inf, distances)
    # A target has to pass all others: first the one that is furthest ahead.
    chosen = gaps.argmin(0) if targeted else distances.argmin(0)
    distance, grad = _pick(distances, chosen), _pick(grads, chosen)
    direction = nearest.unit(grad) if norm == "l2" else jnp.sign(grad)
    distance = jnp.where(jnp.isinf(distance), 0, distance)  # no boundary is in sight
    length = (1 + overshoot) * (distance + _LEAST_STEP * nearest.widths(bounds))
    moved = jnp.clip(x_adv + inputs.wide(length, grad) * direction, frame.low, frame.high)
    return jnp.where(inputs.wide(done, x_adv), x_adv, moved), done, best


def _pick(values, chosen):
    """From [k, b, ...] the chosen one of each example, [b, ...]."""
    return jnp.take_along_axis(values, inputs.wide(chosen, values[0])[None], 0)[0]


def deepfool(
    norm: str = "l2",
    steps: int = 50,
    *,
    candidates: int | None = 10,
    overshoot: Number = 0.02,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loop: str = "auto",
) -> DeepFool:
    """DeepFool in l2 or linf; arguments as the attributes of `DeepFool`.

    Raises:
        ValueError: an unknown norm or loop, a count below 1, a negative overshoot, or bounds the
            wrong way round.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if candidates is not None:
        candidates = inputs.check_steps(candidates, "candidates")
    inputs.check_number("overshoot", overshoot, low=0)
    inputs.check_loop(loop)
    return DeepFool(
        overshoot=overshoot,
        norm=norm,
        steps=inputs.check_steps(steps),
        candidates=candidates,
        bounds=inputs.check_bounds(bounds),
        loop=loop,
    )
