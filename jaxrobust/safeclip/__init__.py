"""SAFECLIP: image-text pre-training that withstands poisons and backdoors; attacks and baselines.

    poisoned, manifest = safeclip.targeted(pairs, ...)
    clip = models.clip(tower, vocabulary=tokenizer.vocabulary)
    few = poisoned.take(thin(near_copies(thumbnails(poisoned.images)), most=5))
    recipe = safeclip.recommended()  # or Recipe(): as published, or official()
    fitted = safeclip.fit(clip, recipe, few.images, tokens, views=views)
    safeclip.metrics.poison_success(...)

Source: Yang et al. 2024, "Better Safe than Sorry" (arXiv:2310.05862).
"""

from jaxrobust.safeclip import density, metrics, templates, triggers
from jaxrobust.safeclip.agreement import agreement
from jaxrobust.safeclip.canary import canaries
from jaxrobust.safeclip.copies import near_copies, thin, thumbnails
from jaxrobust.safeclip.fit import Pretrained, Trust, fit
from jaxrobust.safeclip.manifest import Manifest
from jaxrobust.safeclip.poisons import backdoor, targeted
from jaxrobust.safeclip.pool import Pool, empty_pool, nearest, push
from jaxrobust.safeclip.rates import Plan, Rate, mixed_rates, rate
from jaxrobust.safeclip.recipe import METHODS, Recipe, official, passes, recommended
from jaxrobust.safeclip.scoring import similarities
from jaxrobust.safeclip.split import (
    Mixture,
    Split,
    by_rank,
    conformal,
    first_split,
    fit_mixture,
    gaussian_mixture,
    largest,
    running_maximum,
)
from jaxrobust.safeclip.steps import KINDS, adamw, caption_views, create_state, training_step

__all__ = [
    "KINDS",
    "METHODS",
    "Manifest",
    "Mixture",
    "Plan",
    "Pool",
    "Pretrained",
    "Rate",
    "Recipe",
    "Split",
    "Trust",
    "adamw",
    "agreement",
    "backdoor",
    "by_rank",
    "canaries",
    "caption_views",
    "conformal",
    "create_state",
    "density",
    "empty_pool",
    "first_split",
    "fit",
    "fit_mixture",
    "gaussian_mixture",
    "largest",
    "metrics",
    "mixed_rates",
    "near_copies",
    "nearest",
    "official",
    "passes",
    "push",
    "rate",
    "recommended",
    "running_maximum",
    "similarities",
    "targeted",
    "templates",
    "thin",
    "thumbnails",
    "training_step",
    "triggers",
]
