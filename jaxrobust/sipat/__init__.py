"""SIP-AT: adversarial training that spares salient pixels, its neighbours and its controls.

    attack = linf_pgd(8 / 255, steps=10, step_size=2 / 255)
    objective = sipat.salience_preserving(training.adversarial(attack))
    step = training.train_step(model, optimizer, objective, augment=augment)
    training.fit(step, state, salience.attach(train, maps), ...)

Salience is a device of training only: evaluation is unmasked, and `salience_only_correct` measures
the undefended region by itself.

Source: Redgrave and Czajka 2025 (arXiv:2501.09086).
"""

from jaxrobust.sipat.attack import SipPGD, sip_pgd
from jaxrobust.sipat.masking import MODES, Masking
from jaxrobust.sipat.objective import salience_preserving
from jaxrobust.sipat.presets import PRESETS, Preset, preset
from jaxrobust.sipat.refresh import fit_refreshed
from jaxrobust.sipat.regions import background_only_correct, salience_only_correct

__all__ = [
    "MODES",
    "PRESETS",
    "Masking",
    "Preset",
    "SipPGD",
    "background_only_correct",
    "fit_refreshed",
    "preset",
    "salience_only_correct",
    "salience_preserving",
    "sip_pgd",
]
