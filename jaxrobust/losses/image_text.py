"""Contrastive losses of image-text pre-training: two views of a pair, and nearest neighbours.

As in `contrastive`: one number per example, and `axis_name` gathers the candidates of all devices.
"""

import jax
from jaxtyping import Array, Float, Real
from jaxtyping import ArrayLike as Number

from jaxrobust.losses._checks import check_embeddings, check_positive
from jaxrobust.losses._pairs import AxisName, gather, global_index, similarities
from jaxrobust.losses.classification import negative_log_likelihood
from jaxrobust.losses.contrastive import unit_rows

NEIGHBOUR_AXES = ("queries", "neighbours", "both")


def clip_loss(
    image_embeddings: Float[Array, "b d"],
    text_embeddings: Float[Array, "b d"],
    logit_scale: Real[Number, ""] = 1 / 0.07,
    *,
    axis_name: AxisName = None,
) -> Float[Array, "b"]:
    """CLIP's symmetric loss: each image must find its text, and each text its image.

    loss_i = -(log softmax_j(g s_ij)_i + log softmax_j(g s_ji)_i) / 2
    s_ij = cosine(image_i, text_j)

    Args:
        image_embeddings: [b, d]; any scale, normalised here.
        text_embeddings: [b, d]; row i is the caption of image i.
        logit_scale: g > 0, the inverse temperature itself (CLIP learns its logarithm).
        axis_name: mesh axis over which images and texts are gathered.

    Returns:
        [b] losses in nats, >= 0, not reduced.

    Raises:
        ValueError: shapes differ, or logit_scale <= 0.

    Source: Radford et al. 2021 (CLIP), figure 3.
    """
    check_embeddings(image_embeddings, text_embeddings, ("image_embeddings", "text_embeddings"))
    check_positive(logit_scale, "logit_scale")
    images, texts = unit_rows(image_embeddings), unit_rows(text_embeddings)
    own = global_index(images.shape[0], axis_name)
    to_text = logit_scale * similarities(images, gather(texts, axis_name))
    to_image = logit_scale * similarities(texts, gather(images, axis_name))
    return 0.5 * (negative_log_likelihood(to_text, own) + negative_log_likelihood(to_image, own))


def two_view_clip(
    images: tuple[Float[Array, "b d"], Float[Array, "b d"]],
    texts: tuple[Float[Array, "b d"], Float[Array, "b d"]],
    logit_scale: Real[Number, ""] = 1 / 0.07,
    *,
    axis_name: AxisName = None,
) -> Float[Array, "b"]:
    """CLIP's loss with another view of the pair in each of its two directions.

    loss_i = -(log softmax_j(g a_i . q_j)_i + log softmax_j(g p_i . b_j)_i) / 2

    Args:
        images: two views (a, b) of the images, [b, d] each; any scale, normalised here.
        texts: two views (p, q) of their captions, [b, d] each.
        logit_scale: g > 0, the inverse temperature.
        axis_name: mesh axis over which q and b are gathered.

    Returns:
        [b] losses in nats, >= 0, not reduced. With equal views it is `clip_loss`.

    Raises:
        ValueError: shapes differ, or logit_scale <= 0.

    Source: the authors' code of SafeCLIP (arXiv:2310.05862).
    """
    (a, b), (p, q) = images, texts
    check_embeddings(a, q, ("images[0]", "texts[1]"))
    check_embeddings(p, b, ("texts[0]", "images[1]"))
    check_positive(logit_scale, "logit_scale")
    a, b, p, q = (unit_rows(view) for view in (a, b, p, q))
    own = global_index(a.shape[0], axis_name)
    to_text = logit_scale * similarities(a, gather(q, axis_name))
    to_image = logit_scale * similarities(p, gather(b, axis_name))
    return 0.5 * (negative_log_likelihood(to_text, own) + negative_log_likelihood(to_image, own))


def neighbour_contrastive(
    queries: Float[Array, "b d"],
    neighbours: Float[Array, "b d"],
    logit_scale: Real[Number, ""] = 1 / 0.07,
    *,
    rows: str = "queries",
    axis_name: AxisName = None,
) -> Float[Array, "b"]:
    """Each view must be close to the neighbour of its twin view, and far from others' neighbours.

    loss_i = -log softmax_j(g z_i . n_j)_i      rows="queries", the authors' code
    loss_i = -log softmax_j(g n_i . z_j)_i      rows="neighbours", as published, and NNCLR's
    "both" is the mean of the two.

    Args:
        queries: [b, d] embeddings z of one view; any scale, normalised here.
        neighbours: [b, d] embeddings n, nearest to the other view of the same examples in a pool
            of earlier ones. No gradient reaches them.
        logit_scale: g > 0, the inverse temperature.
        rows: which of the two searches: the softmax runs over the other one.
        axis_name: mesh axis over which the candidates are gathered.

    Returns:
        [b] losses in nats, >= 0, not reduced.

    Raises:
        ValueError: shapes differ, logit_scale <= 0, or an unknown name.

    Source: Dwibedi et al. 2021 (NNCLR), eq. 2; SafeCLIP (arXiv:2310.05862).
    """
    check_embeddings(queries, neighbours, ("queries", "neighbours"))
    check_positive(logit_scale, "logit_scale")
    if rows not in NEIGHBOUR_AXES:
        raise ValueError(f"rows must be one of {NEIGHBOUR_AXES}, got {rows!r}")
    queries, neighbours = unit_rows(queries), unit_rows(jax.lax.stop_gradient(neighbours))
    own = global_index(queries.shape[0], axis_name)

    def towards(anchors: Array, candidates: Array) -> Array:
        logits = logit_scale * similarities(anchors, gather(candidates, axis_name))
        return negative_log_likelihood(logits, own)

    if rows == "queries":
        return towards(queries, neighbours)
    if rows == "neighbours":
        return towards(neighbours, queries)
    return 0.5 * (towards(queries, neighbours) + towards(neighbours, queries))
