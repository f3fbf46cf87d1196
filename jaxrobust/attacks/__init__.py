"""Attacks as values: pure functions of a loss, a batch and a key."""

from jaxrobust.attacks.apgd import APGD, ClassifierAPGD, apgd, apgd_ce, apgd_dlr, apgd_t
from jaxrobust.attacks.fab import FAB, fab, fab_t
from jaxrobust.attacks.inputs import example_keys
from jaxrobust.attacks.pgd import (
    NFGSM,
    PGD,
    fgsm,
    input_gradient,
    l1_pgd,
    l2_pgd,
    linf_pgd,
    n_fgsm,
    pgd,
)
from jaxrobust.attacks.square import Square, square
from jaxrobust.attacks.wrap import multi_targeted, restarts, targeted, worst_of

__all__ = [
    "APGD",
    "FAB",
    "NFGSM",
    "PGD",
    "ClassifierAPGD",
    "Square",
    "apgd",
    "apgd_ce",
    "apgd_dlr",
    "apgd_t",
    "example_keys",
    "fab",
    "fab_t",
    "fgsm",
    "input_gradient",
    "l1_pgd",
    "l2_pgd",
    "linf_pgd",
    "multi_targeted",
    "n_fgsm",
    "pgd",
    "restarts",
    "square",
    "targeted",
    "worst_of",
]
