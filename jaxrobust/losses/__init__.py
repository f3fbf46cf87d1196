"""Per-example losses: every function returns [b] numbers and reduces nothing.

Classification (logits and labels), contrastive (embeddings, with negatives gathered over the mesh
on request) and reconstruction (images). Attacks raise them, training steps average them. Inputs
in bfloat16 or float16 are computed, and returned, in float32.

    loss = losses.cross_entropy(logits, labels).mean()
    attack = linf_pgd(eps=8 / 255)
    x_adv = attack(lambda x: losses.dlr(apply(variables, x), labels), x, key)
"""

from jaxrobust.losses.classification import (
    cross_entropy,
    dlr,
    margin,
    mart_bce,
    mart_kl,
    targeted_dlr,
    trades_kl,
)
from jaxrobust.losses.contrastive import (
    adversarial_contrastive,
    info_nce,
    nt_xent,
    supervised_contrastive,
    uniformity,
    unit_rows,
)
from jaxrobust.losses.image_text import clip_loss, neighbour_contrastive, two_view_clip
from jaxrobust.losses.reconstruction import absolute_error, squared_error

__all__ = [
    "absolute_error",
    "adversarial_contrastive",
    "clip_loss",
    "cross_entropy",
    "dlr",
    "info_nce",
    "margin",
    "mart_bce",
    "mart_kl",
    "neighbour_contrastive",
    "nt_xent",
    "squared_error",
    "supervised_contrastive",
    "targeted_dlr",
    "trades_kl",
    "two_view_clip",
    "uniformity",
    "unit_rows",
]
