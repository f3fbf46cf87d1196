"""CRoPD: a robust auto-encoder in front of a frozen foundation model that training never sees.

    autoencoder = models.autoencoder(shape)
    objective = cropd.recommended(eps=4 / 255)  # or robust_autoencoder(attack): as published
    step = training.train_step(autoencoder, optimizer, objective)
    ...
    defended = models.defend(autoencoder, (96, 96), foundation, head=classes)
    variables = models.join(preprocessor=ours, foundation=published)
    head = cropd.fit_head(cropd.features(defended, variables, images), labels, classes)

Source: CRoPD (arXiv:2504.10850).
"""

from jaxrobust.cropd.bound import BoundReport, bound_report
from jaxrobust.cropd.heads import features, fit_head
from jaxrobust.cropd.objective import AIMS, FORMS, Weights, recommended, robust_autoencoder

__all__ = [
    "AIMS",
    "FORMS",
    "BoundReport",
    "Weights",
    "bound_report",
    "features",
    "fit_head",
    "recommended",
    "robust_autoencoder",
]
