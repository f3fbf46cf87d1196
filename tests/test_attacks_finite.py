"""Attacks on models whose gradient or answer is no number somewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, balls, losses

BATCH, IMAGE, CLASSES = 8, (4, 3, 1), 4
KEY = jax.random.key(0)
WEIGHTS = jax.random.normal(jax.random.key(2), (*IMAGE, CLASSES))
# A third of the pixels are black.
X = jax.random.uniform(jax.random.key(1), (BATCH, *IMAGE), minval=-0.4, maxval=0.8).clip(0)
KEYS = attacks.example_keys(KEY, BATCH)
LINF, L2, L1 = 0.2, 0.6, 2.0

GRADIENT = {
    "linf": ("linf", LINF, attacks.linf_pgd(LINF, 4)),
    "linf_from_x": ("linf", LINF, attacks.linf_pgd(LINF, 4, start="none")),
    "momentum": ("l2", L2, attacks.l2_pgd(L2, 4, momentum=0.9)),
    "l2": ("l2", L2, attacks.l2_pgd(L2, 4, start="none")),
    "l1": ("l1", L1, attacks.l1_pgd(L1, 4, start="none")),
    "fgsm": ("linf", LINF, attacks.fgsm(LINF)),
    "n_fgsm": ("linf", 3 * LINF, attacks.n_fgsm(LINF)),
    "apgd_linf": ("linf", LINF, attacks.apgd("linf", LINF, steps=5)),
    "apgd_l1": ("l1", L1, attacks.apgd("l1", L1, steps=5)),
    "restarts": ("linf", LINF, attacks.restarts(attacks.linf_pgd(LINF, 2), 2)),
}
CLASSIFIER = {
    "apgd_ce": ("linf", LINF, attacks.apgd_ce("linf", LINF, steps=5)),
    "apgd_t": ("l2", L2, attacks.apgd_t("l2", L2, steps=5, targets=2)),
    "fab": ("linf", LINF, attacks.fab("linf", LINF, steps=5)),
    "fab_t": ("l2", L2, attacks.fab_t("l2", L2, steps=5, targets=1)),
    "square": ("linf", LINF, attacks.square("linf", LINF, queries=100)),
    "patch": ("linf", 1.0, attacks.patch(2, steps=5, places=1)),
    "spatial": ("linf", 1.0, attacks.spatial(grid=(3, 3, 1))),
    "multi_targeted": ("linf", LINF, attacks.multi_targeted(attacks.linf_pgd(LINF, 2), 2)),
    "transfer": (
        "linf",
        LINF,
        attacks.transfer(attacks.linf_pgd(LINF, 2), lambda x: rooted(x, WEIGHTS)),
    ),
    "ddn": ("linf", 1.0, attacks.ddn(30)),
    "fmn_linf": ("linf", 1.0, attacks.fmn("linf", 30)),
    "fmn_l2": ("linf", 1.0, attacks.fmn("l2", 30)),
    "fmn_l1": ("linf", 1.0, attacks.fmn("l1", 30)),
    "fmn_l0": ("linf", 1.0, attacks.fmn("l0", 30)),
    "deepfool_l2": ("linf", 1.0, attacks.deepfool("l2", 20)),
    "deepfool_linf": ("linf", 1.0, attacks.deepfool("linf", 20)),
    "cw": ("linf", 1.0, attacks.cw_l2(5, 60, step_size=0.05)),
    "hop_skip_jump": ("linf", 1.0, attacks.hop_skip_jump("l2", 2, evaluations=20)),
}


def rooted(x, weights):
    """The root's slope at 0 is infinite, and after a square of slope 0 it is NaN."""
    x = x.at[:, :2].set(jnp.sqrt(jnp.square(x[:, :2]))).at[:, 2:].set(jnp.sqrt(x[:, 2:]))
    return jnp.einsum("bhwc,hwck->bk", x, weights)


def silent(x, weights):
    """No answer, and no gradient, for images whose first pixel is bright."""
    z = jnp.einsum("bhwc,hwck->bk", jnp.sin(3 * x), weights)
    return z + jnp.where(x[:, :1, 0, 0] > 0.7, jnp.nan, 0)


def run(name, function, x, labels, keys):
    if name in CLASSIFIER:
        surrogate_args = () if name == "transfer" else (WEIGHTS,)
        function = (lambda x: rooted(x, WEIGHTS)) if name == "transfer" else function
        return CLASSIFIER[name][2](function, x, labels, keys, args=surrogate_args)

    def loss_fn(x, weights, labels):
        return losses.cross_entropy(function(x, weights), labels)

    return GRADIENT[name][2](loss_fn, x, keys, args=(WEIGHTS, labels))


def assert_inside(name, x, x_adv):
    norm, eps, _ = {**GRADIENT, **CLASSIFIER}[name]
    assert np.isfinite(x_adv).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert balls.norms(x_adv - x, norm).max() <= eps * (1 + 1e-5)


@pytest.mark.parametrize("name", [*GRADIENT, *CLASSIFIER])
def test_pixels_whose_gradient_is_no_number_stop_no_attack(name):
    labels = np.asarray(rooted(X, WEIGHTS).argmax(1))
    grad = attacks.input_gradient(lambda x: rooted(x, WEIGHTS)[:, 0], X)
    assert 0.2 < np.mean(~np.isfinite(grad)) < 0.5
    x_adv = run(name, rooted, X, labels, KEYS)
    assert_inside(name, X, x_adv)
    assert np.mean(rooted(x_adv, WEIGHTS).argmax(1) != labels) >= 0.25


@pytest.mark.parametrize("name", [name for name in (*GRADIENT, *CLASSIFIER) if name != "transfer"])
def test_a_row_without_an_answer_stays_in_ball_and_box_and_touches_no_other(name):
    x = X.at[:, 0, 0, 0].set(0.3).at[2, 0, 0, 0].set(0.9).at[5, 0, 0, 0].set(0.69)
    labels = np.asarray(silent(x, WEIGHTS).argmax(1))
    whole = run(name, silent, x, labels, KEYS)
    assert_inside(name, x, whole)
    rest = np.delete(np.arange(BATCH), 2)
    alone = run(name, silent, x[rest], labels[rest], KEYS[rest])
    np.testing.assert_allclose(whole[rest], alone, atol=1e-5)
    assert np.any(whole[rest] != x[rest])


@pytest.mark.parametrize("name", ["square", "spatial", "fab", "fab_t", "apgd_ce"])
def test_no_answer_is_a_wrong_one(name):
    def gives_up(x):
        """No answer off the middle, which argmax takes for class 0; a slope that leads there."""
        z = jnp.stack([jnp.ones(len(x)), x.sum((1, 2, 3)) / 2 - 2.5], 1)
        return jnp.where((x == 0.5).all((1, 2, 3))[:, None], z, jnp.nan)

    x, labels = jnp.full((4, 3, 3, 1), 0.5), jnp.zeros(4, int)
    attack = CLASSIFIER[name][2]
    x_adv = attack(gives_up, x, labels, KEY)
    assert np.isfinite(x_adv).all()
    assert np.all((x_adv != x).any((1, 2, 3)))


def test_a_start_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"delta must lie in .*: some are NaN"):
        attacks.linf_pgd(0.1)(lambda x: x.sum((1, 2, 3)), X, delta=jnp.full_like(X, jnp.nan))


def test_auto_pgd_leaves_a_start_without_a_loss():
    def holed(x):
        """No number where some starts lie; its slope leads out of there."""
        return x[:, 1] - x[:, 0] + jnp.where(x[:, 0] < 0.5, 0, jnp.nan)

    x = jnp.full((4, 2), 0.45)
    x_adv = attacks.apgd("linf", 0.2, steps=10)(holed, x, KEYS[:4])
    assert np.isfinite(x_adv).all()
    best = holed(x_adv)
    assert np.isfinite(best).all()
    assert (best > holed(x)).all()


def test_a_run_without_a_score_is_never_the_worst():
    score = lambda x: jnp.where(x[:, 0] > 0.6, jnp.nan, x[:, 1])  # noqa: E731
    moves = [jnp.array([0.7, 0.9]), jnp.array([0.5, 0.6]), jnp.array([0.7, 0.8])]
    given = [lambda loss_fn, x, key, mask, args, move=move: 0 * x + move for move in moves]
    x_adv = attacks.worst_of(*given)(score, jnp.full((3, 2), 0.5), KEY)
    np.testing.assert_allclose(x_adv, np.tile([0.5, 0.6], (3, 1)))
