"""Parts of attacks that know the defence: EOT, BPDA, transfer, latent and feature-matching losses.

Losses and functions are values here, equal for equal parts, so that an attack compiles once:

    expected = eot(loss_fn, draws=20)                       # loss_fn(x, keys, *args)
    x_adv = linf_pgd(8 / 255)(expected, x, key, args=(keys, variables, labels))

    through = bpda(quantise)                                # straight through
    loss_fn = lambda x, v, y: losses.cross_entropy(model.apply(v, through(x)), y)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust import losses
from jaxrobust.attacks import inputs
from jaxrobust.attacks.value import LossFn, attack_value
from jaxrobust.attacks.wrap import LogitsFn, Margin, check_takes_loss, checked, worst
from jaxrobust.keys import example_keys, fold


@dataclasses.dataclass(frozen=True)
class EOT:
    """Expectation over transformation; made by `eot`."""

    loss_fn: LossFn
    draws: int

    def __call__(self, x: Array, keys: Array, *args: Any) -> Array:
        """Mean over the draws of `loss_fn(x, keys, *args)`: [b].

        Args:
            x: [b, ...].
            keys: [b] typed keys; or one, folded with each row's number.
            args: what the loss takes besides.
        """
        # Noise is drawn anew at every point: a function of key and point stays pure, and two steps
        # of an attack do not climb the same draw.
        sums = jax.lax.stop_gradient(x).reshape(x.shape[0], -1).sum(1).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(sums, jnp.uint32)
        here = jax.vmap(jax.random.fold_in)(example_keys(keys, x.shape[0]), bits)

        def one(total, number):
            return total + self.loss_fn(x, fold(here, number), *args), None

        none = jnp.zeros_like(x, shape=(x.shape[0],))
        return jax.lax.scan(jax.checkpoint(one), none, jnp.arange(self.draws))[0] / self.draws


def eot(loss_fn: LossFn, draws: int = 20) -> EOT:
    """The expected loss of a random model, estimated by so many draws at every point.

    Args:
        loss_fn: (x, keys, *args) -> [b] losses of one draw, with a key per example.
        draws: how many, at least 1.

    Source: Athalye et al. 2018 (Synthesizing robust adversarial examples).
    """
    return EOT(loss_fn, inputs.check_steps(draws, "draws"))


@dataclasses.dataclass(frozen=True)
class BPDA:
    """A function with another one's gradient; made by `bpda`."""

    forward: Callable[..., Array]
    backward: Callable[..., Array] | None

    def __call__(self, x: Array, *args: Any) -> Array:
        """`forward(x, *args)`, differentiated as `backward(x, *args)`."""
        smooth = x if self.backward is None else self.backward(x, *args)
        value = self.forward(x, *args)
        if value.shape != smooth.shape:
            raise ValueError(
                f"backward must return what forward returns, {value.shape}, got {smooth.shape}"
            )
        return smooth + jax.lax.stop_gradient(value - smooth)


def bpda(forward: Callable[..., Array], backward: Callable[..., Array] | None = None) -> BPDA:
    """A pre-processor whose gradient is replaced: backward pass differentiable approximation.

    Args:
        forward: (x, *args) -> array; evaluated as it is.
        backward: a differentiable stand-in of the same shape; None is the identity, straight
            through, for pre-processors that keep images about what they are.

    Source: Athalye et al. 2018 (Obfuscated gradients), section 4.1.
    """
    return BPDA(forward, backward)


@attack_value(data=("attack",), meta=("surrogates", "loss"))
class Transfer:
    """An attack on surrogates, judged on the target; made by `transfer`."""

    attack: Any
    surrogates: tuple[LogitsFn, ...]
    loss: Callable[..., Array]

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: ArrayLike,
        labels: ArrayLike,
        key: Array,
        mask: ArrayLike | None = None,
        args: tuple = (),
        surrogate_args: tuple[tuple, ...] | None = None,
    ) -> Array:
        """Attacks each surrogate and keeps, per example, what the target takes worst.

        Args:
            logits_fn: (x, *args) -> [b, classes], the target: only asked, never differentiated.
            x: [b, ...] float.
            labels: [b] true classes.
            key: one typed key, or [b].
            mask: 1 where a pixel may change.
            args: arrays that `logits_fn` takes besides x.
            surrogate_args: the same for each surrogate; none by default.

        Returns:
            x_adv: the largest margin of a wrong class under the target.

        Raises:
            TypeError, ValueError: names the argument, its value and what was expected.
        """
        x, labels, args = checked(logits_fn, x, labels, args)
        keys = example_keys(key, x.shape[0])
        given = surrogate_args or ((),) * len(self.surrogates)
        if len(given) != len(self.surrogates):
            raise ValueError(
                f"surrogate_args must have one entry per surrogate, {len(self.surrogates)}, "
                f"got {len(given)}"
            )
        runs = (
            self.attack(
                _LossOf(surrogate, self.loss),
                x,
                fold(keys, i),
                mask=mask,
                args=(labels, *own),
            )
            for i, (surrogate, own) in enumerate(zip(self.surrogates, given, strict=True))
        )
        return worst(Margin(logits_fn), runs, (labels, *args))


def transfer(
    attack: Any, *surrogates: LogitsFn, loss: Callable[..., Array] = losses.margin
) -> Transfer:
    """A gradient attack on other networks, for a target that gives no gradients or wrong ones.

    Args:
        attack: called as attack(loss_fn, x, key, mask=None, args=()).
        surrogates: logits functions of the same classes.
        loss: (logits, labels) -> [b], what the attack raises on a surrogate.

    Source: Papernot et al. 2017 (Practical black-box attacks against machine learning).
    """
    if not surrogates:
        raise ValueError("transfer needs at least one surrogate, got none")
    check_takes_loss("transfer", attack)
    return Transfer(attack=attack, surrogates=surrogates, loss=loss)


@dataclasses.dataclass(frozen=True)
class _LossOf:
    logits_fn: LogitsFn
    loss: Callable[..., Array]

    def __call__(self, x, labels, *args):
        return self.loss(self.logits_fn(x, *args), labels)


@dataclasses.dataclass(frozen=True)
class Latent:
    """Distance of an embedding from a given one; made by `latent_distance`, `feature_match`."""

    encode: Callable[..., Array]
    towards: bool

    def __call__(self, x: Array, features: Array, *args: Any) -> Array:
        """Losses [b] to raise.

        Args:
            x: [b, ...].
            features: [b, ...] embeddings of the clean images, or of images of another class.
            args: what `encode` takes besides x.
        """
        here = self.encode(x, *args).reshape(x.shape[0], -1)
        there = jax.lax.stop_gradient(features).reshape(x.shape[0], -1)
        length = lambda v: jnp.sqrt(jnp.maximum(jnp.square(v).sum(1), 1e-30))  # noqa: E731
        if self.towards:
            return -jnp.square(here - there).sum(1)
        cosine = (here * there).sum(1) / (length(here) * length(there))
        return 1 - cosine + length(here - there) / length(there)


def latent_distance(encode: Callable[..., Array]) -> Latent:
    """Drives an embedding away from the clean one, in direction and in distance.

    loss_i = 1 - cos(E(x_i), f_i) + |E(x_i) - f_i| / |f_i|

    It needs no labels: the attack that contrastive pre-processors are trained against. From the
    clean image itself its gradient is zero, so start at random.

    Args:
        encode: (x, *args) -> [b, ...] embeddings.

    Source: Kim et al. 2020 (RoCL), the instance-wise attack, with the distance added.
    """
    return Latent(encode, towards=False)


def feature_match(encode: Callable[..., Array]) -> Latent:
    """Drives an embedding to that of another image: it gets past detectors and pre-processors.

    loss_i = -|E(x_i) - f_i|^2

    Args:
        encode: (x, *args) -> [b, ...] embeddings.

    Source: Sabour et al. 2016 (Adversarial manipulation of deep representations).
    """
    return Latent(encode, towards=True)
