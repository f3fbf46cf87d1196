"""Minimum-norm attacks: closed forms on linear nets, other libraries' norms, small worlds."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks
from jaxrobust.attacks import nearest

BATCH, IMAGE = 8, (3, 2, 2)
DIM = int(np.prod(IMAGE))
KEY = jax.random.key(0)
X = 0.5 + 0.1 * jax.random.normal(KEY, (BATCH, *IMAGE))
WEIGHTS = jax.random.normal(jax.random.key(1), (DIM, 5)) / DIM

ATTACKS = {
    "ddn": attacks.ddn(80),
    "fmn_linf": attacks.fmn("linf", 80),
    "fmn_l2": attacks.fmn("l2", 80),
    "fmn_l1": attacks.fmn("l1", 80),
    "fmn_l0": attacks.fmn("l0", 80),
    "cw": attacks.cw_l2(5, 80),
    "deepfool_linf": attacks.deepfool("linf"),
    "deepfool_l2": attacks.deepfool("l2"),
}
# Relative excess over the minimum: what the last steps of a search leave, and DeepFool's overshoot.
EXCESS = {"fmn_l1": 0.01, "deepfool_linf": 0.04, "deepfool_l2": 0.04}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


def norm_of(name):
    return "l2" if name in ("ddn", "cw") else name.split("_")[1]


def logits_fn(x, weights, scale=1.0):
    return scale * (x.reshape(len(x), -1) - 0.5) @ weights


def curved_fn(x, weights, scale=1.0):
    return scale * jnp.sin(3 * (x.reshape(len(x), -1) - 0.5)) @ weights


def predicted(function, x, *args):
    return np.array(function(x, *args).argmax(1))


def sizes(x_adv, x, norm):
    return np.asarray(nearest.norms(x_adv - x, norm))


def boundaries(x, weights, norm):
    """Labels, and each example's distance to every class by hand: |margin| / dual norm."""
    flat, weights = np.asarray(x, np.float64).reshape(len(x), -1) - 0.5, np.asarray(weights)
    logits = flat @ weights
    labels = logits.argmax(1)
    gaps = logits.max(1, keepdims=True) - logits
    normals = weights[:, labels, None] - weights[:, None]  # [d, b, classes]
    slopes = np.linalg.norm(normals, ord=DUAL[norm], axis=0)
    return labels, np.where(slopes > 0, gaps / np.where(slopes > 0, slopes, 1), np.inf)


def far_from_faces(weights):
    """Images whose nearest boundary in l1 is 0.25 away: none lies behind a face of the box."""
    x = 0.5 + 0.1 * np.random.default_rng(0).normal(size=(64, *IMAGE))
    distance = boundaries(x, weights, "l1")[1].min(1)
    chosen = np.argsort(-distance)[:BATCH]
    x = 0.5 + (x[chosen] - 0.5) * (0.25 / distance[chosen]).reshape(-1, 1, 1, 1)
    assert x.min() > 0
    assert x.max() < 1
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "fmn_l0"])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_nearest_boundary_of_a_linear_classifier_is_just_crossed(name, classes):
    weights = WEIGHTS[:, :classes]
    x = far_from_faces(weights)
    norm = norm_of(name)
    labels, distances = boundaries(x, weights, norm)
    x_adv = ATTACKS[name](logits_fn, x, labels, args=(weights,))
    assert np.all(predicted(logits_fn, x_adv, weights) != labels)
    excess = sizes(x_adv, x, norm) / distances.min(1) - 1
    assert np.all(excess > -1e-3)  # rounding of x_adv - x
    # Among several classes a local search may settle on the second nearest.
    worst = np.max if classes == 2 else np.median
    # DDN's cross entropy pulls towards all other classes at once.
    allowed = 0.1 if name == "ddn" and classes > 2 else EXCESS.get(name, 0.005)
    assert worst(excess) < allowed


def test_fmn_l0_changes_no_more_pixels_than_a_greedy_search():
    weights, x = WEIGHTS[:, :2], X
    labels = predicted(logits_fn, x, weights)
    x_adv = ATTACKS["fmn_l0"](logits_fn, x, labels, args=(weights,))
    sign = np.where(labels == 0, -1, 1)[:, None]
    slope = sign * np.asarray(weights[:, 0] - weights[:, 1])
    flat = np.asarray(x).reshape(BATCH, -1)
    gain = np.sort(slope * (np.where(slope > 0, 1, 0) - flat), 1)[:, ::-1]  # best pixel first
    logits = np.asarray(logits_fn(x, weights))
    least = (np.cumsum(gain, 1) < np.abs(logits[:, :1] - logits[:, 1:])).sum(1) + 1
    assert np.all(predicted(logits_fn, x_adv, weights) != labels)
    assert np.all(sizes(x_adv, x, "l0") >= least)
    assert np.mean(sizes(x_adv, x, "l0") == least) >= 0.75


@pytest.mark.parametrize("name", ATTACKS)
def test_results_stay_in_the_box_where_it_binds_and_rows_stand_alone(name):
    x = X.at[:4].set(jnp.round(X[:4])).at[0].set(0.0)
    labels = predicted(curved_fn, x, WEIGHTS)
    labels[1] = (labels[1] + 1) % 5  # misclassified from the start
    mask = jnp.ones(IMAGE).at[0].set(0)
    call = lambda rows: ATTACKS[name](curved_fn, x[rows], labels[rows], mask=mask, args=(WEIGHTS,))  # noqa: E731
    x_adv = call(slice(None))
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert x_adv[1].tobytes() == x[1].tobytes()
    assert x_adv[:, 0].tobytes() == x[:, 0].tobytes()
    changed = np.asarray((x_adv != x).any((1, 2, 3)))
    assert changed[2:].mean() > 0.5
    assert np.all((predicted(curved_fn, x_adv, WEIGHTS) != labels)[changed])
    turned = np.arange(BATCH)[::-1]
    np.testing.assert_allclose(call(turned), x_adv[turned], atol=1e-6)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_scale_of_the_logits_does_not_matter(name):
    labels = predicted(curved_fn, X, WEIGHTS)
    median = {}
    for scale in (1e-4, 1.0, 1e4):
        x_adv = ATTACKS[name](curved_fn, X, labels, args=(WEIGHTS, scale))
        assert np.all(predicted(curved_fn, x_adv, WEIGHTS, scale) != labels)
        median[scale] = np.median(sizes(x_adv, X, norm_of(name)))
    # DDN's softmax is as sharp as its tempering lets it be.
    rtol = 0.05 if name == "ddn" else 0.02
    np.testing.assert_allclose(list(median.values()), median[1.0], rtol=rtol)


@pytest.mark.parametrize("name", ATTACKS)
def test_targets_are_reached(name):
    labels = predicted(logits_fn, X, WEIGHTS)
    targets = (labels + 1 + np.arange(BATCH) % 4) % 5
    x_adv = ATTACKS[name](logits_fn, X, labels, args=(WEIGHTS,), targets=targets)
    hit = predicted(logits_fn, x_adv, WEIGHTS) == targets
    same = np.asarray((x_adv == X).all((1, 2, 3)))
    assert np.all(hit | same)
    assert hit.mean() >= 0.75


def test_nothing_found_is_x_itself():
    constant = lambda x, weights: jnp.zeros((len(x), 3)) + jnp.array([1.0, 0, 0]) + 0 * x.sum()  # noqa: E731
    nan = lambda x, weights: logits_fn(x, weights) + jnp.nan  # noqa: E731
    x = X.at[0].set(-0.0)
    for function in (constant, nan):
        x_adv = ATTACKS["ddn"](function, x, np.zeros(BATCH, int), args=(WEIGHTS,))
        assert x_adv.tobytes() == x.tobytes()


def test_batches_of_none_and_one():
    labels = predicted(logits_fn, X, WEIGHTS)
    for name, attack in ATTACKS.items():
        assert attack(logits_fn, X[:0], labels[:0], args=(WEIGHTS,)).shape == (0, *IMAGE), name
    one = ATTACKS["fmn_l2"](logits_fn, X[:1], labels[:1], args=(WEIGHTS,))
    assert predicted(logits_fn, one, WEIGHTS) != labels[:1]
    whole = ATTACKS["fmn_l2"](logits_fn, X, labels, args=(WEIGHTS,))
    np.testing.assert_allclose(one, whole[:1], atol=1e-4)  # sums of other shapes round otherwise


def test_a_thousand_classes():
    weights = jax.random.normal(KEY, (DIM, 1000))
    labels = predicted(logits_fn, X, weights)
    for name in ("ddn", "fmn_linf", "deepfool_l2"):
        x_adv = ATTACKS[name](logits_fn, X, labels, args=(weights,))
        assert np.all(predicted(logits_fn, x_adv, weights) != labels), name


def test_other_bounds_are_other_units():
    labels = predicted(logits_fn, X, WEIGHTS)
    wide = lambda x, weights: logits_fn(x / 4 + 0.5, weights)  # noqa: E731
    for name in ("ddn", "fmn_l2", "cw", "deepfool_l2"):
        x_adv = ATTACKS[name](logits_fn, X, labels, args=(WEIGHTS,))
        attack = dataclasses.replace(ATTACKS[name], bounds=(-2.0, 2.0))
        x_wide = attack(wide, 4 * X - 2, labels, args=(WEIGHTS,))
        ratio = sizes(x_wide, 4 * X - 2, "l2") / sizes(x_adv, X, "l2")
        np.testing.assert_allclose(np.median(ratio), 4, rtol=0.01)


def test_half_precision_results_hold():
    x = X.astype(jnp.bfloat16)
    labels = predicted(logits_fn, x, WEIGHTS.astype(jnp.bfloat16))
    x_adv = ATTACKS["ddn"](logits_fn, x, labels, args=(WEIGHTS.astype(jnp.bfloat16),))
    assert x_adv.dtype == jnp.bfloat16
    changed = np.asarray((x_adv != x).any((1, 2, 3)))
    assert changed.any()
    assert np.all((predicted(logits_fn, x_adv, WEIGHTS.astype(jnp.bfloat16)) != labels)[changed])


def test_ddn_with_levels_returns_values_that_a_file_can_hold():
    x = jnp.round(255 * far_from_faces(WEIGHTS)) / 255
    labels = predicted(logits_fn, x, WEIGHTS)
    x_adv = attacks.ddn(60, levels=256)(logits_fn, x, labels, args=(WEIGHTS,))
    assert np.all(predicted(logits_fn, x_adv, WEIGHTS) != labels)
    np.testing.assert_allclose(255 * x_adv, np.round(255 * x_adv), atol=1e-4)
    free = ATTACKS["ddn"](logits_fn, x, labels, args=(WEIGHTS,))
    assert np.all(sizes(x_adv, x, "l2") < 1.2 * sizes(free, x, "l2"))


def test_jit_and_new_numbers_cost_no_new_trace_and_change_nothing():
    labels = predicted(logits_fn, X, WEIGHTS)
    traces = []

    def counted(x, weights):
        traces.append(1)
        return logits_fn(x, weights)

    for gamma in (0.05, 0.1, 0.2):
        attacks.fmn("l2", 20, gamma=gamma)(counted, X, labels, args=(WEIGHTS / gamma,))
        first = len(traces) if gamma == 0.05 else first
    assert len(traces) == first
    attack = ATTACKS["ddn"]
    jitted = jax.jit(lambda x, labels: attack(logits_fn, x, labels, args=(WEIGHTS,)))
    plain = attack(logits_fn, X, labels, args=(WEIGHTS,))
    np.testing.assert_allclose(jitted(X, labels), plain, atol=1e-5)


def test_attacks_trace_inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, keys = jax.sharding.PartitionSpec("data"), attacks.example_keys(KEY, BATCH)
    hop = {norm: attacks.hop_skip_jump(norm, 2, evaluations=20) for norm in ("linf", "l2")}
    for attack in [*ATTACKS.values(), *hop.values()]:
        part = lambda x, labels, keys: attack(logits_fn, x, labels, keys, args=(WEIGHTS,))  # noqa: B023, E731
        sharded = jax.shard_map(part, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
        traced = jax.jit(sharded).trace(X, jnp.zeros(BATCH, int), keys)  # types are checked here
        assert traced.out_info.shape == X.shape


def test_attacks_are_values():
    for attack in ATTACKS.values():
        assert dataclasses.replace(attack) == attack
        assert "steps=" in repr(attack)
        json.dumps(dataclasses.asdict(attack))


LABELS = np.zeros(BATCH, int)
WRONG = {
    "steps must be a whole number >= 1, got 0": lambda: attacks.ddn(0),
    "norm must be one of .*got 'l3'": lambda: attacks.fmn("l3"),
    "norm must be one of .*got 'l1'": lambda: attacks.deepfool("l1"),
    "searches must be a whole number >= 1, got 0": lambda: attacks.cw_l2(0),
    "bounds must be finite": lambda: attacks.cw_l2(bounds=None),
    "gamma must be > 0, got -1": lambda: attacks.ddn(gamma=-1),
    "levels must be a whole number >= 2, got 1": lambda: attacks.ddn(levels=1),
    "candidates must be a whole number >= 1, got 0": lambda: attacks.deepfool(candidates=0),
    "targets must differ from labels, got class 2 as both in row 3": lambda: ATTACKS["ddn"](
        logits_fn, X, LABELS + 2, args=(WEIGHTS,), targets=LABELS.at[3].set(2)
    ),
    r"targets must lie in \[0, 5\)": lambda: ATTACKS["cw"](
        logits_fn, X, LABELS, args=(WEIGHTS,), targets=LABELS + 5
    ),
    r"labels must lie in \[0, 5\)": lambda: ATTACKS["ddn"](
        logits_fn, X, LABELS + 5, args=(WEIGHTS,)
    ),
    "x must lie in": lambda: ATTACKS["ddn"](logits_fn, 255 * X, LABELS, args=(WEIGHTS,)),
    "at least 2 classes, got 1": lambda: ATTACKS["ddn"](
        logits_fn, X, LABELS, args=(WEIGHTS[:, :1],)
    ),
    "mask must be": lambda: ATTACKS["ddn"](logits_fn, X, LABELS, mask=np.ones(7), args=(WEIGHTS,)),
}
LABELS = jnp.asarray(LABELS)


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "goldens" / "minimal.npz") as file:
        return dict(file)


def net(x, weights):
    """What tests/goldens/make_minimal_goldens.py attacks: two dense layers."""
    hidden = jnp.tanh(x.reshape(len(x), -1) @ weights["first"] + weights["bias"])
    return hidden @ weights["second"]


@pytest.mark.parametrize("name", ATTACKS)
def test_norms_are_those_of_other_libraries_or_smaller(golden, name):
    """At equal steps, per attack: the median against the best library's, and every success."""
    attack = {
        "cw": attacks.cw_l2(5, 100),
        "ddn": attacks.ddn(100),
        **{f"fmn_{norm}": attacks.fmn(norm, 100) for norm in ("linf", "l2", "l1", "l0")},
    }.get(name, ATTACKS[name])
    x, labels = golden["x"], golden["labels"]
    x_adv = attack(net, x, labels, args=({k: golden[k] for k in ("first", "bias", "second")},))
    found = sizes(x_adv, x, norm_of(name))
    found = np.where(found > 0, found, np.inf)
    theirs = [v for k, v in golden.items() if k.startswith(f"{name}_by_")]
    assert len(theirs) >= 1
    assert np.median(found) <= 1.02 * min(np.median(v) for v in theirs)
