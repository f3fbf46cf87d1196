"""PGD, momentum PGD, FGSM and N-FGSM: closed forms, slow references and invariances."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, balls, losses

NORMS = ["linf", "l2", "l1"]
SHAPE = (4, 3, 2, 1)
KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), SHAPE)
W = jax.random.normal(jax.random.key(2), SHAPE)
EPS_MAP = jax.random.uniform(jax.random.key(3), SHAPE[1:], minval=0.1).at[1].set(0)
MASK = jnp.array([1, 0, 0.5]).reshape(3, 1, 1)
EPS = {
    "number": (0.3, None),
    "vector and mask": (jnp.array([0.1, 0.0, 0.5, 0.2]), MASK),
    "map": (EPS_MAP, None),
}


def linear(x, w):
    return (x * w).sum((1, 2, 3))


def wavy(x, w):
    """Its gradient is 5 w cos(5 x)."""
    return (w * jnp.sin(5 * x)).sum((1, 2, 3))


def full(eps):
    """One radius per pixel, in float64."""
    eps = np.float64(eps)
    return np.broadcast_to(eps.reshape(-1, 1, 1, 1) if eps.ndim == 1 else eps, SHAPE)


def closed_form(norm, eps, w):
    """The best delta on a linear loss without a box."""
    eps, w = full(eps), np.float64(w)
    if norm == "linf":
        return eps * np.sign(w)
    u = eps * w
    if norm == "l2":
        return eps * u / np.maximum(np.sqrt((u**2).sum((1, 2, 3), keepdims=True)), 1e-30)
    best = np.abs(u) == np.abs(u).max((1, 2, 3), keepdims=True)
    return eps * np.sign(w) * best


def fill_box(x, eps, w):
    """The best delta of the l1 ball cut with the box: the steepest pixels are filled first."""
    x, eps, delta = np.float64(x), full(eps), np.zeros(SHAPE)
    for i in range(len(x)):
        left = 1.0
        for at in sorted(np.ndindex(SHAPE[1:]), key=lambda at: -abs(w[i][at] * eps[i][at])):
            at = (i, *at)
            room = 1 - x[at] if w[at] > 0 else x[at]
            delta[at] = np.sign(w[at]) * min(room, left * eps[at])
            left -= abs(delta[at]) / eps[at] if eps[at] else 0
    return delta


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_loss_pgd_equals_the_closed_form(norm, eps):
    eps, mask = EPS[eps]
    start = "none" if norm == "l2" else "uniform"
    attack = attacks.pgd(norm, eps, steps=40, bounds=None, start=start)
    x_adv = attack(linear, X, KEY, mask, (W,))
    radius = full(eps) * (1 if mask is None else np.asarray(mask))
    np.testing.assert_allclose(x_adv - X, closed_form(norm, radius, W), atol=1e-6)


def test_a_long_l2_step_forgets_the_random_start():
    attack = attacks.l2_pgd(0.3, 4, 300.0, bounds=None)
    x_adv = attack(linear, X, KEY, args=(W,))
    np.testing.assert_allclose(x_adv - X, closed_form("l2", 0.3, W), atol=1e-6)


def test_linf_pgd_and_every_fgsm_reach_the_corner_of_the_box():
    for attack in (attacks.linf_pgd(0.3), attacks.fgsm(0.3)):
        expected = np.clip(X + closed_form("linf", 0.3, W), 0, 1)
        np.testing.assert_allclose(attack(linear, X, KEY, args=(W,)), expected, atol=1e-6)
    x_adv = attacks.fgsm(0.3, "l2", bounds=None)(linear, X, args=(W,))
    np.testing.assert_allclose(x_adv - X, closed_form("l2", 0.3, W), atol=1e-6)
    x_adv = attacks.fgsm(1.2, "l1")(linear, X, args=(W,))
    np.testing.assert_allclose(x_adv - X, fill_box(X, 1.2, W), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 40])
def test_l1_pgd_spends_its_radius_best_when_the_box_binds(steps):
    x = X.at[0].set(jnp.round(X[0]))  # no room at all on one side
    for eps in (jnp.array([0.4, 1.2, 2.5, 9.0]), 2 * EPS_MAP):
        attack = attacks.l1_pgd(eps, steps, start="none")
        x_adv = attack(linear, x, args=(W,))
        np.testing.assert_allclose(x_adv - x, fill_box(x, eps, W), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_momentum_pgd_equals_numpy(norm):
    eps, step, mu, steps = 0.3, 0.06, 0.8, 6
    attack = attacks.pgd(norm, eps, steps=steps, step_size=step, momentum=mu, start="none")
    x_adv = attack(wavy, X, args=(W,))
    x, w = np.float64(X), np.float64(W)
    delta, velocity = np.zeros(SHAPE), np.zeros(SHAPE)
    length = lambda v: np.sqrt((v**2).sum((1, 2, 3), keepdims=True))  # noqa: E731
    for _ in range(steps):
        grad = 5 * w * np.cos(5 * (x + delta))
        velocity = mu * velocity + grad / np.abs(grad).mean((1, 2, 3), keepdims=True)
        if norm == "linf":
            delta = np.clip(delta + step * np.sign(velocity), -eps, eps)
        else:
            delta = delta + step * velocity / length(velocity)
            delta = delta / np.maximum(length(delta) / eps, 1)
        delta = np.clip(delta, -x, 1 - x)
    np.testing.assert_allclose(x_adv, x + delta, atol=1e-5)
    without = attacks.pgd(norm, eps, steps=steps, step_size=step, start="none")
    assert np.abs(without(wavy, X, args=(W,)) - x_adv).max() > 0.01


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_n_fgsm_equals_numpy(start):
    eps, noise, step = 0.1, 4.0, 0.2
    attack = attacks.n_fgsm(eps, noise=noise, step_size=step, start=start)
    x_adv = attack(wavy, X, KEY, MASK, (W,))
    keys = attacks.example_keys(KEY, SHAPE[0])
    x, w = np.float64(X), np.float64(W)
    if start == "uniform":
        eta = np.float64(balls.ball("linf").sample(keys, jnp.float32(eps * noise), SHAPE))
    else:
        draw = jax.vmap(lambda key: jax.random.normal(key, SHAPE[1:]))
        eta = eps * noise * np.float64(draw(keys))
    assert np.abs(eta).max() > eps
    start = x + eta * np.asarray(MASK)
    assert start.min() < 0
    assert start.max() > 1
    if attack.start == "uniform":
        start = np.clip(start, 0, 1)
    grad = 5 * w * np.cos(5 * start)
    expected = np.clip(start + step * np.sign(grad) * np.asarray(MASK), 0, 1)
    np.testing.assert_allclose(x_adv, expected, atol=1e-6)
    default = attacks.n_fgsm(eps)(wavy, X, KEY, args=(W,))
    twice = attacks.n_fgsm(eps, noise=2.0, step_size=eps)(wavy, X, KEY, args=(W,))
    np.testing.assert_array_equal(default, twice)


EVERY = {
    **{norm: attacks.pgd(norm, 0.3, steps=3) for norm in NORMS},
    "momentum": attacks.linf_pgd(0.3, 3, momentum=0.9, start="gaussian"),
    "n_fgsm": attacks.n_fgsm(0.1),
    "n_fgsm_gaussian": attacks.n_fgsm(0.1, start="gaussian"),
}


@pytest.mark.parametrize("name", EVERY)
def test_part_of_a_batch_gives_the_same_rows_and_masked_pixels_are_untouched(name):
    x = X.at[:, 1].set(-0.0)
    whole = EVERY[name](wavy, x, KEY, MASK, (W,))
    assert whole[:, 1].tobytes() == x[:, 1].tobytes()  # minus zero stays minus zero
    assert np.all((whole != x).any((1, 2, 3)))
    first = EVERY[name](wavy, x[:1], KEY, MASK, (W[:1],))
    np.testing.assert_allclose(first, whole[:1], atol=1e-6)
    keys = attacks.example_keys(KEY, 4)
    last = EVERY[name](wavy, x[3:], keys[3:], MASK, (W[3:],))
    np.testing.assert_allclose(last, whole[3:], atol=1e-6)
    assert np.abs(EVERY[name](wavy, x, keys[::-1], MASK, (W,)) - whole).max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_zero_eps_is_the_identity_and_a_flat_loss_is_no_nan(name):
    still = dataclasses.replace(EVERY[name], eps=0.0)
    assert still(wavy, X, KEY, args=(W,)).tobytes() == X.tobytes()
    flat = EVERY[name](wavy, X, KEY, args=(0 * W,))
    assert np.all((flat >= 0) & (flat <= 1))
    if not name.startswith("n_fgsm"):
        still = dataclasses.replace(EVERY[name], start="none")
        assert still(wavy, X, KEY, args=(0 * W,)).tobytes() == X.tobytes()


@pytest.mark.parametrize("norm", NORMS)
def test_all_forms_of_the_loop_agree_and_jit_equals_eager(norm):
    attack = attacks.pgd(norm, 0.3, steps=3, momentum=0.5 if norm == "linf" else None)
    form = lambda loop: dataclasses.replace(attack, loop=loop)(wavy, X, KEY, args=(W,))  # noqa: E731
    eager = attack(wavy, X, KEY, args=(W,))
    inside = jax.jit(lambda x, w: attack(wavy, x, KEY, args=(w,)))(X, W)
    results = [form("stepped"), form("fused"), inside]
    if norm == "linf":  # op by op, which compiles every op: once is enough
        results.append(form("unrolled"))
    for result in results:
        np.testing.assert_allclose(result, eager, atol=1e-6)


def counting(loss_fn):
    traces = []

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    return counted, traces


@pytest.mark.parametrize("loop", ["auto", "fused"])
def test_new_numbers_and_new_batches_cost_no_new_trace(loop):
    loss_fn, traces = counting(wavy)
    for number in (0.1, 0.2, 0, 1, np.float32(0.3), jnp.float32(0.4)):
        attack = attacks.linf_pgd(number, 2, number, momentum=number, loop=loop)
        attack(loss_fn, X + number * 0, KEY, args=(W,))
        attack(loss_fn, np.asarray(X[::-1]), jax.random.key(5), args=(2 * W,))
    assert len(traces) == 1


def test_new_numbers_cost_n_fgsm_no_new_trace_of_the_loss():
    loss_fn, traces = counting(wavy)
    for number in (0.1, 0.2, 0, np.float32(0.3)):
        attacks.n_fgsm(number, noise=number, step_size=number)(loss_fn, X, KEY, args=(W,))
    assert len(traces) == 1


def test_new_numbers_cost_no_new_trace_under_jit():
    loss_fn, traces = counting(wavy)
    run = jax.jit(lambda attack, x: attack(loss_fn, x, KEY, args=(W,)))
    for eps in (0.1, 0.2, 0.4):
        run(attacks.linf_pgd(eps, 2, eps / 2), X)
        once = len(traces) if eps == 0.1 else once
    assert len(traces) == once


@pytest.mark.parametrize("name", ["linf", "l1", "n_fgsm"])
def test_vmap_over_eps_equals_separate_calls(name):
    radii = jnp.array([0.0, 0.1, 0.4])
    attack = dataclasses.replace(EVERY[name], eps=radii)
    if name == "n_fgsm":
        attack = dataclasses.replace(attack, noise=jnp.full(3, 2.0))  # every leaf is mapped
    curve = jax.jit(jax.vmap(lambda attack: attack(wavy, X, KEY, args=(W,))))(attack)
    for eps, x_adv in zip(radii, curve, strict=True):
        single = dataclasses.replace(EVERY[name], eps=float(eps))(wavy, X, KEY, args=(W,))
        np.testing.assert_allclose(x_adv, single, atol=1e-6)


def test_attacks_are_values():
    for make in (lambda: attacks.l2_pgd(0.5, 7, momentum=0.9), lambda: attacks.n_fgsm(0.1)):
        attack, same = make(), make()
        assert attack == same
        assert attack != dataclasses.replace(attack, eps=0.25)
        assert f"eps={attack.eps}" in repr(attack)
        fields = json.loads(json.dumps(dataclasses.asdict(attack)))
        assert type(attack)(**fields | {"bounds": tuple(fields["bounds"])}) == attack
        with pytest.raises(dataclasses.FrozenInstanceError):
            attack.eps = 1.0


def test_attacks_of_arrays_compare_by_value():
    make = lambda *eps: attacks.l2_pgd(jnp.array(eps), 7)  # noqa: E731
    assert make(0.1, 0.2) == make(0.1, 0.2)
    assert make(0.1, 0.2) != make(0.1, 0.3)
    assert make(0.1, 0.2) != make(0.1)
    assert attacks.restarts(make(0.1, 0.2), 2) == attacks.restarts(make(0.1, 0.2), 2)
    assert attacks.l2_pgd(0.5) == attacks.l2_pgd(np.float32(0.5))
    assert hash(attacks.l2_pgd(0.5)) == hash(attacks.l2_pgd(np.float32(0.5)))
    assert attacks.l2_pgd(0.5) != attacks.l2_pgd(0.5, 7)
    assert attacks.l2_pgd(0.5) != "l2_pgd"


def test_no_gradient_flows_through_the_attack():
    def adversarial_loss(w, x, attack):
        return wavy(attack(wavy, x, KEY, args=(w,)), w).sum()

    for loop in ("fused", "unrolled"):
        attack = attacks.linf_pgd(0.1, 2, loop=loop)
        x_adv = attack(wavy, X, KEY, args=(W,))
        by_w, by_x = jax.jit(jax.grad(adversarial_loss, (0, 1)))(W, X, attack)
        np.testing.assert_allclose(by_w, np.sin(5 * x_adv), atol=1e-5)
        assert not np.any(by_x)


def test_an_eager_gradient_does_not_differentiate_the_attack():
    loss_fn, traces = counting(wavy)
    attack = attacks.l2_pgd(0.1, 3)
    x_adv = attack(loss_fn, X, KEY, args=(W,))
    grad = jax.grad(lambda w: wavy(attack(loss_fn, X, KEY, args=(w,)), w).sum())(W)
    np.testing.assert_allclose(grad, np.sin(5 * x_adv), atol=1e-5)
    assert len(traces) == 1  # the compiled attack is run as it is


def test_constants_inside_jit_are_accepted():
    direct = attacks.linf_pgd(np.full(4, 0.1), 2)(wavy, X, KEY, args=(W,))
    closed = jax.jit(lambda w: attacks.linf_pgd(np.full(4, 0.1), 2)(wavy, X, KEY, args=(w,)))(W)
    np.testing.assert_allclose(closed, direct, atol=1e-6)


def test_latents_have_no_bounds_and_args_are_trees():
    latents = 10 * jax.random.normal(KEY, (3, 5))
    labels = jnp.array([0, 1, 2])

    def loss_fn(z, head, labels):
        return losses.cross_entropy(z @ head["kernel"] + head["bias"], labels)

    head = {"kernel": jax.random.normal(KEY, (5, 4)), "bias": jnp.zeros(4)}
    attack = attacks.l2_pgd(2.0, 5, bounds=None)
    moved = attack(loss_fn, latents, KEY, args=(head, labels))
    np.testing.assert_allclose(balls.norms(moved - latents, "l2"), 2, rtol=1e-4)
    loss_fn = jax.jit(loss_fn)
    assert np.all(loss_fn(moved, head, labels) > loss_fn(latents, head, labels))


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_batch_stays_empty(name):
    assert EVERY[name](wavy, X[:0], KEY, args=(W[:0],)).shape == (0, *SHAPE[1:])


def test_custom_bounds_are_kept_to_the_last_bit():
    low, high = np.float32(-2.1179), np.float32(2.64)
    x = np.random.default_rng(0).uniform(low, high, (4, 30, 20, 1)).astype(np.float32)
    x_adv = attacks.fgsm(4.7, bounds=(-2.1179, 2.64))(linear, x, args=(np.sign(x),))
    assert np.all((x_adv >= low) & (x_adv <= high))
    np.testing.assert_allclose(x_adv, np.where(x > 0, high, low), atol=1e-6)


def test_l1_pgd_beats_projected_sign_steps_on_a_net():
    kernel = jax.random.normal(jax.random.key(5), (3, 3, 1, 8))
    head = jax.random.normal(jax.random.key(6), (8, 4))
    x = jax.random.uniform(jax.random.key(7), (16, 7, 5, 1))

    def logits_fn(x):
        maps = jax.lax.conv_general_dilated(
            2 * x - 1, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(maps).mean((1, 2)) @ head

    labels = jax.jit(logits_fn)(x).argmax(1)
    loss_fn = jax.jit(lambda x: losses.cross_entropy(logits_fn(x), labels))
    eps, ball = 2.0, balls.ball("l1")

    @jax.jit
    def signs(delta):
        move = jnp.sign(attacks.input_gradient(loss_fn, x + delta)) / x[0].size
        return ball.project(delta + eps / 4 * move, jnp.float32(eps), -x, 1 - x)

    delta = jnp.zeros_like(x)
    for _ in range(10):
        delta = signs(delta)
    ours, naive = loss_fn(attacks.l1_pgd(eps)(loss_fn, x, KEY)), loss_fn(x + delta)
    assert ours.mean() > naive.mean() > loss_fn(x).mean()
    assert np.mean(ours > naive - 1e-3) > 0.9
