"""Attacks made of attacks: restarts, worst of several, targeted and multi-targeted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, losses

BATCH, IMAGE, CLASSES = 16, (3, 2, 1), 5
KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (BATCH, *IMAGE))
WEIGHTS = jax.random.normal(jax.random.key(2), (*IMAGE, CLASSES))


@jax.jit
def logits_fn(x):
    return jnp.einsum("bhwc,hwck->bk", jnp.sin(6 * x), WEIGHTS)


@jax.jit
def loss_fn(x, labels):
    return losses.cross_entropy(logits_fn(x), labels)


@jax.jit
def margin_fn(x, labels):
    return losses.margin(logits_fn(x), labels)


LABELS = logits_fn(X).argmax(1)
TARGETS = (LABELS + 1 + jnp.arange(BATCH) % (CLASSES - 1)) % CLASSES
WEAK = attacks.linf_pgd(0.15, 2, 0.02)  # short steps: where it starts decides where it ends


def runs_of(attack_list, labels):
    """What the combinators run: attack i with the i-th keys folded from each example's own."""
    keys = attacks.example_keys(KEY, BATCH)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    return [a(loss_fn, X, fold(keys, i), args=(labels,)) for i, a in enumerate(attack_list)]


def assert_worst(x_adv, singles, score, labels):
    scores = np.stack([score(single, labels) for single in singles])
    np.testing.assert_allclose(score(x_adv, labels), scores.max(0), atol=1e-6)
    assert len(set(scores.argmax(0))) > 1  # no single run was best everywhere
    rows = np.stack(singles)[scores.argmax(0), np.arange(BATCH)]
    np.testing.assert_allclose(x_adv, rows, atol=1e-6)


@pytest.mark.parametrize("select", [None, margin_fn])
def test_restarts_keep_the_best_run_of_each_example(select):
    x_adv = attacks.restarts(WEAK, 3, select=select)(loss_fn, X, KEY, args=(LABELS,))
    assert_worst(x_adv, runs_of([WEAK] * 3, LABELS), select or loss_fn, LABELS)


def test_worst_of_keeps_the_best_attack_of_each_example():
    pair = (WEAK, attacks.l2_pgd(0.2, 2))
    x_adv = attacks.worst_of(*pair)(loss_fn, X, KEY, args=(LABELS,))
    assert_worst(x_adv, runs_of(pair, LABELS), loss_fn, LABELS)


def test_combinators_nest():
    attack = attacks.worst_of(WEAK, attacks.restarts(attacks.fgsm(0.15), 2), select=margin_fn)
    x_adv = attack(loss_fn, X, KEY, args=(LABELS,))
    first = runs_of([WEAK], LABELS)[0]
    assert np.all(margin_fn(x_adv, LABELS) >= margin_fn(first, LABELS) - 1e-6)
    assert np.abs(x_adv - X).max() <= 0.15 + 1e-6


def test_targeted_reaches_its_target_more_often_than_untargeted_does():
    strong = attacks.linf_pgd(0.2, 10)
    driven = attacks.targeted(strong)(logits_fn, X, TARGETS, KEY)
    free = strong(loss_fn, X, KEY, args=(LABELS,))
    hit = lambda x: np.mean(logits_fn(x).argmax(1) == TARGETS)  # noqa: E731
    assert hit(driven) > hit(free) + 0.2
    toward = lambda x: -loss_fn(x, TARGETS)  # noqa: E731
    assert np.all(toward(driven) > toward(X))


def test_targeted_fgsm_descends_the_cross_entropy_of_the_target():
    x_adv = attacks.targeted(attacks.fgsm(0.01))(logits_fn, X, TARGETS, KEY)
    grad = jax.grad(lambda x: loss_fn(x, TARGETS).sum())(X)
    np.testing.assert_allclose(x_adv, np.clip(X - 0.01 * np.sign(grad), 0, 1), atol=1e-6)


def test_multi_targeted_keeps_the_largest_margin_over_the_likeliest_classes():
    single = attacks.fgsm(0.1)
    order = np.argsort(-np.asarray(logits_fn(X).at[np.arange(BATCH), LABELS].set(-np.inf)), 1)

    def towards(x, labels, targets):
        rows = jnp.arange(len(x))
        return logits_fn(x)[rows, targets] - logits_fn(x)[rows, labels]

    singles = [single(towards, X, args=(LABELS, order[:, i])) for i in range(CLASSES - 1)]
    for targets in (2, 9):  # nine are more than there are
        x_adv = attacks.multi_targeted(single, targets)(logits_fn, X, LABELS, KEY)
        assert_worst(x_adv, singles[:targets], margin_fn, LABELS)


def test_two_classes_have_one_target():
    two = lambda x: logits_fn(x)[:, :2]  # noqa: E731
    labels = two(X).argmax(1)
    x_adv = attacks.multi_targeted(attacks.fgsm(0.1))(two, X, labels, KEY)
    targeted = attacks.targeted(attacks.fgsm(0.1))(two, X, 1 - labels, KEY)
    np.testing.assert_allclose(x_adv, targeted, atol=1e-6)


COMBINED = {
    "restarts": attacks.restarts(attacks.linf_pgd(0.1, 1), 2),
    "targeted": attacks.targeted(attacks.linf_pgd(0.1, 1)),
    "multi_targeted": attacks.multi_targeted(attacks.linf_pgd(0.1, 1), 2),
}


def call(name, x, labels, key, mask=None):
    """One way to call attacks on a loss and attacks on logits."""
    if "targeted" in name:
        return COMBINED[name](logits_fn, x, labels, key, mask)
    return COMBINED[name](loss_fn, x, key, mask, (labels,))


@pytest.mark.parametrize("name", COMBINED)
def test_part_of_a_batch_gives_the_same_rows_and_jit_the_same_result(name):
    mask = jnp.array([1, 0, 1.0]).reshape(3, 1, 1)
    x = X.at[:, 1].set(-0.0)
    whole = call(name, x, LABELS, KEY, mask)
    assert whole[:, 1].tobytes() == x[:, 1].tobytes()
    keys = attacks.example_keys(KEY, BATCH)
    part = call(name, x[5:8], LABELS[5:8], keys[5:8], mask)
    np.testing.assert_allclose(part, whole[5:8], atol=1e-6)
    jitted = jax.jit(
        lambda x, labels: call(name, x, labels, KEY, mask),
        compiler_options={"xla_backend_optimization_level": 0},  # quick to compile: it runs once
    )
    np.testing.assert_allclose(jitted(x, LABELS), whole, atol=1e-6)


def test_an_empty_batch_stays_empty():
    assert call("multi_targeted", X[:0], LABELS[:0], KEY).shape == (0, *IMAGE)
    assert call("restarts", X[:0], LABELS[:0], KEY).shape == (0, *IMAGE)


@pytest.mark.parametrize("name", COMBINED)
def test_further_batches_and_radii_cost_no_new_trace(name):
    traces = []

    def function(x, *labels):
        traces.append(1)
        return loss_fn(x, *labels) if labels else logits_fn(x)

    for i, eps in enumerate((0.1, 0.2, 0.3)):
        attack = COMBINED[name]
        attack = dataclasses.replace(attack, attack=dataclasses.replace(attack.attack, eps=eps))
        if "targeted" in name:
            attack(function, X[::-1], LABELS, jax.random.key(i))
        else:
            attack(function, X[::-1], jax.random.key(i), args=(LABELS,))
        first = len(traces) if i == 0 else first
    assert len(traces) == first


def test_combinators_are_values():
    for make in (
        lambda: attacks.restarts(WEAK, 3),
        lambda: attacks.worst_of(WEAK, attacks.fgsm(0.1)),
        lambda: attacks.targeted(WEAK),
        lambda: attacks.multi_targeted(WEAK, 4),
    ):
        assert make() == make()
        assert "PGD(eps=0.15" in repr(make())
        assert "linf" in json.dumps(dataclasses.asdict(make()))
