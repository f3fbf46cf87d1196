"""Training: state, objectives, steps, schedules and the loop."""

from jaxrobust.training.fit import Fitted, fit
from jaxrobust.training.linear_head import fit_head
from jaxrobust.training.logging import metric_logger, read_metrics
from jaxrobust.training.objectives import (
    Context,
    Objective,
    adversarial,
    described,
    guarded_n_fgsm,
    mart,
    standard,
    trades,
    with_awp,
)
from jaxrobust.training.optimizers import learning_rate, sgd
from jaxrobust.training.smoothing import consistency, denoising, gaussian, smooth_adv
from jaxrobust.training.state import TrainState, create_state
from jaxrobust.training.step import train_step

__all__ = [
    "Context",
    "Fitted",
    "Objective",
    "TrainState",
    "adversarial",
    "consistency",
    "create_state",
    "denoising",
    "described",
    "fit",
    "fit_head",
    "gaussian",
    "guarded_n_fgsm",
    "learning_rate",
    "mart",
    "metric_logger",
    "read_metrics",
    "sgd",
    "smooth_adv",
    "standard",
    "trades",
    "train_step",
    "with_awp",
]
