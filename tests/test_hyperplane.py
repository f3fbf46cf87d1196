"""The nearest point of a hyperplane in the box, against linear programs and a slow search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, linprog

from jaxrobust.attacks import hyperplane

CASES, PIXELS = 60, 7
RNG = np.random.default_rng(0)
X = RNG.random((CASES, PIXELS)).astype(np.float32)
X[:20] = X[:20].round()  # pixels at the walls have room on one side only
W = RNG.normal(size=(CASES, PIXELS)).astype(np.float32)
W[10:30, :3] = 0
INSIDE = RNG.random((CASES, PIXELS)).astype(np.float32)
OFFSET = (W * INSIDE).sum(1)  # each hyperplane meets the box in INSIDE


def smallest(x, w, offset, norm):
    """The size of the shortest move, by other means."""
    bounds = [(-v, 1 - v) for v in x]
    need = offset - w @ x
    if norm == "l2":
        sign = np.sign(need)
        move = lambda t: np.clip(sign * t * w, -x, 1 - x)  # noqa: E731
        t = brentq(lambda t: abs(w @ move(t)) - abs(need), 0, 1e6, xtol=1e-12)
        return np.linalg.norm(move(t))
    eye, one = np.eye(PIXELS), np.ones((PIXELS, 1))
    if norm == "linf":  # minimise s with -s <= d <= s
        cost = [0.0] * PIXELS + [1.0]
        above = np.block([[eye, -one], [-eye, -one]])
        equal = np.append(w, 0)[None]
        extra = [(0, None)]
    else:  # minimise sum s with -s_i <= d_i <= s_i
        cost = [0.0] * PIXELS + [1.0] * PIXELS
        above = np.block([[eye, -eye], [-eye, -eye]])
        equal = np.append(w, np.zeros(PIXELS))[None]
        extra = [(0, None)] * PIXELS
    found = linprog(cost, above, np.zeros(2 * PIXELS), equal, [need], bounds + extra)
    return found.fun


def length(d, norm):
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    return np.linalg.norm(d, order, axis=1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_move_is_the_shortest_that_reaches_the_hyperplane_inside_the_box(norm):
    d = np.asarray(jax.jit(hyperplane.project, static_argnums=3)(X, W, OFFSET, norm))
    assert (d[W == 0] == 0).all()
    assert (X + d >= -1e-6).all()
    assert (X + d <= 1 + 1e-6).all()
    np.testing.assert_allclose((W * (X + d)).sum(1), OFFSET, atol=2e-5)
    expected = [smallest(*case, norm) for case in zip(X, W, OFFSET, strict=True)]
    np.testing.assert_allclose(length(d, norm), expected, atol=2e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_where_the_box_stays_short_of_the_hyperplane_every_pixel_goes_to_its_wall(norm):
    beyond = (np.maximum(W, 0)).sum(1) + 1
    d = np.asarray(hyperplane.project(jnp.asarray(X), jnp.asarray(W), jnp.asarray(beyond), norm))
    walls = np.where(W > 0, 1 - X, np.where(W < 0, -X, 0))
    np.testing.assert_allclose(d, walls, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_row_does_not_depend_on_its_neighbours(norm):
    run = jax.jit(hyperplane.project, static_argnums=3)
    whole, half = run(X, W, OFFSET, norm), run(X[::2], W[::2], OFFSET[::2], norm)
    # Sums over pixels may be taken in another order in another shape.
    np.testing.assert_allclose(np.asarray(whole)[::2], half, atol=1e-6)


def test_flat_gradients_move_nothing():
    zeros = jnp.zeros((3, PIXELS))
    for norm in ("linf", "l2", "l1"):
        d = hyperplane.project(zeros + 0.5, zeros, jnp.asarray([0.0, 1.0, -1.0]), norm)
        np.testing.assert_array_equal(d, zeros)
