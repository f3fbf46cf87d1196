"""Minimum-norm attacks by gradient steps on a ball that grows and shrinks: DDN and FMN.

attack = fmn("linf", steps=100)
logits_fn = lambda x, params: model.apply(params, x)
x_adv = attack(logits_fn, x, labels, args=(params,))
"""

import jax
import jax.numpy as jnp

from jaxrobust import balls, bisection, losses
from jaxrobust.attacks import inputs, loop, nearest
from jaxrobust.attacks.value import Number, attack_value

NORMS = ("linf", "l2", "l1", "l0")

_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
# The logits' range in which softmax neither saturates nor goes flat. DDN scales others into it, so
# that its cross entropy has the same gradient directions at any temperature.
_SPREAD = (10.0, 20.0)
# On a linear piece the estimated distance ends exactly on the boundary: go beyond by this share.
_BEYOND = 1e-3
_TINY = 1e-30


@attack_value(data=("init_norm", "gamma"), meta=("steps", "levels", "bounds", "loop"))
class DDN(nearest.MinimumNorm):
    """Decoupled direction and norm, l2; made by `ddn`.

    delta <- eps * unit(delta + a_i unit(grad CE)),  eps <- (1 -+ gamma) eps after a success or not

    The step a_i falls from 1 to 0.01 of the box's width along half a cosine. The direction is
    that of the cross entropy's gradient at logits whose range is scaled into [10, 20] where it lies
    outside: there softmax would be flat or saturated.

    Attributes:
        init_norm: the first eps, in units of the box's width.
        gamma: by what share eps moves per step.
        steps: how many gradients are taken.
        levels: None, or how many values a pixel may have, evenly spaced over the box (256: files).
        bounds: the box.
        loop: the loop's form (`attacks.loop`).

    Source: Rony et al. 2019, algorithm 1.
    """

    init_norm: Number = 1.0
    gamma: Number = 0.05
    steps: int
    levels: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    loop: str = "auto"

    def _nearest(self, logits_fn, x, classes, mask, args, targeted):
        carry, frame, worst = _begin_ddn(self, x, classes, mask)
        x_adv, _, best = loop.iterate(
            _step_ddn,
            carry,
            self.steps,
            operands=(frame, worst, self.gamma, args),
            static=(logits_fn, targeted, self.steps, self.levels, self.bounds),
            form=self.loop,
        )
        # Pushed outwards, a pixel would leave its level.
        pushes = nearest.PUSHES if self.levels is None else (0.0,)
        ending = nearest.Ending(logits_fn, targeted, "l2", pushes)
        return nearest.finish(ending, x, frame, args, best, x_adv)


@jax.jit
def _begin_ddn(attack, x, classes, mask):
    """The loop's carry (point, eps, best), the batch, and the largest norm that there can be."""
    frame = nearest.frame(x, classes, mask, attack.bounds)
    first = jnp.asarray(attack.init_norm * nearest.widths(attack.bounds), frame.x.dtype)
    eps = inputs.per_example(frame.x, 1.0) * first
    return (jnp.copy(frame.x), eps, nearest.nothing_yet(frame)), frame, _worst(frame, "l2")


def _worst(frame, norm):
    return nearest.norms(jnp.maximum(frame.high - frame.x, frame.x - frame.low), norm)


def _step_ddn(static, i, carry, operands):
    logits_fn, targeted, steps, levels, bounds = static
    x_adv, eps, best = carry
    frame, worst, gamma, args = operands

    def climbed(logits):
        loss = losses.cross_entropy(_tempered(logits), frame.classes)
        return -loss if targeted else loss

    grad, logits = nearest.gradient(climbed, logits_fn, x_adv, args)
    best, success, _ = nearest.look(frame, best, x_adv, logits, targeted, "l2")
    grad = jnp.where(frame.high > frame.low, grad, 0)
    step = nearest.widths(bounds) * _cosine(i, steps, 1.0, 0.01)
    delta = x_adv - frame.x + step * nearest.unit(grad)
    eps = jnp.minimum(eps * jnp.where(success, 1 - gamma, 1 + gamma), worst)
    x_adv = frame.x + inputs.wide(eps, delta) * nearest.unit(delta)
    x_adv = jnp.clip(x_adv, frame.low, frame.high)
    if levels is not None:
        x_adv = jnp.where(frame.high > frame.low, _quantised(x_adv, levels, bounds), x_adv)
    return x_adv, eps, best


def _tempered(logits):
    """Logits scaled until their range lies in `_SPREAD`."""
    spread = jax.lax.stop_gradient(logits.max(1, keepdims=True) - logits.min(1, keepdims=True))
    return logits * (jnp.clip(spread, *_SPREAD) / jnp.maximum(spread, _TINY))


def _quantised(x, levels, bounds):
    low, high = bounds
    return low + jnp.round((x - low) / (high - low) * (levels - 1)) / (levels - 1) * (high - low)


def _cosine(i, steps, first, last):
    """From `first` at step 0 down to `last` at step `steps`, along half a cosine."""
    return last + (first - last) * (1 + jnp.cos(jnp.pi * i / steps)) / 2


@attack_value(data=("step_size", "gamma"), meta=("norm", "steps", "bounds", "loop"))
class FMN(nearest.MinimumNorm):
    """Fast minimum norm, in linf, l2, l1 or l0; made by `fmn`.

    delta <- project_eps(delta + a_i unit(grad margin)),  until a first success eps is the norm plus
    the distance to the linearised boundary, afterwards (1 -+ gamma_i) eps

    Steps and gammas fall along half a cosine, to 1 % and to 0.001. Pixels that the box stops count
    neither for the direction nor for the distance, and the distance is taken 0.1 % longer: else eps
    stalls before the boundary where many pixels are black or white, or where the net is linear.

    Attributes:
        step_size: the first step's l2 length, in units of the box's width.
        gamma: by what share eps moves in the first step.
        norm: "linf", "l2", "l1" or "l0" (how many numbers of an image change).
        steps: how many gradients are taken.
        bounds: the box.
        loop: the loop's form (`attacks.loop`).

    Source: Pintor et al. 2021, algorithm 1; the two changes of the distance are ours.
    """

    step_size: Number = 1.0
    gamma: Number = 0.05
    norm: str
    steps: int
    bounds: tuple[float, float] = (0.0, 1.0)
    loop: str = "auto"

    def _nearest(self, logits_fn, x, classes, mask, args, targeted):
        carry, frame, worst = _begin_fmn(self, x, classes, mask)
        x_adv, _, best = loop.iterate(
            _step_fmn,
            carry,
            self.steps,
            operands=(frame, worst, self.step_size, self.gamma, args),
            static=(logits_fn, targeted, self.norm, self.steps, nearest.widths(self.bounds)),
            form=self.loop,
        )
        ending = nearest.Ending(logits_fn, targeted, self.norm)
        return nearest.finish(ending, x, frame, args, best, x_adv)


@jax.jit
def _begin_fmn(attack, x, classes, mask):
    frame = nearest.frame(x, classes, mask, attack.bounds)
    eps = inputs.per_example(frame.x, 1.0 if attack.norm == "l0" else jnp.inf)
    worst = _worst(frame, attack.norm)
    return (jnp.copy(frame.x), eps, nearest.nothing_yet(frame)), frame, worst


def _step_fmn(static, i, carry, operands):
    logits_fn, targeted, norm, steps, width = static
    x_adv, eps, best = carry
    frame, worst, step_size, gamma, args = operands
    margin_of = lambda logits: nearest.margin(logits, frame.classes, targeted)  # noqa: E731
    grad, logits = nearest.gradient(margin_of, logits_fn, x_adv, args)
    stopped = ((x_adv <= frame.low) & (grad <= 0)) | ((x_adv >= frame.high) & (grad >= 0))
    grad = jnp.where(stopped, 0, grad)
    best, success, size = nearest.look(frame, best, x_adv, logits, targeted, norm)
    gamma = _cosine(i, steps, gamma, 0.001)
    if norm == "l0":
        eps = _next_count(eps, gamma, success, best)
    else:
        slope = jnp.maximum(balls.norms(grad, _DUAL[norm]), _TINY)
        reach = (size + jnp.abs(margin_of(logits)) / slope) * (1 + _BEYOND)
        reach = jnp.where(jnp.isnan(reach), jnp.inf, reach)
        eps = _next_radius(eps, gamma, success, best, reach)
    eps = jnp.minimum(eps, worst)
    step = width * _cosine(i, steps, step_size, step_size / 100)
    delta = x_adv - frame.x + step * nearest.unit(grad)
    delta = _projected(norm, delta, inputs.wide(eps, delta), frame)
    return jnp.clip(frame.x + delta, frame.low, frame.high), eps, best


def _next_radius(eps, gamma, success, best, reach):
    more = jnp.where(jnp.isfinite(best.norm), eps * (1 + gamma), reach)
    return jnp.where(success, jnp.minimum(eps * (1 - gamma), best.norm), more)


def _next_count(eps, gamma, success, best):
    less = jnp.minimum(jnp.minimum(eps - 1, jnp.floor(eps * (1 - gamma))), best.norm)
    more = jnp.maximum(eps + 1, jnp.floor(eps * (1 + gamma)))
    return jnp.maximum(jnp.where(success, less, more), 0)


def _projected(norm, delta, eps, frame):
    """The nearest perturbation of norm <= eps; but in l2 and l0 inside the box too."""
    low, high = frame.low - frame.x, frame.high - frame.x
    if norm == "l0":
        return _largest(delta, eps)
    return balls.ball(norm).project(delta, eps, low, high)


def _largest(delta, eps):
    """Its `eps` largest entries, and all that equal the last of them; 0 elsewhere."""
    size = jnp.abs(delta).reshape(delta.shape[0], -1)
    least = inputs.wide(bisection.kth_largest(size, eps.ravel()), delta)
    return jnp.where(jnp.abs(delta) >= least, delta, 0)


def ddn(
    steps: int = 100,
    *,
    init_norm: Number = 1.0,
    gamma: Number = 0.05,
    levels: int | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loop: str = "auto",
) -> DDN:
    """DDN, a minimum-norm attack in l2; arguments as the attributes of `DDN`.

    Raises:
        ValueError: fewer than one step, init_norm or gamma <= 0, fewer than two levels or levels
            without bounds, bounds the wrong way round, or an unknown loop.
    """
    if levels is not None:
        levels = inputs.check_steps(levels, "levels", low=2)
    inputs.check_number("init_norm", init_norm, low=0, strict=True)
    inputs.check_number("gamma", gamma, low=0, strict=True)
    inputs.check_loop(loop)
    return DDN(
        init_norm=init_norm,
        gamma=gamma,
        steps=inputs.check_steps(steps),
        levels=levels,
        bounds=inputs.check_bounds(bounds, finite=levels is not None),
        loop=loop,
    )


def fmn(
    norm: str,
    steps: int = 100,
    *,
    step_size: Number = 1.0,
    gamma: Number = 0.05,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loop: str = "auto",
) -> FMN:
    """FMN, a minimum-norm attack in linf, l2, l1 or l0; arguments as the attributes of `FMN`.

    Raises:
        ValueError: an unknown norm or loop, fewer than one step, a step size or gamma <= 0, or
            bounds the wrong way round.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    inputs.check_number("step_size", step_size, low=0, strict=True)
    inputs.check_number("gamma", gamma, low=0, strict=True)
    inputs.check_loop(loop)
    return FMN(
        step_size=step_size,
        gamma=gamma,
        norm=norm,
        steps=inputs.check_steps(steps),
        bounds=inputs.check_bounds(bounds),
        loop=loop,
    )
