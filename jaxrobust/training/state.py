"""The training state: arrays and nothing else, so that it checkpoints and shards as it is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from jaxrobust.models import AutoEncoder, Model

PyTree = Any


class TrainState(NamedTuple):
    """What a training run carries from step to step.

    Attributes:
        step: how many steps have been taken.
        params: float32 parameters.
        batch_stats: running statistics of BatchNorm; {} without it.
        opt_state: the optimizer's state.
        ema: moving average of (params, batch_stats), or None.
        key: the run's key. Randomness of example i at step s is a function of (key, s, i).
        extra: what a method carries besides: pools, masks, the guard of N-FGSM.
    """

    step: Int[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree
    key: Key[Array, ""]
    extra: PyTree

    def variables(self, *, averaged: bool = False) -> dict[str, PyTree]:
        """What `model.apply` takes; `averaged` gives the moving average instead.

        Raises:
            ValueError: the average is asked for and none is kept.
        """
        if averaged and self.ema is None:
            raise ValueError("averaged=True needs a state with an EMA: create_state(..., ema=True)")
        params, batch_stats = self.ema if averaged else (self.params, self.batch_stats)
        return {"params": params, "batch_stats": batch_stats}


def create_state(
    model: Model | AutoEncoder,
    optimizer: optax.GradientTransformation,
    key: Array,
    shape: tuple[int, int, int],
    *,
    ema: bool = False,
    extra: PyTree = None,
) -> TrainState:
    """A fresh state; run it under `parallel.create` to make it on all devices.

    Args:
        model: whose parameters are drawn.
        optimizer: whose state is made.
        key: one typed key; gives both the parameters and the run's randomness.
        shape: (h, w, c) of the images.
        ema: keep a moving average of the weights.
        extra: the method's own arrays, `objective.extra`.
    """
    draw, run = jax.random.split(key)
    variables = model.init(draw, shape)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        # Copies: a donated state must not hold one buffer twice.
        ema=jax.tree.map(jnp.copy, (params, batch_stats)) if ema else None,
        key=run,
        extra={} if extra is None else extra,
    )
