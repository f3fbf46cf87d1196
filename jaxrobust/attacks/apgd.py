"""Auto-PGD: projected gradient ascent that halves its step where the loss no longer rises.

attack = apgd("linf", eps=8 / 255)          # any loss: called like PGD
attack = apgd_t("linf", eps=8 / 255)        # a classifier: attack(logits_fn, x, labels, key)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust import balls
from jaxrobust.attacks import apgd_step, box, classifier, inputs, loop, scheduler
from jaxrobust.attacks.pgd import finite_gradient, loss_and_gradient
from jaxrobust.attacks.value import LossFn, Number, attack_value
from jaxrobust.keys import example_keys


@attack_value(data=("eps", "rho"), meta=("steps", "norm", "large_radii", "bounds", "loop"))
class APGD:
    """Auto-PGD on any loss; made by `apgd`.

    Attributes:
        eps: radius: a number, [b], or a map per pixel.
        rho: the step is halved if fewer than this share of the iterations raised the loss.
        steps: iterations; the gradient is taken once more.
        norm: "linf", "l2" or "l1".
        large_radii: begin in balls of 3 and 2 eps, as the standard l1 attack does.
        bounds: the box that x_adv stays in.
        loop: the loop's form (`attacks.loop`).

    Source: Croce and Hein 2020 (AutoAttack), algorithm 1; l1: Croce and Hein 2021 (Mind the box).
    """

    eps: Number
    rho: Number = 0.75
    steps: int = 100
    norm: str
    large_radii: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    loop: str = "auto"

    def __call__(
        self,
        loss_fn: LossFn,
        x: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
    ) -> Array:
        """Attacks a batch; arguments, result and errors as `PGD.__call__`.

        Returns the point of the largest loss among all that were visited.
        """
        x, mask, args = inputs.check_call(x, mask, args, self.bounds, key)
        keys = example_keys(key, x.shape[0])
        if x.shape[0] == 0:
            return x
        plan = (self.norm, self.steps, self.large_radii)
        base, eps, state = _begin(plan, self.bounds, self.eps, x, keys, mask)
        state = loop.iterate(
            _advance,
            state,
            len(apgd_step.table(*plan).gap),
            operands=(base, eps, self.rho, args),
            static=(loss_fn, plan, self.bounds),
            form=self.loop,
        )
        return box.finish(x, state.best, eps, self.bounds)


@jax.jit(static_argnums=(0, 1))
def _begin(plan, bounds, eps, x, keys, mask):
    base = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    eps = classifier.radii(eps, mask, base)
    norm, steps, large_radii = plan
    state = apgd_step.begin(keys, base, eps, bounds, norm, steps, large_radii)
    return base, eps, state


def _advance(static, i, state, operands):
    loss_fn, (norm, steps, large_radii), bounds = static
    base, eps, rho, args = operands
    loss, grad = loss_and_gradient(loss_fn, base + state.delta, args)
    unbroken = jnp.zeros(loss.shape, bool)
    return apgd_step.advance(
        state, loss, unbroken, finite_gradient(grad), base, eps,
        bounds=bounds, norm=norm, steps=steps, large_radii=large_radii, rho=rho,
    )  # fmt: skip


@attack_value(data=("eps",), meta=("attack", "loss", "targets", "restarts", "draws"))
class ClassifierAPGD:
    """Auto-PGD against a classifier; made by `apgd_ce`, `apgd_dlr`, `apgd_t`.

    Attributes:
        eps: radius: a number, [b], or a map per pixel.
        attack: an APGD, whose own eps is not used.
        loss: "ce", "dlr", "targeted_dlr", or a function (logits, labels, targets) -> [b].
        targets: how many of the likeliest wrong classes are aimed at, one by one.
        restarts: random starts for each of them.
        draws: 0 for a deterministic classifier; else the classifier is random, called as
            `logits_fn(x, keys, *args)` with a key per example, and every gradient is the mean of
            so many draws (expectation over transformation).
    """

    eps: Number
    attack: APGD
    loss: str | Callable
    targets: int = 1
    restarts: int = 1
    draws: int = 0

    def __call__(
        self,
        logits_fn: classifier.LogitsFn,
        x: ArrayLike,
        labels: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
    ) -> Array:
        """Attacks a batch.

        Args:
            logits_fn: (x, *args) -> [b, classes]. Pass the same function object every time.
            x: [b, h, w, c] float in `bounds`.
            labels: [b] true classes.
            key: one typed key, or [b].
            mask: 1 where a pixel may change; fractions scale the radius.
            args: arrays that `logits_fn` takes besides x.

        Returns:
            x_adv, of x's shape and type: misclassified, or x itself where the attack fails or the
            example is misclassified without it.

        Raises:
            TypeError, ValueError: names the argument, its value and what was expected.
        """
        return classifier.break_batch(self, logits_fn, x, labels, key, mask, args)

    @property
    def bounds(self) -> tuple[float, float]:
        """The box."""
        return self.attack.bounds

    def search(self, classes: int) -> "Search":
        """The attack without its radius, for so many classes."""
        inner, targets = self.attack, min(self.targets, classes - 1)
        return Search(
            norm=inner.norm,
            steps=inner.steps,
            large_radii=inner.large_radii,
            rho=float(inner.rho),
            bounds=inner.bounds,
            loop=inner.loop,
            loss=classifier.loss_for(self.loss, classes),
            targets=targets,
            rounds=targets * self.restarts,
            draws=self.draws,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A `scheduler.Search`: one round is one run of Auto-PGD towards one class."""

    norm: str
    steps: int
    large_radii: bool
    rho: float
    bounds: tuple[float, float]
    loop: str
    loss: Callable
    targets: int
    rounds: int
    draws: int
    minimal: ClassVar[bool] = False

    @property
    def evaluations(self) -> int:
        """Gradients in a round."""
        return len(apgd_step.table(self.norm, self.steps, self.large_radii).gap)

    @property
    def chunk(self) -> int:
        """Iterations between two looks at the flags: an eighth of a round."""
        return -(-self.evaluations // 8)

    def begin(self, rows: scheduler.Rows) -> apgd_step.State:
        """Random starts."""
        return apgd_step.begin(
            rows.keys, rows.x, rows.eps, self.bounds, self.norm, self.steps, self.large_radii
        )

    def advance(self, logits_fn, state, rows, args):
        """One gradient, one step; of a random model new draws every time."""
        asked = rows
        if self.draws:
            asked = rows._replace(keys=jax.vmap(jax.random.fold_in)(rows.keys, state.i))
        loss, wrong, grad = classifier.evaluate(
            logits_fn, self.loss, rows.x + state.delta, asked, args, self.draws
        )
        return apgd_step.advance(
            state, loss, wrong, grad, rows.x, rows.eps, bounds=self.bounds, norm=self.norm,
            steps=self.steps, large_radii=self.large_radii, rho=self.rho, stop=not self.draws,
        )  # fmt: skip

    def outcome(self, state, rows):
        """The first misclassified iterate; of a random model the one of the largest loss.

        Which one does not matter to a deterministic model's flags. To a random one's it does: the
        first is wrong in barely most of the draws that the attack saw, and often not in others.
        """
        return state.fooled, box.finish(rows.x, state.found, rows.eps, self.bounds)


def apgd(
    norm: str,
    eps: Number,
    *,
    steps: int = 100,
    rho: Number = 0.75,
    large_radii: bool = False,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loop: str = "auto",
) -> APGD:
    """Auto-PGD on any loss; arguments as the attributes of `APGD`.

    Raises:
        TypeError: numbers that are none.
        ValueError: a negative eps or, in linf, one beyond the box, rho outside (0, 1), fewer than
            one step, an unknown norm or loop, large radii without l1, or bounds the wrong way
            round.
    """
    balls.ball(norm)
    bounds = inputs.check_bounds(bounds)
    inputs.check_eps(eps, norm, bounds)
    inputs.check_number("rho", rho, low=0, high=1, strict=True)
    steps = inputs.check_steps(steps)
    if large_radii and (norm != "l1" or steps < 3):
        raise ValueError(f"large_radii needs l1 and 3 steps or more, got {norm!r} and {steps}")
    inputs.check_loop(loop)
    return APGD(
        eps=eps,
        rho=rho,
        steps=steps,
        norm=norm,
        large_radii=large_radii,
        bounds=bounds,
        loop=loop,
    )


def _on_classifier(norm, eps, loss, *, targets=1, restarts=1, draws=0, large_radii, **options):
    large_radii = norm == "l1" if large_radii is None else large_radii
    inner = apgd(norm, eps, large_radii=large_radii, **options)
    inner = dataclasses.replace(inner, eps=None)
    return ClassifierAPGD(
        eps=eps,
        attack=inner,
        loss=loss,
        targets=inputs.check_steps(targets, "targets"),
        restarts=inputs.check_steps(restarts, "restarts"),
        draws=inputs.check_steps(draws, "draws", low=0),
    )


def apgd_ce(
    norm: str,
    eps: Number,
    *,
    restarts: int = 1,
    draws: int = 0,
    large_radii: bool | None = None,
    **options: Any,
) -> ClassifierAPGD:
    """Auto-PGD on the cross entropy of a classifier.

    Args:
        norm: "linf", "l2" or "l1".
        eps: radius.
        restarts: random starts.
        draws: as in `ClassifierAPGD`, for random classifiers.
        large_radii: as in `APGD`; None is on in l1 and off else.
        options: as in `apgd`.
    """
    sizes = {"restarts": restarts, "draws": draws, "large_radii": large_radii}
    return _on_classifier(norm, eps, "ce", **sizes, **options)


def apgd_dlr(
    norm: str,
    eps: Number,
    *,
    restarts: int = 1,
    draws: int = 0,
    large_radii: bool | None = None,
    **options: Any,
) -> ClassifierAPGD:
    """Auto-PGD on the difference of logits ratio (two classes: the margin); as `apgd_ce`."""
    sizes = {"restarts": restarts, "draws": draws, "large_radii": large_radii}
    return _on_classifier(norm, eps, "dlr", **sizes, **options)


def apgd_t(
    norm: str,
    eps: Number,
    *,
    targets: int = 9,
    restarts: int = 1,
    draws: int = 0,
    large_radii: bool | None = None,
    **options: Any,
) -> ClassifierAPGD:
    """Auto-PGD on the targeted DLR, towards each of the likeliest wrong classes; as `apgd_ce`."""
    sizes = {"restarts": restarts, "draws": draws, "large_radii": large_radii}
    return _on_classifier(norm, eps, "targeted_dlr", targets=targets, **sizes, **options)
