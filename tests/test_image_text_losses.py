"""Losses of image-text pre-training against slow numpy versions, and where gradients may not go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import losses

RANDOM = np.random.default_rng(0)
A, B, P, Q = jnp.asarray(RANDOM.normal(size=(4, 5, 3)), jnp.float32)
SCALE = 7.0


def slow(rows, columns):
    """-log softmax of each row's own column, one at a time."""
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    rows, columns, out = np.float64(rows), np.float64(columns), []
    for i, row in enumerate(rows):
        logits = np.array([SCALE * unit(row) @ unit(other) for other in columns])
        out.append(np.log(np.exp(logits).sum()) - logits[i])
    return np.array(out)


def test_two_views_equal_a_slow_version():
    found = losses.two_view_clip((A, B), (P, Q), SCALE)
    np.testing.assert_allclose(found, (slow(A, Q) + slow(P, B)) / 2, rtol=1e-5)


def test_equal_views_give_the_clip_loss():
    found = losses.two_view_clip((A, A), (P, P), SCALE)
    np.testing.assert_allclose(found, losses.clip_loss(A, P, SCALE), rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("queries", slow(A, B)),
        ("neighbours", slow(B, A)),
        ("both", (slow(A, B) + slow(B, A)) / 2),
    ],
)
def test_neighbours_equal_a_slow_version_on_either_axis(rows, expected):
    found = losses.neighbour_contrastive(A, B, SCALE, rows=rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("rows", ["queries", "neighbours", "both"])
def test_no_gradient_reaches_the_neighbours(rows):
    def total(queries, neighbours):
        return losses.neighbour_contrastive(queries, neighbours, SCALE, rows=rows).sum()

    to_queries, to_neighbours = jax.grad(total, (0, 1))(A, B)
    assert np.abs(to_queries).max() > 0
    assert not np.any(to_neighbours)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.neighbour_contrastive(A, B, rows="columns"), "rows must be one of"),
        (lambda: losses.two_view_clip((A, B), (P, Q), 0.0), "logit_scale must be > 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
