"""Per-example losses on class logits: cross entropy, margin, DLR, and the TRADES and MART terms.

A label out of [0, k) raises ValueError where its value is known and gives NaN under a trace.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Real
from jaxtyping import ArrayLike as Number

from jaxrobust.losses._checks import (
    at_least_float32,
    check_labels,
    check_logits,
    check_same_shape,
    known,
)

# Guards the quotient of DLR where the top logits tie. AutoAttack, autopgd_base.py.
DLR_EPSILON = 1e-12


def cross_entropy(
    logits: Float[Array, "b k"],
    labels: Integer[Array, "b"],
    *,
    label_smoothing: Real[Number, ""] = 0.0,
) -> Float[Array, "b"]:
    """Cross entropy between softmax(logits) and the label, exact also for very sure examples.

    loss_i = (1 - s) * -log p_iy + s * mean_k(-log p_ik),  p_i = softmax(logits_i)

    Args:
        logits: [b, k] class scores, any scale.
        labels: [b] true classes in [0, k).
        label_smoothing: s in [0, 1], the weight of the uniform distribution.

    Returns:
        [b] losses in nats, >= 0, not reduced. With s = 0, both the loss and its gradient keep
        their relative precision while p_iy is nearly 1, where log_softmax would round to zero
        and an attack would follow rounding noise.

    Raises:
        ValueError: shapes do not match, labels are out of range, s is not in [0, 1].

    Source: smoothing as in Szegedy et al. 2016, section 7.
    """
    check_logits(logits, least=1)
    check_labels(labels, len(logits), classes=logits.shape[1])
    smoothing = known(label_smoothing)
    if smoothing is not None and not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    logits = at_least_float32(logits)
    loss = negative_log_likelihood(logits, labels)
    if smoothing is not None and smoothing == 0:
        return loss
    uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    return (1 - label_smoothing) * loss + label_smoothing * uniform


def margin(logits: Float[Array, "b k"], labels: Integer[Array, "b"]) -> Float[Array, "b"]:
    """Margin by which the best wrong class beats the true one.

    loss_i = max_{j != y} z_ij - z_iy

    Args:
        logits: [b, k] class scores z, k >= 2.
        labels: [b] true classes in [0, k).

    Returns:
        [b] margins in the unit of the logits: > 0 where the example is misclassified, < 0 where it
        is right, and 0 at a tie, which `argmax` gives to the class of the lower number.

    Raises:
        ValueError: shapes do not match, labels are out of range, fewer than 2 classes.

    Source: Carlini & Wagner 2017, f_6 without its clamp.
    """
    check_logits(logits, least=2)
    check_labels(labels, len(logits), classes=logits.shape[1])
    return _margin(at_least_float32(logits), labels)


def dlr(logits: Float[Array, "b k"], labels: Integer[Array, "b"]) -> Float[Array, "b"]:
    """Difference of logits ratio: the margin in units of the gap between first and third class.

    loss_i = -(z_y - max_{j != y} z_j) / (z_(1) - z_(3) + 1e-12),  z_(r) the r-th largest logit

    Args:
        logits: [b, k] class scores z, k >= 3.
        labels: [b] true classes in [0, k).

    Returns:
        [b] losses without unit, >= -1, > 0 where misclassified; unchanged by shifting and (up to
        the epsilon) by scaling the logits. Unbounded where the top three logits tie.

    Raises:
        ValueError: shapes do not match, labels are out of range, fewer than 3 classes.

    Source: Croce & Hein 2020 (AutoAttack), eq. 6.
    """
    check_logits(logits, least=3)
    check_labels(labels, len(logits), classes=logits.shape[1])
    logits = at_least_float32(logits)
    top = jax.lax.top_k(logits, 3)[0]
    return _margin(logits, labels) / (top[:, 0] - top[:, 2] + DLR_EPSILON)


def targeted_dlr(
    logits: Float[Array, "b k"], labels: Integer[Array, "b"], targets: Integer[Array, "b"]
) -> Float[Array, "b"]:
    """Targeted DLR: raising it moves the example from its label to the target class.

    loss_i = -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)

    Args:
        logits: [b, k] class scores z, k >= 4.
        labels: [b] true classes y in [0, k).
        targets: [b] target classes t in [0, k).

    Returns:
        [b] losses without unit, > 0 where the target beats the label.

    Raises:
        ValueError: shapes do not match, labels or targets are out of range, fewer than 4 classes.

    Source: Croce & Hein 2020 (AutoAttack), eq. 7.
    """
    check_logits(logits, least=4)
    check_labels(labels, len(logits), classes=logits.shape[1])
    check_labels(targets, len(logits), classes=logits.shape[1], name="targets")
    logits = at_least_float32(logits)
    top = jax.lax.top_k(logits, 4)[0]
    gap = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3])
    return (_score_of(logits, targets) - _score_of(logits, labels)) / (gap + DLR_EPSILON)


def trades_kl(logits: Float[Array, "b k"], logits_adv: Float[Array, "b k"]) -> Float[Array, "b"]:
    """TRADES' regulariser: divergence of the adversarial from the natural prediction.

    loss_i = KL(p_i || p'_i) = sum_k p_ik (log p_ik - log p'_ik)

    Args:
        logits: [b, k] scores of the natural images; p = softmax(logits).
        logits_adv: [b, k] scores of the adversarial images; p' = softmax(logits_adv).

    Returns:
        [b] divergences in nats, >= 0 up to rounding. Where both logits are equal the gradient is
        0 but for rounding: an attack on it must start away from the natural image.

    Raises:
        ValueError: the two logits have different shapes.

    Source: Zhang et al. 2019 (TRADES), eq. 5.
    """
    check_logits(logits, least=1)
    check_same_shape(logits, logits_adv, ("logits", "logits_adv"))
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    log_q = jax.nn.log_softmax(at_least_float32(logits_adv))
    p = jnp.exp(log_p)
    # A class that both sides rule out (logit -inf) adds 0, not -inf + inf.
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0.0), axis=-1)


def mart_bce(logits_adv: Float[Array, "b k"], labels: Integer[Array, "b"]) -> Float[Array, "b"]:
    """MART's boosted cross entropy: cross entropy plus a margin on the best wrong class.

    loss_i = -log p'_iy - log(1.0001 - max_{k != y} p'_ik + 1e-12),  p' = softmax(logits_adv)

    Args:
        logits_adv: [b, k] scores of the adversarial images, k >= 2.
        labels: [b] true classes in [0, k).

    Returns:
        [b] losses in nats, not reduced; > -1e-4, since 1.0001 stands where the paper has 1.

    Raises:
        ValueError: shapes do not match, labels are out of range, fewer than 2 classes.

    Source: Wang et al. 2020 (MART), eq. 8; constants of the authors' mart.py.
    """
    check_logits(logits_adv, least=2, name="logits_adv")
    check_labels(labels, len(logits_adv), classes=logits_adv.shape[1])
    logits_adv = at_least_float32(logits_adv)
    best_wrong = _best_other(jax.nn.softmax(logits_adv), labels)
    return negative_log_likelihood(logits_adv, labels) - jnp.log(1.0001 - best_wrong + 1e-12)


def mart_kl(
    logits: Float[Array, "b k"], logits_adv: Float[Array, "b k"], labels: Integer[Array, "b"]
) -> Float[Array, "b"]:
    """MART's regulariser: TRADES' divergence, weighted by how unsure the natural prediction is.

    loss_i = KL(p_i || p'_i) * (1.0000001 - p_iy)

    Args:
        logits: [b, k] scores of the natural images; p = softmax(logits).
        logits_adv: [b, k] scores of the adversarial images; p' = softmax(logits_adv).
        labels: [b] true classes in [0, k).

    Returns:
        [b] losses in nats, >= 0 up to rounding. The authors add 1e-12 to p' under the logarithm;
        here log p' is exact instead.

    Raises:
        ValueError: shapes do not match, labels are out of range.

    Source: Wang et al. 2020 (MART), eq. 10; constant of the authors' mart.py.
    """
    divergence = trades_kl(logits, logits_adv)
    check_labels(labels, len(logits), classes=logits.shape[1])
    p = jax.nn.softmax(at_least_float32(logits))
    # 1 - p_y, summed over the wrong classes: exact also where p_y rounds to 1.
    unsure = jnp.sum(jnp.where(_is_class(p, labels), 0.0, p), axis=-1)
    return divergence * (unsure + 1e-7)


def negative_log_likelihood(logits, labels):
    """-log softmax(logits)_y without checks, in the form that loses nothing near p_y = 1.

    With d_k = z_k - z_y and m = max(0, max_{k != y} d_k):
    loss = log(1 + sum_{k != y} e^{d_k}) = m + log1p(e^{-m} - 1 + sum_{k != y} e^{d_k - m}).
    A wrong class with logit -inf counts as absent; the true class must be finite.
    """
    difference = logits - _score_of(logits, labels)[:, None]
    others = jnp.where(_is_class(logits, labels), -jnp.inf, difference)
    # The loss does not depend on m, so m carries no gradient.
    m = jax.lax.stop_gradient(jnp.maximum(jnp.max(others, axis=-1), 0.0))
    return m + jnp.log1p(jnp.expm1(-m) + jnp.sum(jnp.exp(others - m[:, None]), axis=-1))


def _is_class(logits, labels):
    """Mask [b, k], True at each row's own class."""
    return labels[:, None] == jnp.arange(logits.shape[-1])


def _score_of(logits, labels):
    """Score of each row's own class, NaN for a label out of range.

    A mask rather than an index: indexing would silently wrap -1 to the last class, and its
    gradient would be a scatter.
    """
    own = _is_class(logits, labels)
    score = jnp.sum(jnp.where(own, logits, 0.0), axis=-1)
    return jnp.where(jnp.any(own, axis=-1), score, jnp.nan)


def _best_other(scores, labels):
    """Largest score among all classes but the row's own."""
    return jnp.max(jnp.where(_is_class(scores, labels), -jnp.inf, scores), axis=-1)


def _margin(logits, labels):
    return _best_other(logits, labels) - _score_of(logits, labels)
