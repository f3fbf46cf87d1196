"""Attacks as values: pure functions of a loss, a batch and a key.

attack = linf_pgd(8 / 255, steps=20)
x_adv = attack(loss_fn, x, key, args=(variables, labels))  # raises loss_fn(x, variables, labels)
"""

from jaxrobust.attacks.adaptive import bpda, eot, feature_match, latent_distance, transfer
from jaxrobust.attacks.apgd import APGD, ClassifierAPGD, apgd, apgd_ce, apgd_dlr, apgd_t
from jaxrobust.attacks.carlini_wagner import CWL2, cw_l2
from jaxrobust.attacks.deepfool import DeepFool, deepfool
from jaxrobust.attacks.fab import FAB, fab, fab_t
from jaxrobust.attacks.hop_skip_jump import HopSkipJump, hop_skip_jump
from jaxrobust.attacks.minimal import DDN, FMN, ddn, fmn
from jaxrobust.attacks.patch import Patch, patch
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
from jaxrobust.attacks.spatial import Spatial, spatial
from jaxrobust.attacks.square import Square, square
from jaxrobust.attacks.wrap import multi_targeted, restarts, targeted, worst_of
from jaxrobust.keys import example_keys

__all__ = [
    "APGD",
    "CWL2",
    "DDN",
    "FAB",
    "FMN",
    "NFGSM",
    "PGD",
    "ClassifierAPGD",
    "DeepFool",
    "HopSkipJump",
    "Patch",
    "Spatial",
    "Square",
    "apgd",
    "apgd_ce",
    "apgd_dlr",
    "apgd_t",
    "bpda",
    "cw_l2",
    "ddn",
    "deepfool",
    "eot",
    "example_keys",
    "fab",
    "fab_t",
    "feature_match",
    "fgsm",
    "fmn",
    "hop_skip_jump",
    "input_gradient",
    "l1_pgd",
    "l2_pgd",
    "latent_distance",
    "linf_pgd",
    "multi_targeted",
    "n_fgsm",
    "patch",
    "pgd",
    "restarts",
    "spatial",
    "square",
    "targeted",
    "transfer",
    "worst_of",
]
