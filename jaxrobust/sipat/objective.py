"""The training objective: any adversarial objective, made to spare what is salient."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrobust import parallel
from jaxrobust.keys import fold
from jaxrobust.salience import rank_map, top_fraction
from jaxrobust.salience.maps import check_area
from jaxrobust.sipat.masking import Masking
from jaxrobust.training import Context, Objective
from jaxrobust.training.objectives import described

# Folded into an example's key for salience methods that draw; the attack keeps the key itself, so
# that a map of 0 gives the run without salience bit for bit.
_SALIENCE = 0x5A11


@described
def salience_preserving(
    objective: Objective,
    masking: Masking | None = None,
    *,
    source: Callable[..., Array] | None = None,
    area: Any = None,
    warmup_steps: int = 0,
) -> Objective:
    """SIP-AT over any objective: its attack keeps to the mask, its loss is left as it is.

    Args:
        objective: `adversarial(attack)`, `trades(attack)`, `mart(attack)`, `guarded_n_fgsm(...)`;
            `with_awp` goes around either side.
        masking: which pixels are spared, and how; by default hard and in the loop.
        source: None takes the batch's column "salience", which the augmentation has moved along.
            A salience method, (apply, x, labels, keys) -> [b, h, w, 1], asks the current model in
            every step, at the cost of the method.
        area: None takes the column (or the source's scores) as maps. Otherwise they are scores, of
            which the top share is protected: a number; an array [classes], a share for each class;
            or a function of the step, of either, such as `optax.linear_schedule(0.5, 0.1, 2000)`.
            With masking of mode "soft" the shares are the means of `salience.rank_map`. An example
            whose scores are all equal counts as unannotated, and nothing of it is protected.
        warmup_steps: steps at the start in which the mask is 1 everywhere.

    Returns:
        The objective. Its metric "protected_area" is the mean share of eps that was taken away.

    Raises:
        ValueError: area outside [0, 1] or warmup_steps < 0; when traced, a batch without salience.

    Source: Redgrave and Czajka 2025; the combinations with other losses are this library's.
    """
    masking = Masking() if masking is None else masking
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
    if area is not None and not callable(area):
        area = check_area(np.asarray(area), np.size(area))

    def perturb(context: Context, images: Array, labels: Array):
        scores = _scores(source, context, images, labels)
        salience = _select(scores, area, masking.mode == "soft", context.step, labels)
        mask = jnp.where(context.step < warmup_steps, 1, masking.mask(salience))
        masked = context._replace(mask=masking.in_loop(mask))
        x_adv, extra, metrics = objective.perturb(masked, images, labels)
        protected = parallel.mean(1 - mask.mean(), context.axis_name)
        x_adv = masking.afterwards(images, x_adv, mask)
        return x_adv, extra, {**metrics, "protected_area": protected}

    return objective._replace(perturb=perturb)


def _scores(source, context, images, labels):
    if source is not None:
        keys = fold(context.keys, _SALIENCE)
        return source(context.apply, images, labels, keys)
    if context.salience is None:
        raise ValueError(
            'batch must have the column "salience": attach maps to the data set '
            "(salience.attach), or give a source"
        )
    expected = (*images.shape[:3], 1)
    if context.salience.shape != expected:
        raise ValueError(f"salience must have shape {expected}, got {context.salience.shape}")
    return context.salience


def _select(scores, area, is_soft, step, labels):
    """The maps S of a batch."""
    if area is None:
        return scores
    share = jnp.asarray(area(step) if callable(area) else area, scores.dtype)
    share = share[labels] if share.ndim else share
    chosen = rank_map(scores, share) if is_soft else top_fraction(scores, share)
    annotated = scores.max((1, 2, 3), keepdims=True) > scores.min((1, 2, 3), keepdims=True)
    return jnp.where(annotated, chosen, 0)
