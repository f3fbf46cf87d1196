"""The training objective of CRoPD: rebuild images, and keep attacked ones where clean ones are."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrobust import losses
from jaxrobust.attacks import n_fgsm
from jaxrobust.attacks.inputs import check_eps, check_number
from jaxrobust.attacks.value import Number
from jaxrobust.keys import fold
from jaxrobust.training import Context, Objective
from jaxrobust.training.objectives import (
    Schedule,
    check_attack,
    check_starts_off,
    described,
    scaled_attack,
)

FORMS = ("reported", "info_nce", "alignment")
AIMS = ("loss", "random")
ANCHOR_GRADIENTS = ("both", "adversarial")
_DIRECTION = 0xD1


class Weights(NamedTuple):
    """What the loss is made of.

    Attributes:
        clean: of the squared error of rebuilding the image from its own code.
        contrast: lambda, of the contrastive term.
        denoising: of the squared error of rebuilding the image from the attacked code.
        displacement: beta, of the squared distance between the two codes, divided by their size d.
    """

    clean: float = 1.0
    contrast: float = 10.0
    denoising: float = 0.0
    displacement: float = 0.0


@described
def robust_autoencoder(
    attack: Any,
    *,
    weights: Weights | None = None,
    form: str = "reported",
    temperature: float = 0.5,
    anchor_gradient: str = "both",
    aim: str = "loss",
    eps_schedule: Schedule | None = None,
) -> Objective:
    """An auto-encoder g = D(E(x)) whose code does not follow an attack; labels are not looked at.

    loss_i = clean |g(x) - x|^2 + contrast L(E(x'), E(x)) + denoising |g(x') - x|^2
             + displacement |E(x') - E(x)|^2 / d,      |.|^2 summed over an image
    L = -cos(E(x'), E(x)) / t + log sum_{j != i} exp(cos(E(x_i), E(x_j)) / t)      "reported"
    L = -log( exp(cos(E(x'_i), E(x_i)) / t) / sum_j exp(cos(E(x'_i), E(x_j)) / t) )  "info_nce"
    L = (1 - cos(E(x'), E(x))) / t                                                  "alignment"

    The attack raises the terms with x' in them, together and per example. In the reported form and
    in alignment that is the distance to the clean code alone, whatever else is in the batch. With
    aim="random" it raises v . g(x') instead, for each example another v ~ N(0, I).

    Why "random": a model behind the auto-encoder fails along the gradient of its own loss, which is
    not known here, and the way in which rebuilding errs most is another: v stands for all of them.

    Args:
        attack: any gradient attack that starts at random, such as `linf_pgd(8 / 255, steps=10)`:
            at x itself the distance to x's code has no gradient (denoising has one). Its radius
            may well be several times that of the attack to withstand; `n_fgsm` with wide noise is
            the cheapest.
        weights: of the terms; `Weights()` is the published loss. With nothing but `clean` no attack
            is made: a plain auto-encoder.
        form: "reported", "info_nce" or "alignment".
        temperature: t > 0. Small ones push clean codes apart so hard that robustness is lost.
        anchor_gradient: "both", or "adversarial" to hold the clean code still in its similarity to
            the attacked one, as RoCL's code does; the reported form's second term still trains it.
        aim: of the attack, "loss" or "random".
        eps_schedule: step -> factor on the attack's `eps`, as for `training.adversarial`.

    Returns:
        An objective for `training.train_step(autoencoder, ...)`; metrics: "squared_error" of
        rebuilding clean images where they are rebuilt (clean > 0), and unless plain "cosine" and
        "displacement" under attack, and "uniformity" of the clean codes (not in alignment). Batch
        statistics, where the norm keeps any, are those of all images, or with clean = 0 of the
        attacked ones. Nothing in it knows a foundation model.

    Raises:
        TypeError: weights are no `Weights`.
        ValueError: an unknown name, a weight < 0 or none > 0, temperature <= 0, or an attack that
            starts at x where it has no gradient.

    Source: CRoPD (arXiv:2504.10850), as its reviews give it; aim="random" is ours.
    """
    weights = Weights() if weights is None else weights
    _check(attack, weights, form, temperature, anchor_gradient, aim)
    check_attack(attack, eps_schedule)
    terms = _Terms(weights, form, temperature, anchor_gradient)
    if not any(weights[1:]):
        return Objective(lambda context, images, labels: (images, context.extra, {}), terms.plain)

    def perturb(context: Context, images, labels):
        if aim == "random":
            args = (_directions(context.keys, images.shape[1:]),)

            def loss_fn(x, directions):
                return (context.apply(x) * directions).sum((1, 2, 3))

        else:
            args = images, _flat(context.apply(images, taps=("latent",))[1]["latent"])

            def loss_fn(x, images, code):
                image, taps = context.apply(x, taps=("latent",))
                return terms.attacked(image, _flat(taps["latent"]), images, code, context.axis_name)

        attacked = scaled_attack(attack, eps_schedule, context.step)(
            loss_fn, images, context.keys, mask=context.mask, args=args
        )
        return attacked, context.extra, {}

    return Objective(perturb, terms.both)


def recommended(
    eps: Number,
    *,
    radius: Number = 8.0,
    noise: Number = 5.0,
    start: str = "gaussian",
    aim: str = "random",
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Objective:
    """Ours: rebuild the image from far outside the ball, after one noisy step in any direction.

    With the defaults, of colour pictures at eps 4/255, the step is 32/255 long and begins in
    Gaussian noise five times as wide; neither is cut back to a ball. On grey digits at eps 0.1
    `radius=2, noise=2, start="uniform", aim="loss"` was best; other data wants a look at both.

    Args:
        eps: linf radius that is to be withstood, > 0.
        radius: of the training's step, in units of eps.
        noise: its width, in units of the step's radius, as of `n_fgsm`.
        start: kind of noise, likewise.
        aim: of the step, as of `robust_autoencoder`.
        bounds: of the images' values.

    Raises:
        ValueError: as `n_fgsm` and `robust_autoencoder`; eps or radius <= 0, or an eps beyond the
            images' values.
    """
    check_number("eps", eps, low=0, strict=True)
    if bounds is not None:
        check_eps(eps, "linf", bounds)
    check_number("radius", radius, low=0, strict=True)
    attack = n_fgsm(radius * eps, noise=noise, start=start, bounds=bounds)
    weights = Weights(clean=0.0, contrast=0.0, denoising=1.0)
    return robust_autoencoder(attack, weights=weights, aim=aim)


class _Terms(NamedTuple):
    """The loss, in the three places where it is needed."""

    weights: Weights
    form: str
    temperature: float
    anchor_gradient: str

    def plain(self, context, forward, images, x_adv, labels):
        rebuilt, stats = forward(images)
        error = _squared_error(rebuilt, images)
        return self.weights.clean * error, {"squared_error": error.mean()}, stats

    def both(self, context, forward, images, x_adv, labels):
        if self.weights.clean:
            rebuilt, stats, taps = forward(jnp.concatenate([images, x_adv]), taps=("latent",))
            code, code_adv = jnp.split(_flat(taps["latent"]), 2)
            rebuilt, rebuilt_adv = jnp.split(rebuilt, 2)
            error = _squared_error(rebuilt, images)
            total, metrics = self.weights.clean * error, {"squared_error": error.mean()}
        else:
            # Apart, so that the clean image is not rebuilt and no gradient runs through its code
            # unless a term asks for it: a third of the step.
            code = _flat(forward(images, taps=("latent",))[-1]["latent"])
            rebuilt_adv, stats, taps = forward(x_adv, taps=("latent",))
            code_adv, total, metrics = _flat(taps["latent"]), 0.0, {}
        total += self.attacked(rebuilt_adv, code_adv, images, code, context.axis_name)
        metrics |= {
            "cosine": _closeness(code_adv, code).mean(),
            "displacement": losses.squared_error(code_adv, code).mean(),
        }
        # Here and not in `attacked`: no attacked image is in it.
        if self.form != "alignment" and self.weights.contrast:
            crowd = losses.uniformity(
                code, temperature=self.temperature, axis_name=context.axis_name
            )
            metrics["uniformity"] = crowd.mean()
            if self.form == "reported":
                total += self.weights.contrast * crowd
        return total, metrics, stats

    def attacked(self, rebuilt_adv, code_adv, images, code, axis_name):
        """[b] all terms with x' in them: what the attack raises and the loss adds up.

        Args:
            rebuilt_adv: [b, h, w, c] from the code of x'.
            code_adv: [b, d] of x'.
            images: [b, h, w, c] x.
            code: [b, d] of x.
            axis_name: the mesh axis over which InfoNCE gathers its candidates.
        """
        weights, form = self.weights, self.form
        anchor = code if self.anchor_gradient == "both" else jax.lax.stop_gradient(code)
        total = jnp.zeros(len(code_adv), code_adv.dtype)
        if weights.contrast and form == "info_nce":
            total += weights.contrast * losses.info_nce(
                code_adv, anchor, temperature=self.temperature, axis_name=axis_name
            )
        elif weights.contrast:
            most = 1.0 if form == "alignment" else 0.0
            total += weights.contrast * (most - _closeness(code_adv, anchor)) / self.temperature
        if weights.denoising:
            total += weights.denoising * _squared_error(rebuilt_adv, images)
        if weights.displacement:
            total += weights.displacement * losses.squared_error(code_adv, code)
        return total


def _directions(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
    """For each example a direction of its own among images of this shape."""
    return jax.vmap(partial(jax.random.normal, shape=shape))(fold(keys, _DIRECTION))


def _flat(code: Float[Array, "b ..."]) -> Float[Array, "b d"]:
    return code.reshape(code.shape[0], -1)


def _squared_error(image: Float[Array, "b ..."], target: Float[Array, "b ..."]):
    """[b] squared errors summed over an image."""
    return losses.squared_error(image, target) * target[0].size


def _closeness(code: Float[Array, "b d"], other: Float[Array, "b d"]) -> Float[Array, " b"]:
    """[b] cosines."""
    return (losses.unit_rows(code) * losses.unit_rows(other)).sum(1)


def _check(attack, weights, form, temperature, anchor_gradient, aim):
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if aim not in AIMS:
        raise ValueError(f"aim must be one of {AIMS}, got {aim!r}")
    if anchor_gradient not in ANCHOR_GRADIENTS:
        raise ValueError(
            f"anchor_gradient must be one of {ANCHOR_GRADIENTS}, got {anchor_gradient!r}"
        )
    check_number("temperature", temperature, low=0, strict=True)
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be cropd.Weights(...), got {weights!r}")
    for name, value in weights._asdict().items():
        check_number(f"weights.{name}", value, low=0)
    if not any(weights):
        raise ValueError(f"weights must not all be 0, got {weights}")
    # Rebuilding errs at x too, and has a gradient there.
    if any(weights[1:]) and not weights.denoising and aim == "loss":
        check_starts_off(attack, "the distance to x's code")
