"""Per-example contrastive losses on embeddings, with negatives gathered over the mesh.

Inside `shard_map` or `pmap`, `axis_name` gathers the candidates of all devices, so that [b] local
losses, put together, equal the losses of the global batch on one device. The gather's transpose
sums over the devices: the gradient of the *local sum* of losses with respect to a local embedding
(or image) is the gradient of the *global sum*. Under `jit` (global view) leave `axis_name` None.

An attack must name the same axis as training does, or its negatives, and with them the threat
model, change with the number of devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Real
from jaxtyping import ArrayLike as Number

from jaxrobust.losses._checks import (
    at_least_float32,
    check_embeddings,
    check_labels,
    check_positive,
)
from jaxrobust.losses._pairs import AxisName, gather, global_index, similarities, without_self
from jaxrobust.losses.classification import negative_log_likelihood


def unit_rows(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Scale every row to length 1; a zero row stays zero.

    y_i = x_i / |x_i|_2

    Args:
        x: [..., d] vectors of any scale, from 1e-38 to 1e38.

    Returns:
        [..., d] unit vectors, at least float32. At a zero row the gradient is that of the
        identity: finite, and able to move off.
    """
    x = at_least_float32(x)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    empty = largest < jnp.finfo(x.dtype).tiny
    # Dividing by the largest entry first keeps the squares in range; the direction, and so the
    # gradient, do not depend on it. Both `where`s are needed: 0 / 0 would leave NaN behind.
    x = x / jnp.where(empty, 1.0, largest)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(empty, 1.0, squares))


def info_nce(
    anchors: Float[Array, "b d"],
    positives: Float[Array, "b d"],
    *,
    temperature: Real[Number, ""] = 0.1,
    axis_name: AxisName = None,
) -> Float[Array, "b"]:
    """InfoNCE: each anchor must find its own positive among all positives of the batch.

    loss_i = -log( exp(s_ii / t) / sum_j exp(s_ij / t) ),  s_ij = cosine(anchor_i, positive_j)

    Args:
        anchors: [b, d] embeddings of one view; any scale, normalised here.
        positives: [b, d] embeddings of the other view; row i belongs to anchor i.
        temperature: t > 0, no unit.
        axis_name: mesh axis over which `positives` are gathered, so that negatives come from
            the whole global batch.

    Returns:
        [b] losses in nats, >= 0, not reduced.

    Raises:
        ValueError: the two views have different shapes, or temperature <= 0.

    Source: van den Oord et al. 2018, eq. 4.
    """
    check_embeddings(anchors, positives, ("anchors", "positives"))
    check_positive(temperature, "temperature")
    similarity = similarities(unit_rows(anchors), gather(unit_rows(positives), axis_name))
    own = global_index(anchors.shape[0], axis_name)
    return negative_log_likelihood(similarity / temperature, own)


def adversarial_contrastive(
    adversarial: Float[Array, "b d"],
    clean: Float[Array, "b d"],
    *,
    temperature: Real[Number, ""] = 0.5,
    axis_name: AxisName = None,
) -> Float[Array, "b"]:
    """CRoPD's loss as reported: a code must stay where it was, and clean codes apart.

    loss_i = -cos(a_i, z_i) / t + log sum_{j != i} exp(cos(z_i, z_j) / t)

    The second term compares clean codes alone: what raises the loss of an example does not depend
    on the rest of the batch, unlike InfoNCE, whose sum has a_i in it.

    Args:
        adversarial: [b, d] codes a of the attacked images; any scale, normalised here.
        clean: [b, d] codes z of the same images as they are.
        temperature: t > 0, no unit.
        axis_name: mesh axis over which the clean codes are gathered.

    Returns:
        [b] losses in nats, at least log(n - 1) - 2 / t for n examples, so they may be negative;
        not reduced.

    Raises:
        ValueError: the two have different shapes, temperature <= 0, or there is one example in all,
            which has no negatives.

    Source: CRoPD (arXiv:2504.10850), as its reviews give it.
    """
    check_embeddings(adversarial, clean, ("adversarial", "clean"))
    check_positive(temperature, "temperature")
    adversarial, clean = unit_rows(adversarial), unit_rows(clean)
    closeness = jnp.sum(adversarial * clean, axis=1)
    return uniformity(clean, temperature=temperature, axis_name=axis_name) - closeness / temperature


def uniformity(
    embeddings: Float[Array, "b d"],
    *,
    temperature: Real[Number, ""] = 0.5,
    axis_name: AxisName = None,
) -> Float[Array, "b"]:
    """How crowded it is around each embedding: log sum_{j != i} exp(cos(z_i, z_j) / t).

    Args:
        embeddings: [b, d]; any scale, normalised here.
        temperature: t > 0, no unit.
        axis_name: mesh axis over which the embeddings are gathered.

    Returns:
        [b] numbers in [log(n - 1) - 1 / t, log(n - 1) + 1 / t] for n examples.

    Raises:
        ValueError: temperature <= 0, or there is one example in all.
    """
    check_positive(temperature, "temperature")
    unit = unit_rows(embeddings)
    every = gather(unit, axis_name)
    if every.shape[0] < 2:
        raise ValueError("embeddings must be of at least two examples, got one without negatives")
    own = global_index(unit.shape[0], axis_name)
    return jax.nn.logsumexp(without_self(similarities(unit, every) / temperature, own), axis=1)


def nt_xent(
    z1: Float[Array, "b d"],
    z2: Float[Array, "b d"],
    *,
    temperature: Real[Number, ""] = 0.5,
    axis_name: AxisName = None,
) -> Float[Array, "b"]:
    """NT-Xent (SimCLR): each view must find its twin among all other views of the batch.

    loss_i = (l(z1_i, z2_i) + l(z2_i, z1_i)) / 2
    l(u, v) = -log( exp(cos(u, v) / t) / sum_{w != u} exp(cos(u, w) / t) ),  w over all 2 n views

    Args:
        z1: [b, d] embeddings of the first view; any scale, normalised here.
        z2: [b, d] embeddings of the second view; row i shows the same example as z1's.
        temperature: t > 0, no unit.
        axis_name: mesh axis over which both views are gathered.

    Returns:
        [b] losses in nats, >= 0, not reduced; their mean over the global batch is SimCLR's loss.

    Raises:
        ValueError: the two views have different shapes, or temperature <= 0.

    Source: Chen et al. 2020 (SimCLR), eq. 1.
    """
    check_embeddings(z1, z2, ("z1", "z2"))
    check_positive(temperature, "temperature")
    z1, z2 = unit_rows(z1), unit_rows(z2)
    all_1, all_2 = gather(z1, axis_name), gather(z2, axis_name)
    first = global_index(z1.shape[0], axis_name)
    second = first + all_1.shape[0]
    similarity = similarities(jnp.concatenate([z1, z2]), jnp.concatenate([all_1, all_2]))
    logits = without_self(similarity / temperature, jnp.concatenate([first, second]))
    losses = negative_log_likelihood(logits, jnp.concatenate([second, first]))
    return jnp.mean(losses.reshape(2, -1), axis=0)


def supervised_contrastive(
    embeddings: Float[Array, "b d"],
    labels: Integer[Array, "b"],
    *,
    second_view: Float[Array, "b d"] | None = None,
    temperature: Real[Number, ""] = 0.1,
    axis_name: AxisName = None,
) -> Float[Array, "b"]:
    """Supervised contrastive loss: each anchor must find everything that shares its label.

    loss_i = -1 / |P(i)| sum_{p in P(i)} log( exp(s_ip / t) / sum_{a != i} exp(s_ia / t) )
    P(i) = {p != i : label_p = label_i},  s = cosine

    Args:
        embeddings: [b, d] embeddings; any scale, normalised here.
        labels: [b] integers; equal numbers are one class.
        second_view: [b, d] embeddings of another view of the same examples, or None. With it
            both views are anchors and candidates, and loss_i is the mean over example i's two.
        temperature: t > 0, no unit.
        axis_name: mesh axis over which embeddings and labels are gathered.

    Returns:
        [b] losses in nats, >= 0, not reduced; 0 where nothing else shares the label. The authors'
        code multiplies by temperature / 0.07 on top, which eq. 2 does not.

    Raises:
        ValueError: shapes do not match, or temperature <= 0.

    Source: Khosla et al. 2020, eq. 2 (L_out).
    """
    views = [embeddings] if second_view is None else [embeddings, second_view]
    check_embeddings(embeddings, views[-1], ("embeddings", "second_view"))
    check_labels(labels, len(embeddings))
    check_positive(temperature, "temperature")
    views = [unit_rows(view) for view in views]
    gathered = [gather(view, axis_name) for view in views]
    index = global_index(embeddings.shape[0], axis_name)
    total = gathered[0].shape[0]
    own = jnp.concatenate([index + v * total for v in range(len(views))])
    similarity = similarities(jnp.concatenate(views), jnp.concatenate(gathered)) / temperature
    same = labels[:, None] == gather(labels, axis_name)[None, :]
    losses = _mean_over_positives(similarity, jnp.tile(same, (len(views), len(views))), own)
    return jnp.mean(losses.reshape(len(views), -1), axis=0)


def _mean_over_positives(similarity, same, own):
    """Khosla's eq. 2 for each row of [a, n] similarities; `own` is the row's own column."""
    if similarity.shape[1] == 1:  # Alone in the world: no candidates, so no softmax over them.
        return 0.0 * similarity[:, 0]
    positive = same & (own[:, None] != jnp.arange(similarity.shape[1]))
    normaliser = jax.nn.logsumexp(without_self(similarity, own), axis=-1)
    count = jnp.sum(positive, axis=-1)
    surprise = jnp.where(positive, normaliser[:, None] - similarity, 0.0)
    return jnp.sum(surprise, axis=-1) / jnp.maximum(count, 1)
