"""Which pixels matter: scores from models, maps from people, and what to do with either.

    method = partial(salience.grad_cam, tap="layer3")
    scores = salience.compute(method, model.apply, variables, images, labels)
    maps = salience.top_fraction(scores, 0.2)
    train = salience.attach(train, maps)

A method is a pure function (apply, x, labels, keys) -> scores [b, h, w, 1], the larger the more
salient, with `apply` from images to logits; `functools.partial` gives it its settings. A map S is
[b, h, w, 1] in [0, 1], 1 where a pixel is salient: 1 - S is what an attack calls its mask.
"""

from jaxrobust.salience.activations import attention_rollout, grad_cam, layer_cam
from jaxrobust.salience.compute import cached, compute, made_by
from jaxrobust.salience.controls import displaced, least_salient, shuffled
from jaxrobust.salience.gradients import (
    gradient,
    integrated_attributions,
    integrated_gradients,
    smooth_grad,
)
from jaxrobust.salience.human import attach, from_alpha, from_boxes, from_files, unannotate
from jaxrobust.salience.maps import (
    area,
    blur,
    check_maps,
    dilate,
    invert,
    rank_map,
    soft,
    stand_out,
    top_fraction,
)
from jaxrobust.salience.perturbation import occlusion, rise

__all__ = [
    "area",
    "attach",
    "attention_rollout",
    "blur",
    "cached",
    "check_maps",
    "compute",
    "dilate",
    "displaced",
    "from_alpha",
    "from_boxes",
    "from_files",
    "grad_cam",
    "gradient",
    "integrated_attributions",
    "integrated_gradients",
    "invert",
    "layer_cam",
    "least_salient",
    "made_by",
    "occlusion",
    "rank_map",
    "rise",
    "shuffled",
    "smooth_grad",
    "soft",
    "stand_out",
    "top_fraction",
    "unannotate",
]
