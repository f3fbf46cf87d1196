"""Balls: projections, steps and draws against slow references and their own definitions."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxrobust import balls

NORMS = ["linf", "l2", "l1"]
SHAPE = (4, 3, 2, 1)
FREE = (-jnp.inf, jnp.inf)
values = hnp.arrays(np.float32, SHAPE, elements=st.floats(-3, 3, width=32))


def size(delta, eps, norm):
    scaled = np.where(eps > 0, delta / np.where(eps > 0, eps, 1), np.where(delta == 0, 0, np.inf))
    flat = np.abs(scaled).reshape(len(delta), -1)
    return {"linf": flat.max(1), "l2": np.sqrt((flat**2).sum(1)), "l1": flat.sum(1)}[norm]


def nearest_l1(v, radius, low, high):
    """min |d - v|^2 with |d|_1 <= radius and low <= d <= high, by bisection on the multiplier."""
    room = np.where(v > 0, high, -low)

    def shrink(t):
        return np.clip(np.abs(v) - t, 0, room)

    if shrink(0).sum() <= radius:
        return np.sign(v) * shrink(0)
    t = scipy.optimize.brentq(lambda t: shrink(t).sum() - radius, 0, np.abs(v).max(), xtol=1e-14)
    return np.sign(v) * shrink(t)


@pytest.mark.parametrize("norm", NORMS)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    delta=values,
    x=hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)),
    eps=st.sampled_from([0.0, 0.03, 0.5, 2.0]),
)
def test_projection_is_inside_ball_and_box_and_does_nothing_twice(norm, delta, x, eps):
    ball = balls.ball(norm)
    low, high = jnp.asarray(-x), jnp.asarray(1 - x)
    once = ball.project(jnp.asarray(delta), jnp.float32(eps), low, high)
    assert np.all(size(np.asarray(once), np.float32(eps), norm) <= 1 + 1e-5)
    assert np.all((once >= low) & (once <= high))
    twice = ball.project(once, jnp.float32(eps), low, high)
    np.testing.assert_allclose(twice, once, atol=2e-6)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(delta=values, x=hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)))
def test_l1_projection_equals_bisection(delta, x):
    got = balls.ball("l1").project(jnp.asarray(delta), jnp.float32(0.7), -x, 1 - x)
    for i in range(len(delta)):
        want = nearest_l1(delta[i].astype(np.float64), 0.7, -x[i], 1 - x[i])
        np.testing.assert_allclose(got[i], want, atol=2e-6)


def test_l1_projection_with_ties_and_zeros():
    delta = jnp.array([[2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-5.0, 0.0, 0.0, 0.0]])
    got = balls.ball("l1").project(delta, jnp.float32(3), *FREE)
    np.testing.assert_allclose(got, [[1, 1, 1, 0], [0, 0, 0, 0], [-3, 0, 0, 0]], atol=1e-6)


def test_linf_and_l2_projections_have_closed_forms():
    delta = jax.random.normal(jax.random.key(0), SHAPE)
    linf = balls.ball("linf").project(delta, jnp.float32(0.1), *FREE)
    np.testing.assert_array_equal(linf, np.clip(delta, -np.float32(0.1), np.float32(0.1)))
    l2 = balls.ball("l2").project(delta, jnp.float32(0.1), *FREE)
    length = np.sqrt((np.asarray(delta) ** 2).sum((1, 2, 3), keepdims=True))
    np.testing.assert_allclose(l2, delta / length * 0.1, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_of_the_ball_beats_the_step_on_a_linear_loss(norm):
    ball = balls.ball(norm)
    grad = jax.random.normal(jax.random.key(1), SHAPE)
    step = ball.ascend(grad, jnp.float32(0.5), jnp.float32(0.5), *FREE)
    np.testing.assert_allclose(balls.norms(step, norm), 0.5, rtol=1e-5)
    keys = jax.random.split(jax.random.key(2), 500)
    for key in keys[:50]:
        other = ball.sample(jax.random.split(key, SHAPE[0]), jnp.float32(0.5), SHAPE)
        assert np.all((grad * other).sum((1, 2, 3)) <= (grad * step).sum((1, 2, 3)) + 1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_steps_survive_gradients_that_underflow_when_squared(norm):
    grad = 1e-30 * jax.random.normal(jax.random.key(1), SHAPE)
    step = balls.ball(norm).ascend(grad, jnp.float32(0.5), jnp.float32(0.5), *FREE)
    np.testing.assert_allclose(balls.norms(step, norm), 0.5, rtol=1e-4)
    assert not np.any(balls.ball(norm).ascend(0 * grad, jnp.float32(0.5), jnp.float32(0.5), *FREE))


@pytest.mark.parametrize("norm", NORMS)
def test_samples_fill_the_ball(norm):
    n, shape = 4000, (4000, 2, 2, 1)
    keys = jax.random.split(jax.random.key(0), n)
    draws = balls.ball(norm).sample(keys, jnp.float32(0.3), shape)
    radius = np.asarray(balls.norms(draws, norm)) / 0.3
    assert radius.max() <= 1 + 1e-6
    # A uniform draw from a ball of 4 dimensions has a radius of density 4 r^3: mean 4/5.
    assert abs(radius.mean() - 0.8) < 4 * 0.163 / np.sqrt(n)
    assert np.abs(np.asarray(draws).mean(0)).max() < 0.02


@pytest.mark.parametrize("norm", NORMS)
def test_a_map_of_radii_freezes_pixels_and_scales_the_rest(norm):
    ball = balls.ball(norm)
    eps = jnp.zeros(SHAPE).at[:, 0].set(0.5).at[:, 1].set(0.1)
    keys = jax.random.split(jax.random.key(0), SHAPE[0])
    draw = ball.sample(keys, eps, SHAPE)
    delta = ball.project(draw + jax.random.normal(keys[0], SHAPE), eps, *FREE)
    for result in (draw, delta):
        assert not np.any(result[:, 2])
        assert np.all(size(np.asarray(result), np.asarray(eps), norm) <= 1 + 1e-5)


def test_radius_shapes():
    x = jnp.zeros((4, 3, 2, 1))
    assert balls.broadcast_radius(0.1, x).shape == ()
    assert balls.broadcast_radius(jnp.ones(4), x).shape == (4, 1, 1, 1)
    assert balls.broadcast_radius(jnp.ones((3, 2, 1)), x).shape == (1, 3, 2, 1)
    assert balls.broadcast_radius(jnp.ones((4, 3, 2, 1)), x).shape == (4, 3, 2, 1)
    for wrong in ((5,), (3, 2), (4, 3, 3, 1)):
        with pytest.raises(ValueError, match="eps must be a number"):
            balls.broadcast_radius(jnp.ones(wrong), x)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match=r"norm must be one of.*got 'l7'"):
        balls.ball("l7")
