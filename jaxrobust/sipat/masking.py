"""From a salience map to a map of eps: the one abstraction under SIP-AT, its ablations and PART."""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxrobust.attacks.inputs import check_number

MODES = ("hard", "support", "soft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """How much of its eps each pixel keeps, given its salience S.

    eps_p = eps (background M_p + salient (1 - M_p)),  M = 1 - S

    SIP-AT is background = 1, salient = 0: salient pixels are left alone. PART is the opposite
    choice, background = 7/8, salient = 1.

    Attributes:
        mode: what M becomes first. "hard": 1 where M >= 1/2, else 0; "support": 1 where M > 0,
            else 0; "soft": M itself, so that fractions scale a pixel's radius.
        invert: swap salient and background: M = S.
        post_hoc: attack without a mask and multiply the finished perturbation by the share above,
            instead of searching under it. Inside the same set, and weaker.
        salient: share of eps kept where S = 1, in [0, 1].
        background: share of eps kept where S = 0, in [0, 1].

    Raises:
        ValueError: an unknown mode, or a share outside [0, 1].

    Source: Redgrave and Czajka 2025, figure 1 (post hoc); their code multiplies inside the loop:
    "support" is what its version of June 2023 comes to, "hard" is that of November 2023.
    """

    mode: str = "hard"
    invert: bool = False
    post_hoc: bool = False
    salient: float = 0.0
    background: float = 1.0

    def __post_init__(self):
        """Checks the attributes."""
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        for name in ("salient", "background"):
            value = getattr(self, name)
            check_number(name, value, low=0)
            if value > 1:
                raise ValueError(f"{name} must be in [0, 1], a share of eps, got {value}")

    def mask(self, salience: ArrayLike) -> Float[Array, "..."]:
        """The share of eps that each pixel keeps: what attacks take as `mask`.

        Args:
            salience: S in [0, 1], of any shape that broadcasts to the images.
        """
        salience = jnp.asarray(salience)
        free = salience if self.invert else 1 - salience
        if self.mode == "hard":
            free = (free >= 0.5).astype(salience.dtype)
        elif self.mode == "support":
            free = (free > 0).astype(salience.dtype)
        return self.background * free + self.salient * (1 - free)

    def in_loop(self, mask: Array) -> Array | None:
        """What the attack itself is given as its mask."""
        return None if self.post_hoc else mask

    def afterwards(self, x: Array, x_adv: Array, mask: Array) -> Array:
        """What is done to the attack's result: nothing, or with `post_hoc` x + mask (x_adv - x).

        Args:
            x: [b, h, w, c] images.
            x_adv: of the same shape.
            mask: [b, h, w, 1], of `mask`.

        Raises:
            ValueError: x_adv has another shape, such as noisy copies.
        """
        if not self.post_hoc:
            return x_adv
        if x_adv.shape != x.shape:
            raise ValueError(f"post_hoc needs x_adv of shape {x.shape}, got {x_adv.shape}")
        # x + 1 (x_adv - x) need not round to x_adv.
        return jnp.where(mask == 1, x_adv, x + mask * (x_adv - x))
