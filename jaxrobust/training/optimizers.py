"""Learning-rate schedules and optimizers under the names that the field's papers use."""

from collections.abc import Sequence

import optax

SCHEDULES = ("constant", "cosine", "piecewise", "one_cycle")


def learning_rate(
    name: str,
    peak: float,
    steps: int,
    *,
    warmup: float = 0.0,
    boundaries: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
) -> optax.Schedule:
    """A learning-rate schedule over a whole run.

    Args:
        name: "constant"; "cosine", to 0 at the end; "piecewise", times `factor` at each boundary;
            "one_cycle", up to `peak` in 30 % of the run and down again (Smith 2018).
        peak: the largest rate, > 0.
        steps: training steps of the whole run, >= 1.
        warmup: share of the run in [0, 1) over which the rate first rises from 0, linearly.
        boundaries: shares of the run in (0, 1], for "piecewise": Rice et al. 2020 use 0.5 and 0.75.
        factor: for "piecewise".

    Returns:
        step -> rate.

    Raises:
        ValueError: an unknown name or a number out of its range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name must be one of {SCHEDULES}, got {name!r}")
    if peak <= 0 or steps < 1 or not 0 <= warmup < 1:
        raise ValueError(
            "learning_rate needs peak > 0, steps >= 1 and warmup in [0, 1), "
            f"got {peak}, {steps} and {warmup}"
        )
    if not all(0 < share <= 1 for share in boundaries):
        raise ValueError(f"boundaries must be shares of the run in (0, 1], got {boundaries}")
    rising = round(warmup * steps)
    left = max(steps - rising, 1)
    if name == "constant":
        schedule = optax.constant_schedule(peak)
    elif name == "cosine":
        schedule = optax.cosine_decay_schedule(peak, left)
    elif name == "one_cycle":
        schedule = optax.cosine_onecycle_schedule(left, peak)
    else:
        drops = {round(share * steps) - rising: factor for share in boundaries}
        schedule = optax.piecewise_constant_schedule(peak, drops)
    if not rising:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rising), schedule], [rising])


def sgd(
    rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """SGD whose weight decay is part of the gradient, as in PyTorch and in the papers.

    Args:
        rate: learning rate or schedule.
        momentum: in [0, 1).
        weight_decay: coefficient of w in the gradient; 5e-4 for CIFAR.
        nesterov: look ahead.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(rate, momentum=momentum or None, nesterov=nesterov),
    )
