"""jaxrobust: adversarial attacks, defences and honest robust evaluation as pure JAX functions.

import jaxrobust as jr

attack = jr.linf_pgd(eps=8 / 255, steps=10)
x_adv = attack(loss_fn, x, jax.random.key(0), args=(variables, labels))
"""

from jaxrobust import (
    attacks,
    balls,
    checkpoint,
    data,
    evaluation,
    flops,
    losses,
    metrics,
    models,
    parallel,
    training,
)
from jaxrobust.attacks import (
    fgsm,
    l1_pgd,
    l2_pgd,
    linf_pgd,
    multi_targeted,
    n_fgsm,
    pgd,
    restarts,
    targeted,
    worst_of,
)

__version__ = "0.1.0"

__all__ = [
    "attacks",
    "balls",
    "checkpoint",
    "data",
    "evaluation",
    "fgsm",
    "flops",
    "l1_pgd",
    "l2_pgd",
    "linf_pgd",
    "losses",
    "metrics",
    "models",
    "multi_targeted",
    "n_fgsm",
    "parallel",
    "pgd",
    "restarts",
    "targeted",
    "training",
    "worst_of",
]
