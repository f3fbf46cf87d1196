"""Auto-PGD: the published schedule, agreement with the reference, closed forms, invariances."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, balls, losses
from jaxrobust.attacks import apgd_step, classifier, scheduler
from tests.conftest import EMITTERS

GOLDENS = dict(np.load(pathlib.Path(__file__).parent / "goldens" / "autoattack.npz"))
NORMS = ("linf", "l2", "l1")
X, LABELS, TARGETS = (jnp.asarray(GOLDENS[name]) for name in ("x", "labels", "targets"))
STEPS, BATCH = int(GOLDENS["steps"]), len(LABELS)
KEY = jax.random.key(0)


def logits_fn(x):
    hidden = jnp.tanh(2 * (x.reshape(x.shape[0], -1) - 0.5) @ GOLDENS["first"])
    return hidden @ GOLDENS["second"]


def test_checkpoints_of_a_hundred_steps_are_the_published_ones():
    gaps = apgd_step.table("linf", 100, False).gap
    assert np.flatnonzero(gaps).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert gaps[[22, 41, 99]].tolist() == [22, 19, 6]


def test_the_l1_schedule_has_three_shrinking_balls():
    plan = apgd_step.table("l1", 100, True)
    assert np.flatnonzero(plan.first).tolist() == [0, 31, 62]
    assert np.flatnonzero(plan.last).tolist() == [30, 61, 102]
    assert plan.radius[[0, 31, 62]].tolist() == [3, 2, 1]
    assert plan.counts.sum() == 41  # only what is found inside eps counts


def start(norm, noise, eps):
    """The reference's start from its own draw."""
    low, high = -X, 1 - X
    if norm == "l1":
        return balls.ball("l1").project(noise, eps, low, high)
    size = balls.norms(noise, norm).reshape(-1, 1, 1, 1)
    return jnp.clip(eps * noise / (size + 1e-12), low, high)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted_dlr"])
def test_runs_from_the_same_start_agree_with_the_reference(norm, loss):
    eps = jnp.full((BATCH, 1, 1, 1), GOLDENS[f"eps_{norm}"].item())
    make = {"ce": attacks.apgd_ce, "dlr": attacks.apgd_dlr, "targeted_dlr": attacks.apgd_t}[loss]
    search = make(norm, 1.0, steps=STEPS, large_radii=False).search(5)
    rows = scheduler.Rows(X, LABELS, TARGETS, eps, jax.random.split(KEY, BATCH), None)

    @functools.partial(jax.jit, compiler_options=EMITTERS | {"xla_backend_optimization_level": 3})
    def run(noise):
        state = search.begin(rows)._replace(delta=start(norm, noise, eps))
        state = state._replace(before=state.delta)
        step = lambda _, state: search.advance(logits_fn, state, rows, ())  # noqa: E731
        return jax.lax.fori_loop(0, search.evaluations, step, state)

    state = run(jnp.asarray(GOLDENS["noise"]))
    name = f"apgd_{loss}_{norm}"
    fooled = GOLDENS[f"{name}_fooled"]
    assert 0.2 < fooled.mean() < 0.8
    np.testing.assert_array_equal(state.fooled, fooled)
    # A search that has broken its example stops; the losses of the others are comparable. Rounding
    # may decide a checkpoint (rises against rho * gap), from where on two runs part.
    held = ~fooled
    ours, theirs = np.asarray(state.best_loss)[held], GOLDENS[f"{name}_loss"][held]
    assert np.isclose(ours, theirs, atol=1e-4).mean() > 0.85
    np.testing.assert_allclose(ours.mean(), theirs.mean(), atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_loss_it_reaches_the_optimum(norm):
    weight = jnp.asarray(GOLDENS["noise"][0])
    inside = 0.4 + 0.2 * X  # the box stays out of reach
    loss_fn = lambda x: (x * weight).sum((1, 2, 3))  # noqa: E731
    x_adv = attacks.apgd(norm, 0.1, steps=60)(loss_fn, inside, KEY)
    dual = {
        "linf": jnp.abs(weight).sum(),
        "l2": jnp.sqrt(jnp.square(weight).sum()),
        "l1": jnp.abs(weight).max(),
    }[norm]
    # The sparse l1 steps shorten themselves before the last of the budget is on the best pixel.
    tolerance = 0.1 if norm == "l1" else 1e-4
    gain = loss_fn(x_adv) - loss_fn(inside)
    np.testing.assert_allclose(gain, 0.1 * dual, rtol=tolerance)
    assert (gain <= 0.1 * dual + 1e-5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_results_are_inside_ball_and_box_and_misclassified_or_untouched(norm):
    eps = 1.5 * GOLDENS[f"eps_{norm}"].item()
    x_adv = attacks.apgd_t(norm, eps, targets=3, steps=20)(logits_fn, X, LABELS, KEY)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert balls.norms(x_adv - X, norm).max() <= eps * (1 + 1e-5)
    wrong = np.asarray(logits_fn(x_adv).argmax(1) != LABELS)
    moved = np.asarray((x_adv != X).any((1, 2, 3)))
    np.testing.assert_array_equal(wrong, moved)
    assert 0 < wrong.sum() < BATCH


def test_zero_eps_is_identity():
    for norm in NORMS:
        np.testing.assert_array_equal(
            attacks.apgd_ce(norm, 0.0, steps=5)(logits_fn, X, LABELS, KEY), X
        )
        ce = lambda x: losses.cross_entropy(logits_fn(x), LABELS)  # noqa: E731
        np.testing.assert_array_equal(attacks.apgd(norm, 0.0, steps=5)(ce, X, KEY), X)


@pytest.mark.parametrize("norm", NORMS)
def test_masked_pixels_are_bit_identical(norm):
    mask = jnp.zeros((5, 4, 1)).at[::2].set(1)
    x_adv = attacks.apgd_ce(norm, 1.0, steps=10)(logits_fn, X, LABELS, KEY, mask=mask)
    np.testing.assert_array_equal(x_adv[:, 1::2], X[:, 1::2])
    assert (x_adv != X).any()


def test_half_a_batch_gives_the_same_rows_and_so_does_jit():
    attack = attacks.apgd_t("linf", 0.03, targets=2, steps=20)
    keys = attacks.example_keys(KEY, BATCH)
    whole = np.asarray(attack(logits_fn, X, LABELS, keys))
    half = attack(logits_fn, X[::2], LABELS[::2], keys[::2])
    np.testing.assert_allclose(whole[::2], half, atol=1e-6)
    traced = jax.jit(functools.partial(attack, logits_fn))(X, LABELS, keys)
    np.testing.assert_allclose(whole, traced, atol=1e-6)


def test_a_new_radius_compiles_nothing_new():
    traces = []

    def counted(x):
        traces.append(x.shape)
        return logits_fn(x)

    for eps in (0.01, 0.02, 0.03):
        attacks.apgd_ce("linf", eps, steps=5)(counted, X, LABELS, KEY)
        first = len(traces) if eps == 0.01 else first
    assert len(traces) == first


def test_it_beats_pgd_at_equal_gradients():
    ce = lambda x: losses.cross_entropy(logits_fn(x), LABELS)  # noqa: E731
    ours = ce(attacks.apgd("linf", 0.02, steps=39)(ce, X, KEY)).mean()
    pgd = ce(attacks.linf_pgd(0.02, 40, 0.005)(ce, X, KEY)).mean()
    assert ours > pgd - 1e-3


def test_two_and_three_classes_have_a_loss_of_their_own():
    logits = jax.random.normal(KEY, (6, 3))
    labels, targets = jnp.asarray([0, 1, 2, 0, 1, 2]), jnp.asarray([1, 2, 0, 2, 0, 1])
    two = classifier.loss_for("targeted_dlr", 2)(logits[:, :2], labels % 2, 1 - labels % 2)
    np.testing.assert_allclose(two, losses.margin(logits[:, :2], labels % 2))
    three = classifier.loss_for("targeted_dlr", 3)(logits, labels, targets)
    rows = jnp.arange(6)
    expected = (logits[rows, targets] - logits[rows, labels]) / (logits.max(1) - logits.min(1))
    np.testing.assert_allclose(three, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps must be >= 0, got -0.1"),
        ({"norm": "l3"}, "norm must be one of"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"rho": 0}, r"rho must lie in \(0, 1\), got 0"),
        ({"large_radii": True}, "large_radii needs l1"),
        ({"loop": "long"}, "loop must be one of"),
        ({"bounds": (1.0, 0.0)}, "bounds must be"),
    ],
)
def test_bad_settings_are_named(change, message):
    setting = {"norm": "linf", "eps": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        attacks.apgd(setting.pop("norm"), setting.pop("eps"), **setting)


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match="targets must be a whole number >= 1, got 0"):
        attacks.apgd_t("linf", 0.1, targets=0)
    with pytest.raises(ValueError, match="restarts must be a whole number >= 1, got 0"):
        attacks.apgd_ce("linf", 0.1, restarts=0)
    with pytest.raises(ValueError, match="draws must be a whole number >= 0, got -1"):
        attacks.apgd_ce("linf", 0.1, draws=-1)


def test_a_random_classifier_is_attacked_through_the_mean_of_its_draws():
    """Each draw flips the gradient of half the pixels; their mean is the true gradient."""

    def noisy(x, keys):
        flip = jax.vmap(lambda k: jax.random.bernoulli(k, 0.45, (BATCH,)))(keys)[:, 0]
        return jnp.where(flip[:, None], -1, 1) * logits_fn(x)

    few, many = (attacks.apgd_ce("linf", 0.03, steps=10, draws=n) for n in (1, 15))
    rows = scheduler.Rows(
        X, LABELS, TARGETS, jnp.ones((BATCH, 1, 1, 1)), jax.random.split(KEY, BATCH), None
    )
    exact = classifier.evaluate(logits_fn, few.search(5).loss, X, rows, ())[2]

    def agreement(attack):
        loss = lambda z, y, t: jnp.take_along_axis(z, y[:, None], 1)[:, 0]  # noqa: E731
        grad = classifier.evaluate(noisy, loss, X, rows, (), attack.draws)[2]
        true = classifier.evaluate(logits_fn, loss, X, rows, ())[2]
        return float((jnp.sign(grad) == jnp.sign(true)).mean())

    assert np.isfinite(exact).all()
    assert agreement(many) > agreement(few)


def test_an_empty_batch_comes_back_and_so_does_a_misclassified_one():
    for attack in (attacks.apgd_t("linf", 0.1), attacks.fab("l2"), attacks.square("linf", 0.1)):
        assert attack(logits_fn, X[:0], LABELS[:0], KEY).shape == (0, 5, 4, 2)
        wrong = (LABELS[:3] + 1) % 5
        np.testing.assert_array_equal(attack(logits_fn, X[:3], wrong, KEY), X[:3])


@pytest.mark.parametrize("draws", [0, 4])
def test_a_random_classifier_is_asked_anew_in_every_iteration(monkeypatch, draws):
    """Else a hundred steps would climb the same few draws."""
    search = attacks.apgd_ce("linf", 0.03, steps=10, draws=draws).search(5)
    rows = scheduler.Rows(
        X, LABELS, TARGETS, jnp.ones((BATCH, 1, 1, 1)), jax.random.split(KEY, BATCH), None
    )
    asked, original = [], classifier.evaluate

    def evaluate(logits_fn, loss, x, rows, args, draws):
        asked.append(np.asarray(jax.random.key_data(rows.keys)))
        return original(logits_fn, loss, x, rows, args)

    monkeypatch.setattr(classifier, "evaluate", evaluate)
    state = search.begin(rows)
    for _ in range(2):
        state = search.advance(logits_fn, state, rows, ())
    assert (asked[0] == asked[1]).all() == (not draws)
