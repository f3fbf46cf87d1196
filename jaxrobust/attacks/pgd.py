"""Projected gradient descent and its one-step relatives: PGD, momentum PGD, FGSM and N-FGSM.

An attack is a value. Numbers (`eps`, `step_size`, `momentum`) are leaves of a pytree, so that new
ones compile nothing and `vmap` runs over them; structure (`steps`, `norm`) is static:

    attack = linf_pgd(eps=8 / 255, steps=10)
    loss_fn = lambda x, params, labels: losses.cross_entropy(model.apply(params, x), labels)
    x_adv = attack(loss_fn, x, key, args=(params, labels))
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust import balls
from jaxrobust.attacks import box, inputs, loop
from jaxrobust.attacks.value import LossFn, Number, attack_value
from jaxrobust.keys import example_keys

STARTS = ("uniform", "gaussian", "none")


@attack_value(
    data=("eps", "step_size", "momentum"), meta=("steps", "norm", "start", "bounds", "loop")
)
class PGD:
    """Projected gradient ascent on a loss; made by `linf_pgd`, `l2_pgd`, `l1_pgd`, `fgsm`.

    delta <- project(delta + step_size * ascend(grad loss(x + delta)))

    Attributes:
        eps: radius: a number, [b], or a map per pixel (`balls.broadcast_radius`).
        step_size: length of a step, as `eps`; None stands for 2.5 eps / steps.
        momentum: None, or mu >= 0: the direction is that of g <- mu g + grad / mean |grad|.
        steps: how many gradients are taken.
        norm: "linf", "l2" or "l1".
        start: "uniform" in the ball, "gaussian" of standard deviation 0.001, or "none".
        bounds: the box that x + delta stays in.
        loop: the loop's form (`attacks.loop`).

    Source: Madry et al. 2018; momentum: Dong et al. 2018, eq. 6; l1: Tramer and Boneh 2019,
    with the box-aware projection and steps of Croce and Hein 2021.
    """

    eps: Number
    step_size: Number | None = None
    momentum: Number | None = None
    steps: int
    norm: str
    start: str = "uniform"
    bounds: tuple[float, float] = (0.0, 1.0)
    loop: str = "auto"

    def __call__(
        self,
        loss_fn: LossFn,
        x: ArrayLike,
        key: Array | None = None,
        mask: ArrayLike | None = None,
        args: tuple = (),
        *,
        delta: ArrayLike | None = None,
    ) -> Array:
        """Attacks a batch.

        Args:
            loss_fn: (x, *args) -> [b] losses to raise. Pass the same function object every time,
                and what changes through `args`: then an eager call compiles once.
            x: [b, ...] float in `bounds`.
            key: one typed key, or [b]; may be None when `start` draws nothing.
            mask: broadcasts to x, 1 where a pixel may change and 0 where it must not; fractions
                scale the radius.
            args: arrays (or trees of them) that the loss takes besides x.
            delta: [b, ...] float, a start of one's own, projected first.

        Returns:
            x_adv, of x's shape and type, inside ball and box; masked pixels are bit-identical.

        Raises:
            TypeError, ValueError: names the argument, its value and what was expected.
        """
        x, mask, args = inputs.check_call(x, mask, args, self.bounds, key)
        start = self.start
        if delta is not None:
            start, delta = "given", inputs.constant(delta)
            delta = inputs.check_images(delta, inputs.ANYWHERE, "delta")
        draws = start in ("uniform", "gaussian")
        keys = example_keys(key, x.shape[0]) if draws else None
        if x.shape[0] == 0:
            return x
        carry, operands = _begin(self, start, x, keys, mask, delta)
        carry = loop.iterate(
            _step,
            carry,
            self.steps,
            operands=(*operands, args),
            static=(loss_fn, self.norm, self.momentum is not None),
            form=self.loop,
        )
        return box.finish(x, carry[0], operands[1], self.bounds)


@jax.jit(static_argnums=1)
def _begin(attack, start, x, keys, mask, delta):
    """The loop's carry (delta, velocity), and what its steps share."""
    base = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    eps = balls.broadcast_radius(attack.eps, base)
    if mask is not None:
        eps = eps * balls.broadcast_radius(mask, base, "mask")
    if attack.step_size is None:
        step = 2.5 * eps / attack.steps
    else:
        step = balls.broadcast_radius(attack.step_size, base, "step_size") * (eps > 0)
    room = box.room(base, attack.bounds)
    ball = balls.ball(attack.norm)
    if start == "uniform":
        delta = ball.sample(keys, eps, base.shape)
    elif start == "gaussian":
        delta = 1e-3 * jax.vmap(lambda k: jax.random.normal(k, base.shape[1:], base.dtype))(keys)
    elif start == "none":
        delta = jnp.zeros_like(base)
    delta = jnp.broadcast_to(jnp.asarray(delta, base.dtype), base.shape)
    delta = ball.project(delta, eps, *room)
    velocity = momentum = None
    if attack.momentum is not None:
        velocity, momentum = jnp.zeros_like(base), jnp.asarray(attack.momentum, base.dtype)
    return (delta, velocity), (base, eps, step, room, momentum)


def _step(static, i, carry, operands):
    loss_fn, norm, _ = static
    delta, velocity = carry
    base, eps, step, room, momentum, args = operands
    ball = balls.ball(norm)
    grad = finite_gradient(input_gradient(loss_fn, base + delta, args))
    if velocity is not None:
        size = jnp.abs(grad).mean(tuple(range(1, grad.ndim)), keepdims=True)
        velocity = momentum * velocity + grad / jnp.where(size > 0, size, 1)
        grad = velocity
    delta = ball.project(delta + ball.ascend(grad, step, eps, *room), eps, *room)
    return delta, velocity


def input_gradient(loss_fn: LossFn, x: Array, args: tuple = ()) -> Array:
    """The gradient d loss_i / d x_i of every example i of the batch, [b, ...], finite or not.

    Raises:
        ValueError: the loss is not one number per example.
    """
    return loss_and_gradient(loss_fn, x, args)[1]


def loss_and_gradient(loss_fn: LossFn, x: Array, args: tuple) -> tuple[Array, Array]:
    """The losses [b] and `input_gradient` of one forward and backward pass."""

    def total(x):
        losses = loss_fn(x, *args)
        if jnp.shape(losses) != (x.shape[0],):
            raise ValueError(
                f"loss_fn must return one loss per example, ({x.shape[0]},), "
                f"got shape {jnp.shape(losses)}"
            )
        return losses.sum(), losses

    grad, losses = jax.grad(total, has_aux=True)(x)
    return losses, grad


def finite_gradient(grad: Array) -> Array:
    """A gradient with 0 where it is NaN or infinite, as that of a root is at a black pixel.

    All attacks take theirs through here: one such pixel must not stop the others, nor carry the
    image out of ball and box.
    """
    return jnp.where(jnp.isfinite(grad), grad, 0)


@attack_value(data=("eps", "noise", "step_size"), meta=("start", "bounds"))
class NFGSM:
    """Noisy FGSM, a one-step training perturbation; made by `n_fgsm`.

    delta = eta + step_size * sign(grad loss(x + eta)),  eta ~ Uniform(-noise * eps, noise * eps)

    Both eta and delta are cut to the box, as in the authors' code. There is no projection on the
    ball of radius `eps`: the perturbation lies in one of radius noise * eps + step_size, which is
    what keeps one-step training from collapsing.

    With start="gaussian", eta ~ N(0, (noise * eps)^2), and only delta is cut: for noise as wide as
    the box. Where such an eta is cut before the step, all pixels at the border that the step takes
    inwards end at one and the same value, and show what the step was.

    Attributes:
        eps: the radius that is trained for: a number, [b], or a map per pixel.
        noise: k, the width of the noise in units of eps.
        step_size: alpha; None stands for eps.
        start: "uniform" or "gaussian".
        bounds: the box.

    Source: de Jorge et al. 2022 (Make some noise), algorithm 1 with k = 2, alpha = eps; the
    Gaussian start is ours.
    """

    eps: Number
    noise: Number = 2.0
    step_size: Number | None = None
    start: str = "uniform"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __call__(
        self,
        loss_fn: LossFn,
        x: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
    ) -> Array:
        """Perturbs a batch; arguments, result and errors as `PGD.__call__`."""
        x, mask, args = inputs.check_call(x, mask, args, self.bounds, key)
        keys = example_keys(key, x.shape[0])
        base, eps, step, room, eta = _n_fgsm_start(self, x, keys, mask)
        delta = _n_fgsm_step(loss_fn, base, step, room, eta, args)
        return box.finish(x, delta, eps, self.bounds)


@jax.jit
def _n_fgsm_start(attack, x, keys, mask):
    base = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    eps = balls.broadcast_radius(attack.eps, base)
    step = eps
    if attack.step_size is not None:
        step = balls.broadcast_radius(attack.step_size, base, "step_size") * (eps > 0)
    if mask is not None:  # nothing is projected here, so that it must scale both
        share = balls.broadcast_radius(mask, base, "mask")
        eps, step = eps * share, step * share
    room = box.room(base, attack.bounds)
    if attack.start == "gaussian":
        draw = jax.vmap(lambda key: jax.random.normal(key, base.shape[1:], base.dtype))
        return base, eps, step, room, attack.noise * eps * draw(keys)
    eta = balls.ball("linf").sample(keys, attack.noise * eps, base.shape)
    return base, eps, step, room, jnp.clip(eta, *room)


@jax.jit(static_argnums=0)
def _n_fgsm_step(loss_fn, base, step, room, eta, args):
    grad = finite_gradient(input_gradient(loss_fn, base + eta, args))
    return jnp.clip(eta + step * jnp.sign(grad), *room)


def pgd(
    norm: str,
    eps: Number,
    *,
    steps: int = 10,
    step_size: Number | None = None,
    momentum: Number | None = None,
    start: str = "uniform",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loop: str = "auto",
) -> PGD:
    """PGD in a norm given by its name; arguments as the attributes of `PGD`.

    Raises:
        TypeError: numbers that are none.
        ValueError: a negative eps, step size or momentum, a linf eps beyond the box, fewer than one
            step, an unknown norm, start or loop, or bounds the wrong way round.
    """
    balls.ball(norm)
    bounds = inputs.check_bounds(bounds)
    inputs.check_eps(eps, norm, bounds)
    inputs.check_number("step_size", step_size, low=0)
    inputs.check_number("momentum", momentum, low=0)
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
    inputs.check_loop(loop)
    return PGD(
        eps=eps,
        step_size=step_size,
        momentum=momentum,
        steps=inputs.check_steps(steps),
        norm=norm,
        start=start,
        bounds=bounds,
        loop=loop,
    )


def linf_pgd(eps: Number = 8 / 255, steps: int = 10, step_size: Number | None = None, **options):
    """PGD inside the linf ball of radius `eps`; more options as in `pgd`."""
    return pgd("linf", eps, steps=steps, step_size=step_size, **options)


def l2_pgd(eps: Number = 0.5, steps: int = 10, step_size: Number | None = None, **options):
    """PGD inside the l2 ball of radius `eps`; more options as in `pgd`."""
    return pgd("l2", eps, steps=steps, step_size=step_size, **options)


def l1_pgd(eps: Number = 12.0, steps: int = 10, step_size: Number | None = None, **options):
    """PGD with sparse steps inside the l1 ball of radius `eps`; more options as in `pgd`."""
    return pgd("l1", eps, steps=steps, step_size=step_size, **options)


def fgsm(eps: Number = 8 / 255, norm: str = "linf", **options) -> PGD:
    """The fast gradient sign method: one step from x to the ball's edge, in any of the norms.

    Source: Goodfellow et al. 2015.
    """
    return pgd(norm, eps, steps=1, **{"start": "none", **options})


def n_fgsm(
    eps: Number = 8 / 255,
    *,
    noise: Number = 2.0,
    step_size: Number | None = None,
    start: str = "uniform",
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> NFGSM:
    """Noisy FGSM for training; arguments as the attributes of `NFGSM`.

    Raises:
        ValueError: a negative number, another start, or bounds the wrong way round.
    """
    inputs.check_number("eps", eps, low=0)
    inputs.check_number("noise", noise, low=0)
    inputs.check_number("step_size", step_size, low=0)
    if start not in ("uniform", "gaussian"):
        raise ValueError(f'start must be "uniform" or "gaussian", got {start!r}')
    return NFGSM(
        eps=eps,
        noise=noise,
        step_size=step_size,
        start=start,
        bounds=inputs.check_bounds(bounds),
    )
