"""Attacks as values: pure functions of a loss, a batch and a key."""

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
from jaxrobust.attacks.wrap import multi_targeted, restarts, targeted, worst_of

__all__ = [
    "NFGSM",
    "PGD",
    "example_keys",
    "fgsm",
    "input_gradient",
    "l1_pgd",
    "l2_pgd",
    "linf_pgd",
    "multi_targeted",
    "n_fgsm",
    "pgd",
    "restarts",
    "targeted",
    "worst_of",
]
