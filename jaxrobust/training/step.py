"""The training step: one per-device function made of a model, an optimizer and an objective."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrobust import identity, parallel
from jaxrobust.attacks.inputs import check_steps
from jaxrobust.keys import fold, numbered_keys
from jaxrobust.models import AutoEncoder, Model
from jaxrobust.training.objectives import Context, Objective
from jaxrobust.training.state import TrainState

PyTree = Any
Step = Callable[..., tuple[TrainState, dict]]

# The two uses of an example's key.
_AUGMENT, _PERTURB = 0, 1


def train_step(
    model: Model | AutoEncoder,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    augment: Callable | None = None,
    accumulate: int = 1,
    dtype: Any = None,
    attack_dtype: Any = None,
    ema_decay: float | None = None,
) -> Step:
    """Builds the per-device step; `parallel.data_parallel` runs it on all devices.

    Parts that a defended model calls frozen stay as they are, whatever the optimizer does to
    weights without a gradient.

    Args:
        model: its `apply` is attacked, its `train` is trained.
        optimizer: any optax transformation.
        objective: `standard()`, `adversarial(attack)`, `trades(attack)`, ... (`objectives`).
        augment: (keys [b], images) -> images, on the device, before the attack. Where batches
            have salience maps: (keys, images, maps) -> (images, maps), as those of `data` do.
        accumulate: the batch is worked off in so many parts and their gradients averaged: the
            memory of a part, the update of the whole (but BatchNorm and losses that compare
            examples, such as contrastive ones, see the parts).
        dtype: compute type of the training forward and backward, such as `jnp.bfloat16`.
        attack_dtype: compute type of the network inside the attack, where PGD spends most of a
            step; images, perturbation and losses stay in float32. None is float32.
        ema_decay: decay of the weights' moving average, in [0, 1), for a state made with
            `create_state(..., ema=True)`; None keeps none.

    Returns:
        step(state, batch, axis_name=None) -> (state, metrics). batch is a dict of image
        [b, h, w, c], label [b], index [b] and, for methods that look at it, salience
        [b, h, w, 1]; metrics are scalars averaged over the global batch: loss, gradient_norm, and
        the objective's own, such as accuracy on the adversarial batch. Its attribute `config` says
        what it was made of, but for the optimizer.

    Raises:
        TypeError: the objective is none, an attack for instance.
        ValueError: an option out of its range; when traced, b not divisible by `accumulate`, or a
            state that was made for another step, with or without an EMA or the objective's `extra`.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be one, such as training.adversarial(attack), got {objective}"
        )
    check_steps(accumulate, "accumulate")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")

    frozen = model.config.get("frozen", ())

    def step(state: TrainState, batch: dict, axis_name: str | None = None):
        _check_state(state, objective, ema_decay)
        kinds = {"dtype": dtype, "attack_dtype": attack_dtype}
        run = partial(_part_gradient, model, objective, augment, kinds, axis_name, state)
        carry = (state.batch_stats, state.extra)
        if accumulate == 1:
            carry, gradients, found = run(carry, batch)
        else:
            carry, gradients, found = _accumulated(
                run, carry, state.params, batch, accumulate, axis_name
            )
        # Once for all parts.
        gradients, measured = parallel.mean((gradients, found.measured), axis_name)
        metrics = {**measured, **found.reported, "gradient_norm": optax.tree.norm(gradients)}
        return _update(optimizer, ema_decay, frozen, state, carry, gradients), metrics

    step.config = identity.describe(
        {
            "model": model, "objective": objective.config, "augment": augment,
            "accumulate": accumulate, "dtype": dtype and jnp.dtype(dtype).name,
            "attack_dtype": attack_dtype and jnp.dtype(attack_dtype).name, "ema_decay": ema_decay,
        }
    )  # fmt: skip
    return step


class _Found(NamedTuple):
    """Metrics of one part: of this device's examples, and of all devices' already."""

    measured: dict
    reported: dict


def _check_state(state: TrainState, objective: Objective, ema_decay: float | None) -> None:
    """Refuses, when traced, a state that was not made for this step."""
    if ema_decay is not None and state.ema is None:
        raise ValueError("ema_decay needs a state with an EMA: create_state(..., ema=True)")
    if ema_decay is None and state.ema is not None:
        raise ValueError(
            "a state with an EMA needs train_step(..., ema_decay=...): it would stay as it began"
        )
    wanted, found = ({} if extra is None else extra for extra in (objective.extra, state.extra))
    if jax.tree.structure(wanted) != jax.tree.structure(found):
        raise ValueError(
            f"the state's extra must be the objective's, create_state(..., extra=objective.extra): "
            f"expected {jax.tree.structure(wanted)}, got {jax.tree.structure(found)}"
        )


def _accumulated(run, carry, params, batch, count, axis_name):
    """As one part's, with the means over all: one sum of gradients in memory, however many."""

    def add(carry, part):
        rest, total = carry
        rest, gradients, found = run(rest, part)
        return (rest, jax.tree.map(jnp.add, total, gradients)), found

    nothing = parallel.varying(jax.tree.map(jnp.zeros_like, params), axis_name)
    (carry, total), found = jax.lax.scan(add, (carry, nothing), _parts(batch, count))
    gradients = jax.tree.map(lambda leaf: leaf / count, total)
    return carry, gradients, jax.tree.map(lambda leaf: leaf.mean(0), found)


def _parts(batch, count):
    size = batch["label"].shape[0]
    if size % count:
        raise ValueError(f"accumulate must divide the {size} examples per device, got {count}")
    return jax.tree.map(lambda leaf: leaf.reshape(count, size // count, *leaf.shape[1:]), batch)


def _part_gradient(model, objective, augment, kinds, axis_name, state, carry, batch):
    """(batch_stats, extra), this device's gradients, and metrics, after one part of the batch."""
    batch_stats, extra = carry
    images, labels, salience = batch["image"], batch["label"], batch.get("salience")
    keys = numbered_keys(jax.random.fold_in(state.key, state.step), batch["index"])
    if augment is not None and salience is not None:
        images, salience = augment(fold(keys, _AUGMENT), images, salience)
    elif augment is not None:
        images = augment(fold(keys, _AUGMENT), images)

    # A model of one's own need not know of compute types.
    attacked = {} if kinds["attack_dtype"] is None else {"dtype": kinds["attack_dtype"]}

    def apply(x, **options):
        variables = {"params": state.params, "batch_stats": batch_stats}
        return model.apply(variables, x, **options, **attacked)

    context = Context(apply, fold(keys, _PERTURB), state.step, extra, axis_name, salience)
    x_adv, extra, metrics = objective.perturb(context, images, labels)
    x_adv = jax.lax.stop_gradient(x_adv)

    def mean_loss(params):
        def forward(x, **options):
            variables = {"params": params, "batch_stats": batch_stats}
            return model.train(variables, x, axis_name=axis_name, dtype=kinds["dtype"], **options)

        losses, measured, stats = objective.loss(context, forward, images, x_adv, labels)
        return losses.mean(), (stats, measured)

    params = state.params
    if objective.move_weights is not None:
        # All devices move to the same weights.
        gradient_fn = lambda p: parallel.mean_gradient(mean_loss, p, axis_name)[1]  # noqa: E731
        params = objective.move_weights(gradient_fn, params, state.step)
    params = parallel.varying(params, axis_name)
    (loss, (batch_stats, measured)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return (batch_stats, extra), gradients, _Found({"loss": loss, **measured}, metrics)


def _held(frozen, new, old):
    """The new tree with the old one's frozen parts."""
    return {**new, **{name: old[name] for name in frozen if name in old}} if frozen else new


def _update(optimizer, ema_decay, frozen, state, carry, gradients):
    batch_stats, extra = carry
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Weight decay moves what no gradient reaches.
    params = _held(frozen, params, state.params)
    ema = state.ema
    if ema_decay is not None:
        ema = optax.incremental_update((params, batch_stats), ema, 1 - ema_decay)
        # A mean of equal numbers differs from them by its rounding.
        ema = tuple(_held(frozen, *parts) for parts in zip(ema, state.ema, strict=True))
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema, state.key, extra)
