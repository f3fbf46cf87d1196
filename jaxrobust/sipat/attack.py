"""The attack of SIP-AT: PGD that leaves salient pixels as they are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust.attacks import PGD, linf_pgd
from jaxrobust.attacks.value import LossFn
from jaxrobust.salience import check_maps
from jaxrobust.sipat.masking import Masking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SipPGD:
    """Projected gradient ascent over {delta : |delta_p| <= eps_p}; made by `sip_pgd`.

    Attributes:
        attack: the attack without salience; its numbers are leaves, as ever.
        masking: what eps_p is (`Masking`).
    """

    attack: PGD
    masking: Masking = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        loss_fn: LossFn,
        x: ArrayLike,
        key: Array | None,
        salience: ArrayLike,
        args: tuple = (),
    ) -> Array:
        """Attacks a batch.

        Args:
            loss_fn: (x, *args) -> [b] losses to raise.
            x: [b, h, w, c] float in the attack's bounds.
            key: one typed key, or [b].
            salience: [b, h, w, 1] in [0, 1]; of 0 it is the plain attack, bit for bit.
            args: arrays that the loss takes besides x.

        Returns:
            x_adv, of x's shape. Where the mode is "hard" and a pixel salient, bit for bit x.

        Raises:
            TypeError, ValueError: as `PGD`; or salience of the wrong size, with NaN, or outside
                [0, 1].
        """
        x = jnp.asarray(x)
        check_maps(salience, x)
        mask = self.masking.mask(salience)
        x_adv = self.attack(loss_fn, x, key, mask=self.masking.in_loop(mask), args=args)
        return self.masking.afterwards(x, x_adv, mask)


def sip_pgd(
    eps: Any = 8 / 255,
    steps: int = 10,
    step_size: Any = None,
    *,
    masking: Masking | None = None,
    **options: Any,
) -> SipPGD:
    """Linf PGD that spares salient pixels.

    Args:
        eps: radius where nothing is spared.
        steps: how many gradients are taken.
        step_size: length of a step, everywhere but where eps_p = 0. None stands for
            2.5 eps_p / steps, which shrinks with a soft map.
        masking: which pixels are spared, and how; by default hard and in the loop.
        options: further options of `linf_pgd`.

    Raises:
        ValueError: as `linf_pgd`.

    Source: Redgrave and Czajka 2025; the authors' code for the loop.
    """
    attack = linf_pgd(eps, steps, step_size, **options)
    return SipPGD(attack=attack, masking=Masking() if masking is None else masking)
