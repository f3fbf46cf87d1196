"""Published settings by name: SIP-AT's two released snapshots, and PART's opposite choice."""

import dataclasses
from typing import NamedTuple

import optax

from jaxrobust.attacks import PGD, linf_pgd
from jaxrobust.sipat.masking import Masking
from jaxrobust.sipat.objective import salience_preserving
from jaxrobust.training import Objective, adversarial, sgd


class Preset(NamedTuple):
    """A training setting.

    Attributes:
        attack: of the training.
        masking: what it spares.
        batch_size: over all devices.
        epochs: passes over the data.
        rate: learning rate of SGD at the start.
        momentum: of SGD.
        weight_decay: as part of the gradient.
        decay: what the rate is multiplied by every `decay_epochs`.
        decay_epochs: epochs after which the rate is multiplied by `decay`, again and again.
        image_size: side in pixels; None takes the data's.
        refresh_after: epochs of plain adversarial training, after which maps are made anew every
            epoch from the current model (`fit_refreshed`); None: maps are fixed.
        source: where the setting was read.
    """

    attack: PGD
    masking: Masking
    batch_size: int
    epochs: int
    rate: float
    momentum: float
    weight_decay: float
    decay: float
    decay_epochs: int
    image_size: int | None
    refresh_after: int | None
    source: str

    def objective(self, steps_per_epoch: int, *, invert: bool = False) -> Objective:
        """Cross entropy on the masked adversarial batch alone; `invert` is the code's ablation."""
        return salience_preserving(
            adversarial(self.attack),
            dataclasses.replace(self.masking, invert=invert),
            warmup_steps=(self.refresh_after or 0) * steps_per_epoch,
        )

    def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """SGD with the setting's staircase of learning rates."""
        rate = optax.exponential_decay(
            self.rate, self.decay_epochs * steps_per_epoch, self.decay, staircase=True
        )
        return sgd(rate, momentum=self.momentum, weight_decay=self.weight_decay)


# Both snapshots: DenseNet-121, ResNet-50 or Inception-v3 on CUB-200-2011, no augmentation.
_SNAPSHOT = Preset(
    attack=linf_pgd(8 / 255, steps=32, step_size=1 / 255),
    masking=Masking(mode="support"),
    batch_size=32,
    epochs=80,
    rate=0.1,
    momentum=0.9,
    weight_decay=1e-6,
    decay=0.75,
    decay_epochs=10,
    image_size=224,
    refresh_after=None,
    source="SIP-AT's code, June 2023",
)
PRESETS = {
    "sip_at_2023_06": _SNAPSHOT,
    "sip_at_2023_11": _SNAPSHOT._replace(
        masking=Masking(mode="hard"), epochs=50, source="SIP-AT's code, November 2023"
    ),
    # Important is what `salience.stand_out` marks of `salience.grad_cam` for the predicted class.
    "part": Preset(
        attack=linf_pgd(8 / 255, steps=10, step_size=2 / 255),
        masking=Masking(salient=1.0, background=7 / 8),
        batch_size=128,
        epochs=80,
        rate=0.01,
        momentum=0.9,
        weight_decay=2e-4,
        decay=0.1,
        decay_epochs=79,  # the 60th epoch after the warm-up, which is the last one
        image_size=None,
        refresh_after=20,
        source="PART's code (Zhang et al. 2024), CIFAR-10",
    ),
}


def preset(name: str) -> Preset:
    """A published setting.

    Args:
        name: one of `PRESETS`.

    Raises:
        ValueError: another name.
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
