"""Tests of the learning-rate schedules at chosen steps, and of SGD against PyTorch's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust.training import learning_rate, sgd


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("constant", {}, {0: 0.2, 99: 0.2}),
        ("constant", {"warmup": 0.1}, {0: 0.0, 5: 0.1, 10: 0.2, 99: 0.2}),
        ("cosine", {}, {0: 0.2, 50: 0.1, 100: 0.0}),
        # The cosine spans what the warm-up leaves: steps 20 to 100.
        ("cosine", {"warmup": 0.2}, {0: 0.0, 10: 0.1, 20: 0.2, 60: 0.1, 100: 0.0}),
        ("piecewise", {}, {0: 0.2, 49: 0.2, 51: 0.02, 74: 0.02, 76: 0.002, 99: 0.002}),
        ("piecewise", {"boundaries": (0.6,), "factor": 0.5}, {59: 0.2, 61: 0.1, 99: 0.1}),
        ("piecewise", {"warmup": 0.1}, {5: 0.1, 49: 0.2, 51: 0.02, 76: 0.002}),
        # Rises from peak / 25 by half a cosine until step 30.
        ("one_cycle", {}, {0: 0.008, 15: 0.104, 30: 0.2}),
    ],
)
def test_schedules_have_known_values_at_chosen_steps(name, options, values):
    schedule = learning_rate(name, 0.2, 100, **options)
    for step, value in values.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-7), step


def test_one_cycle_ends_near_zero():
    schedule = learning_rate("one_cycle", 0.2, 100)
    rates = [float(schedule(step)) for step in range(101)]
    assert np.argmax(rates) == 30
    assert rates[-1] < 1e-3 * 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 0.1, 100), "name must be one of .*, got 'linear'"),
        (("cosine", 0.0, 100), "peak > 0, .* got 0.0, 100 and 0.0"),
        (("cosine", 0.1, 0), "steps >= 1"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(*arguments)


def test_boundaries_are_shares_of_the_run_and_no_epochs():
    with pytest.raises(ValueError, match=r"shares of the run in \(0, 1\], got \(100\.0, 150\.0\)"):
        learning_rate("piecewise", 0.1, 1000, boundaries=(100.0, 150.0))


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_a_warm_up_is_a_share_of_the_run(warmup):
    with pytest.raises(ValueError, match=r"warmup in \[0, 1\)"):
        learning_rate("cosine", 0.1, 100, warmup=warmup)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 5e-2), (0.9, 0.0), (0.0, 5e-2)])
def test_sgd_equals_the_formula_of_pytorch(momentum, weight_decay, nesterov):
    # torch.optim.SGD, dampening 0: g += decay w; v = mu v + g; w -= lr (g + mu v, or v).
    random = np.random.default_rng(0)
    w, velocity = random.normal(size=4), np.zeros(4)
    optimizer = sgd(
        optax.linear_schedule(0.1, 0.0, 10),
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
    )
    params = jnp.asarray(w, jnp.float32)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(5):
        gradient = random.normal(size=4)
        updates, state = update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        gradient = gradient + weight_decay * w
        velocity = momentum * velocity + gradient
        w = w - 0.1 * (1 - step / 10) * (gradient + momentum * velocity if nesterov else velocity)
        np.testing.assert_allclose(params, w, rtol=1e-5, atol=1e-6)
