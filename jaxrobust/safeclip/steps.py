"""The training steps: unimodal with neighbours, CLIP on two views, and those of the baselines.

    step(state, batch, axis_name) -> (state, metrics)

batch holds image [b, h, w, c], tokens [b, 1 + v, t] (the caption itself first, then views of it)
and index [b]. The state is a `TrainState` whose `extra` is an `Extra`. All run by
`parallel.data_parallel`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxrobust import losses, parallel
from jaxrobust.keys import fold, numbered_keys
from jaxrobust.models import Clip
from jaxrobust.safeclip.pool import Pool, empty_pool, nearest, push
from jaxrobust.safeclip.rates import Rate, rate
from jaxrobust.training import TrainState
from jaxrobust.training.step import Step

Views = Callable[[Array, Array], Array]
KINDS = ("unimodal", "clip", "two_views", "roclip", "roclip_plain", "cleanclip")
LARGEST_SCALE = 100.0


class Extra(NamedTuple):
    """What the steps carry besides the network.

    Attributes:
        images: pool of image embeddings.
        texts: pool of text embeddings.
        rate: learning rate of the pass that is running.
    """

    images: Pool
    texts: Pool
    rate: Rate


class Embeddings(NamedTuple):
    """Unit rows of a batch: of the first and of the second view.

    Attributes:
        images: (a, b), [b, d] each.
        texts: (p, q), [b, d] each.
    """

    images: tuple[Float[Array, "b d"], Float[Array, "b d"]]
    texts: tuple[Float[Array, "b d"], Float[Array, "b d"]]


def adamw(weight_decay: float = 0.1) -> optax.GradientTransformation:
    """Adam's direction with decoupled decay; the step multiplies it by its rate.

    Vectors and scalars (biases, norms' scales, the temperature) are not decayed.
    """
    decayed = lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)  # noqa: E731
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay, decayed))


def create_state(
    clip: Clip,
    optimizer: optax.GradientTransformation,
    key: Array,
    shape: tuple[int, int, int],
    *,
    pool: int = 2048,
    start: dict | None = None,
) -> TrainState:
    """A fresh state; run it under `parallel.create` to make it on all devices.

    Args:
        clip: whose parameters are drawn.
        optimizer: of `adamw`.
        key: one typed key.
        shape: (h, w, c) of the images.
        pool: rows of each pool of neighbours.
        start: variables to begin from instead of drawn ones.
    """
    draw, run = jax.random.split(key)
    variables = clip.init(draw, shape) if start is None else jax.tree.map(jnp.asarray, start)
    params, stats = variables["params"], variables.get("batch_stats", {})
    width = jax.eval_shape(
        clip.encode_image, variables, jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    ).shape[1]
    extra = Extra(empty_pool(pool, width), empty_pool(pool, width), rate(0.0))
    return TrainState(
        jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), None, run, extra
    )


def training_step(
    clip: Clip,
    optimizer: optax.GradientTransformation,
    kind: str,
    *,
    views: Views | None = None,
    rows: str = "queries",
    neighbours: bool = True,
    dtype: Any = None,
) -> Step:
    """Builds one of the steps.

    "unimodal" holds views of an image together, and views of a caption, each by the nearest
    neighbour of the other view in a pool; no image ever meets a text. "two_views" is CLIP's loss
    with another view in each direction, "clip" the plain loss on captions as they are. "roclip"
    replaces each caption by the text of the pool nearest to its image, "roclip_plain" is plain CLIP
    on one augmented view, and "cleanclip" adds to CLIP's loss that views of one modality find
    each other.

    Args:
        clip: the dual encoder.
        optimizer: of `adamw`: its result is multiplied by the rate in the state.
        kind: one of `KINDS`.
        views: (keys [b], images) -> images, one random view; None leaves images as they are.
        rows: of `losses.neighbour_contrastive`: "queries" as in the authors' code.
        neighbours: False takes the other view itself, with its gradient, instead of the pool's
            nearest row.
        dtype: compute type of the encoders, such as `jnp.bfloat16`; the loss is float32.

    Returns:
        step(state, batch, axis_name=None) -> (state, metrics): loss, rate, gradient_norm and
        logit_scale.

    Raises:
        ValueError: an unknown kind.

    Source: SafeCLIP (arXiv:2310.05862), RoCLIP (Yang et al. 2023), CleanCLIP (Bansal et al. 2023).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    objective = _OBJECTIVES[kind]
    one_view = kind in ("clip", "roclip", "roclip_plain")

    def step(state: TrainState, batch: dict, axis_name: str | None = None):
        keys = numbered_keys(jax.random.fold_in(state.key, state.step), batch["index"])
        images = _image_views(None if kind == "clip" else views, keys, batch["image"], kind)
        texts = caption_views(keys, batch["tokens"])
        if kind in ("clip", "cleanclip"):
            texts = (batch["tokens"][:, 0], texts[1])
        if one_view:
            images, texts = images[:1], texts[:1]

        def mean_loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            image, text, stats = clip.train(
                variables, jnp.concatenate(images), jnp.concatenate(texts), axis_name=axis_name,
                dtype=dtype,
            )  # fmt: skip
            found = Embeddings(_halves(image, len(images)), _halves(text, len(texts)))
            scale = jnp.exp(params["logit_scale"])
            each, extra = objective(found, scale, state.extra, rows, neighbours, axis_name)
            return each.mean(), (stats, extra)

        (loss, (stats, extra)), gradients = parallel.mean_gradient(
            mean_loss, state.params, axis_name
        )
        metrics = {"loss": loss, "rate": extra.rate.value()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        new = _updated(optimizer, state, stats, extra, gradients)
        return new, {**metrics, "logit_scale": jnp.exp(new.params["logit_scale"])}

    return step


def _image_views(views, keys, images, kind) -> tuple[Array, Array]:
    if views is None:
        return images, images
    if kind == "cleanclip":
        return images, views(fold(keys, 1), images)
    return views(fold(keys, 0), images), views(fold(keys, 1), images)


def caption_views(
    keys: Array, tokens: Int[Array, "b v t"]
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """Two different views of each caption, drawn anew; the caption itself where it has none.

    Args:
        keys: [b] typed.
        tokens: [b, 1 + v, t]: the caption, then its views.
    """
    count = tokens.shape[1] - 1
    if not count:
        return tokens[:, 0], tokens[:, 0]
    drawn = jax.vmap(lambda key: jax.random.permutation(key, count)[:2])(fold(keys, 2))
    pick = lambda column: jnp.take_along_axis(tokens, column[:, None, None], 1)[:, 0]  # noqa: E731
    return pick(1 + drawn[:, 0]), pick(1 + drawn[:, -1])


def _halves(x: Array, parts: int) -> tuple[Array, Array]:
    found = jnp.split(x, parts)
    return found[0], found[-1]


def _unimodal(found, scale, extra, rows, neighbours, axis_name):
    each, pools = [], []
    for pool, (first, second) in ((extra.images, found.images), (extra.texts, found.texts)):
        if neighbours:
            target, _ = nearest(pool, first)
            each.append(
                losses.neighbour_contrastive(second, target, scale, rows=rows, axis_name=axis_name)
            )
            # Asked before it is filled: no example finds itself.
            first = parallel.gather_to_all(jax.lax.stop_gradient(first), axis_name)
            pool = push(pool, first)
        else:
            each.append(losses.info_nce(second, first, temperature=1 / scale, axis_name=axis_name))
        pools.append(pool)
    return 0.5 * (each[0] + each[1]), extra._replace(images=pools[0], texts=pools[1])


def _two_views(found, scale, extra, rows, neighbours, axis_name):
    each = losses.two_view_clip(found.images, found.texts, scale, axis_name=axis_name)
    return each, extra


def _clip(found, scale, extra, rows, neighbours, axis_name):
    each = losses.clip_loss(found.images[0], found.texts[0], scale, axis_name=axis_name)
    return each, extra


def _roclip(found, scale, extra, rows, neighbours, axis_name):
    images, texts = found.images[0], found.texts[0]
    matched, some = nearest(extra.texts, images)
    texts_used = jnp.where(some, matched, texts)
    each = losses.clip_loss(images, texts_used, scale, axis_name=axis_name)
    pool = push(extra.texts, parallel.gather_to_all(jax.lax.stop_gradient(texts), axis_name))
    return each, extra._replace(texts=pool)


def _cleanclip(found, scale, extra, rows, neighbours, axis_name):
    (image, image_view), (text, text_view) = found
    cross = losses.clip_loss(image, text, scale, axis_name=axis_name)
    within = [
        losses.info_nce(x, y, temperature=1 / scale, axis_name=axis_name)
        for x, y in ((image, image_view), (text, text_view))
    ]
    return cross + 0.5 * (within[0] + within[1]), extra


_OBJECTIVES = {
    "unimodal": _unimodal,
    "two_views": _two_views,
    "clip": _clip,
    "roclip": _roclip,
    "roclip_plain": _clip,
    "cleanclip": _cleanclip,
}


def _updated(optimizer, state, stats, extra, gradients) -> TrainState:
    direction, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    speed = extra.rate.value()
    params = jax.tree.map(lambda leaf, step: leaf - speed * step, state.params, direction)
    params["logit_scale"] = jnp.clip(params["logit_scale"], 0.0, jnp.log(LARGEST_SCALE))
    extra = extra._replace(rate=extra.rate.advanced())
    return TrainState(state.step + 1, params, stats, opt_state, state.ema, state.key, extra)
