"""What a step trains for: standard, PGD adversarial training, TRADES, MART and guarded N-FGSM.

An objective is two pure functions. `perturb` makes the adversarial batch, in inference mode and in
float32 unless the step says otherwise; `loss` is what the optimizer lowers, in training mode. A
third one is optional: `move_weights`, which `with_awp` adds, moves the weights before the gradient
is taken. A method of one's own is made of the same functions.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust import identity, losses, parallel
from jaxrobust.attacks.inputs import check_number
from jaxrobust.attacks.wrap import check_takes_loss

PyTree = Any
Schedule = Callable[[Array], Array]
_P = ParamSpec("_P")


class Context(NamedTuple):
    """What an objective may look at.

    Attributes:
        apply: x -> logits, the model in inference mode at the step's weights, through which no
            gradient reaches them; takes the `taps` and `perturbations` of `Model.apply` too.
        keys: [b], one per example.
        step: the number of the training step.
        extra: `TrainState.extra`.
        axis_name: the mesh axis, or None.
        salience: [b, h, w, 1] the batch's maps, augmented with their images; None without.
        mask: what the attack is given: 1 where a pixel may change; None for everywhere.
    """

    apply: Callable[..., Any]
    keys: Array
    step: Array
    extra: PyTree
    axis_name: str | None
    salience: Array | None = None
    mask: Array | None = None


class Objective(NamedTuple):
    """A training method.

    Attributes:
        perturb: (context, images, labels) -> (x_adv, extra, metrics).
        loss: (context, forward, images, x_adv, labels) -> ([b] losses, metrics, batch_stats), where
            forward(x) -> (logits, batch_stats) runs in training mode and takes the `taps` of
            `Model.train`. Metrics are scalars of this device's examples, {"accuracy": ...}.
        extra: what the method keeps in `TrainState.extra`.
        move_weights: None, or (gradient_fn, params, step) -> the weights at which the gradient is
            taken.
        config: what it was made of (`described`), by which runs are told apart; None if unknown.
    """

    perturb: Callable[..., tuple[Array, PyTree, dict]]
    loss: Callable[..., tuple[Array, dict, PyTree]]
    extra: PyTree = None
    move_weights: Callable[..., PyTree] | None = None
    config: dict[str, Any] | None = None


def described(factory: Callable[_P, Objective]) -> Callable[_P, Objective]:
    """A factory whose objectives have its name and arguments as their `config`."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def made(*args: _P.args, **options: _P.kwargs) -> Objective:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        config = {"name": factory.__name__, **identity.describe(dict(bound.arguments))}
        return factory(*args, **options)._replace(config=config)

    return made


@described
def standard(label_smoothing: float = 0.0) -> Objective:
    """Ordinary training on clean images."""

    def perturb(context, images, labels):
        return images, context.extra, {}

    return Objective(perturb, _cross_entropy_at_x_adv(label_smoothing))


@described
def adversarial(
    attack: Any, *, eps_schedule: Schedule | None = None, label_smoothing: float = 0.0
) -> Objective:
    """Adversarial training: cross entropy on what `attack` makes of the batch.

    Args:
        attack: any gradient attack, such as `linf_pgd(8 / 255)` or `n_fgsm(8 / 255)`.
        eps_schedule: step -> factor on the attack's `eps` (and `step_size`, where one is set),
            such as `optax.linear_schedule(0, 1, 1000)`: large radii may need a warm-up.
        label_smoothing: of the training loss, in [0, 1).

    Raises:
        ValueError: a schedule for an attack without an eps of its own.

    Source: Madry et al. 2018, eq. 2.1.
    """
    check_attack(attack, eps_schedule)

    def perturb(context, images, labels):
        x_adv = _attacked(attack, eps_schedule, context, images, labels)
        return x_adv, context.extra, {}

    return Objective(perturb, _cross_entropy_at_x_adv(label_smoothing))


@described
def trades(attack: Any, beta: float = 6.0, *, eps_schedule: Schedule | None = None) -> Objective:
    """TRADES: cross entropy on x plus beta KL(p(x) || p(x_adv)), x_adv the ascent of that KL.

    Args:
        attack: `linf_pgd(0.031, steps=10, step_size=0.007, start="gaussian")` in the paper; from
            x itself the KL has no gradient, so the start must not be "none".
        beta: weight of the KL term, >= 0.
        eps_schedule: as for `adversarial`.

    Raises:
        ValueError: beta < 0, a schedule for an attack without an eps of its own, or an attack that
            starts at x.

    Both halves pass the network as one batch, so BatchNorm sees their common statistics.

    Source: Zhang et al. 2019, eq. 5 and algorithm 1.
    """
    check_number("beta", beta, low=0)
    check_attack(attack, eps_schedule)
    check_starts_off(attack, "the divergence from x's own answer")

    def perturb(context, images, labels):
        scaled = scaled_attack(attack, eps_schedule, context.step)
        clean = context.apply(images)
        loss_fn = lambda x, clean: losses.trades_kl(clean, context.apply(x))  # noqa: E731
        x_adv = scaled(loss_fn, images, context.keys, mask=context.mask, args=(clean,))
        return x_adv, context.extra, {}

    def loss(context, forward, images, x_adv, labels):
        clean, adversarial, stats = _forward_both(forward, images, x_adv)
        penalty = losses.trades_kl(clean, adversarial)
        total = losses.cross_entropy(clean, labels) + beta * penalty
        return total, accuracy_of(adversarial, labels), stats

    return Objective(perturb, loss)


@described
def mart(attack: Any, beta: float = 5.0, *, eps_schedule: Schedule | None = None) -> Objective:
    """MART: boosted cross entropy on x_adv plus a KL weighted by how unsure the network is of x.

    Args:
        attack: `linf_pgd(0.031, steps=10, step_size=0.007, start="gaussian")` in the paper.
        beta: weight of the KL term, >= 0.
        eps_schedule: as for `adversarial`.

    Source: Wang et al. 2020, eq. 11.
    """
    check_number("beta", beta, low=0)
    check_attack(attack, eps_schedule)

    def perturb(context, images, labels):
        x_adv = _attacked(attack, eps_schedule, context, images, labels)
        return x_adv, context.extra, {}

    def loss(context, forward, images, x_adv, labels):
        clean, adversarial, stats = _forward_both(forward, images, x_adv)
        penalty = losses.mart_kl(clean, adversarial, labels)
        total = losses.mart_bce(adversarial, labels) + beta * penalty
        return total, accuracy_of(adversarial, labels), stats

    return Objective(perturb, loss)


@described
def guarded_n_fgsm(
    attack: Any,
    guard: Any,
    *,
    check_every: int = 20,
    gap: float = 0.3,
    rescue_steps: int = 20,
    eps_schedule: Schedule | None = None,
) -> Objective:
    """N-FGSM with a guard against catastrophic overfitting.

    Every `check_every` steps the batch is also attacked by `guard`. When the network is right on
    the one-step examples but wrong on the guard's, by a share of the batch larger than `gap`, it
    has learnt to fool the single step: the next `rescue_steps` steps then train on the guard.
    The metrics "guard_gap" and "rescue" say what was seen and done.

    Args:
        attack: the cheap attack, `n_fgsm(eps)`, or `fgsm(eps)` with a random start.
        guard: the strong one, `linf_pgd(eps, steps=10)`.
        check_every: steps between looks, >= 1; the cost is one `guard` in that many steps.
        gap: the accuracy difference that counts as collapse, in (0, 1).
        rescue_steps: how long to train on the guard, >= 1.
        eps_schedule: as for `adversarial`; scales both attacks.

    Source: Li et al. 2020 (Towards understanding fast adversarial training), algorithm 1, which
    watches validation data; here the batch itself is watched, before it is trained on.
    """
    for name, value in (("check_every", check_every), ("rescue_steps", rescue_steps)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 < gap < 1:
        raise ValueError(f"gap must be in (0, 1), got {gap}")
    for one in (attack, guard):
        check_attack(one, eps_schedule)

    def perturb(context, images, labels):
        step, until = context.step, context.extra["rescue_until"]
        look = step % check_every == 0
        x_cheap = _attacked(attack, eps_schedule, context, images, labels)

        def attacked():
            x_strong = _attacked(guard, eps_schedule, context, images, labels)
            right = lambda x: (context.apply(x).argmax(1) == labels).mean()  # noqa: E731
            return x_strong, right(x_cheap) - right(x_strong)

        def spared():
            # Arithmetic on the batch, so that both branches vary over the devices alike.
            return images, 0 * images.sum()

        x_strong, seen = jax.lax.cond(look | (step < until), attacked, spared)
        seen = jnp.where(look, parallel.mean(seen, context.axis_name), context.extra["gap"])
        until = jnp.where(look & (seen > gap), step + rescue_steps, until)
        rescue = step < until
        x_adv = jnp.where(rescue, x_strong, x_cheap)
        extra = {**context.extra, "rescue_until": until, "gap": seen}
        return x_adv, extra, {"guard_gap": seen, "rescue": rescue.astype(jnp.float32)}

    # The step at which the rescue ends, not a count of what is left of it: a step that works its
    # batch off in parts comes here several times.
    extra = {"rescue_until": jnp.zeros((), jnp.int32), "gap": jnp.zeros((), jnp.float32)}
    return Objective(perturb, _cross_entropy_at_x_adv(0.0), extra)


@described
def with_awp(objective: Objective, gamma: float = 0.005, *, warmup_steps: int = 0) -> Objective:
    """Adversarial weight perturbation: takes the gradient at weights moved to raise the loss.

    v = gamma ||w|| grad / ||grad|| for every tensor w of at least two axes; biases and scales stay.

    Args:
        objective: any objective.
        gamma: relative size of the move, >= 0; 0.005 for TRADES, 0.01 for adversarial training.
        warmup_steps: steps without it at the start.

    Source: Wu et al. 2020, eq. 8 to 10.
    """
    check_number("gamma", gamma, low=0)

    def moved(gradient_fn, params, step):
        def move(w, gradient):
            if w.ndim < 2:
                return w
            length = jnp.linalg.norm(gradient.ravel())
            scale = gamma * jnp.linalg.norm(w.ravel()) / jnp.where(length > 0, length, 1)
            return w + jnp.where(step < warmup_steps, 0, scale) * gradient

        return jax.tree.map(move, params, gradient_fn(params))

    return objective._replace(move_weights=moved)


def _attacked(attack, eps_schedule, context, images, labels):
    """The batch after an attack that raises the cross entropy."""
    loss_fn = lambda x, labels: losses.cross_entropy(context.apply(x), labels)  # noqa: E731
    scaled = scaled_attack(attack, eps_schedule, context.step)
    return scaled(loss_fn, images, context.keys, mask=context.mask, args=(labels,))


def _cross_entropy_at_x_adv(label_smoothing):
    def loss(context, forward, images, x_adv, labels):
        logits, stats = forward(x_adv)
        smooth = losses.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return smooth, accuracy_of(logits, labels), stats

    return loss


def accuracy_of(logits: Array, labels: ArrayLike) -> dict[str, Array]:
    """{"accuracy": share of this device's examples that are classified rightly}."""
    return {"accuracy": (logits.argmax(1) == labels).mean(dtype=jnp.float32)}


def _forward_both(forward, images, x_adv):
    logits, stats = forward(jnp.concatenate([images, x_adv]))
    clean, adversarial = jnp.split(logits, 2)
    return clean, adversarial, stats


def scaled_attack(attack: Any, eps_schedule: Schedule | None, step: Array) -> Any:
    """The attack with `eps` (and `step_size`, where one is set) times eps_schedule(step)."""
    if eps_schedule is None:
        return attack
    factor = eps_schedule(step)
    scaled = ("eps", "step_size")
    fields = {name: getattr(attack, name, None) for name in scaled}
    fields = {name: value * factor for name, value in fields.items() if value is not None}
    return dataclasses.replace(attack, **fields)


def check_starts_off(attack: Any, distance: str) -> None:
    """Refuses an attack that starts at x, where a distance from x has no gradient."""
    if getattr(attack, "start", None) == "none":
        raise ValueError(
            f"attack must start at random: at x {distance} has no gradient, got start='none'"
        )


def check_attack(attack: Any, eps_schedule: Schedule | None) -> None:
    """Refuses an attack on a classifier, and a schedule of eps for an attack that has none.

    Raises:
        TypeError: the attack wants labels, where an objective hands it a loss.
        ValueError: a schedule for an attack without an eps of its own, such as one made of others.
    """
    check_takes_loss("training", attack)
    if eps_schedule is not None and getattr(attack, "eps", None) is None:
        raise ValueError(f"eps_schedule needs an attack with an eps of its own, got {attack}")
