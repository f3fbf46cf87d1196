"""jaxrobust: adversarial attacks, defences and honest robust evaluation as pure JAX functions.

import jaxrobust as jr

attack = jr.linf_pgd(eps=8 / 255, steps=10)
x_adv = attack(loss_fn, x, jax.random.key(0), args=(variables, labels))
"""

from jaxrobust import (
    attacks,
    balls,
    checkpoint,
    cropd,
    data,
    evaluation,
    flops,
    losses,
    metrics,
    models,
    parallel,
    safeclip,
    salience,
    sipat,
    smoothing,
    training,
)
from jaxrobust.attacks import (
    apgd,
    apgd_ce,
    apgd_dlr,
    apgd_t,
    cw_l2,
    ddn,
    deepfool,
    fab,
    fab_t,
    fgsm,
    fmn,
    hop_skip_jump,
    l1_pgd,
    l2_pgd,
    linf_pgd,
    multi_targeted,
    n_fgsm,
    patch,
    pgd,
    restarts,
    spatial,
    square,
    targeted,
    worst_of,
)
from jaxrobust.evaluation import auto_attack, evaluate
from jaxrobust.models import defend
from jaxrobust.sipat import sip_pgd
from jaxrobust.smoothing import certify

__version__ = "0.1.0"

__all__ = [
    "apgd",
    "apgd_ce",
    "apgd_dlr",
    "apgd_t",
    "attacks",
    "auto_attack",
    "balls",
    "certify",
    "checkpoint",
    "cropd",
    "cw_l2",
    "data",
    "ddn",
    "deepfool",
    "defend",
    "evaluate",
    "evaluation",
    "fab",
    "fab_t",
    "fgsm",
    "flops",
    "fmn",
    "hop_skip_jump",
    "l1_pgd",
    "l2_pgd",
    "linf_pgd",
    "losses",
    "metrics",
    "models",
    "multi_targeted",
    "n_fgsm",
    "parallel",
    "patch",
    "pgd",
    "restarts",
    "safeclip",
    "salience",
    "sip_pgd",
    "sipat",
    "smoothing",
    "spatial",
    "square",
    "targeted",
    "training",
    "worst_of",
]
