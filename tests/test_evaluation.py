"""Tests of accuracy under attack on a linear net, where the robust accuracy has a closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, evaluation, parallel

COUNT, SHAPE = 21, (2, 2, 1)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.uniform(0.35, 0.65, (COUNT, *SHAPE)).astype(np.float32)
LABELS = RANDOM.integers(0, 2, COUNT).astype(np.int32)
WEIGHT = np.array([1.0, -2.0, 0.5, 0.25], np.float32)
VARIABLES = {"w": WEIGHT}
KEY = jax.random.key(0)
PGD = attacks.linf_pgd(0.05, steps=3)
EPS = [0.0, 0.02, 0.05, 0.1, 0.3]


def apply(variables, x):
    score = (x.reshape(len(x), 4) - 0.5) @ variables["w"]
    return jnp.stack([-score, score], axis=1)


def margins():
    """How far each example is on its own side; an linf attack takes eps ||w||_1 of it."""
    score = (IMAGES.reshape(COUNT, 4) - 0.5) @ WEIGHT
    return np.where(LABELS == 1, score, -score)


def right(**options):
    return evaluation.correct(apply, VARIABLES, IMAGES, LABELS, **options)


def test_clean_and_robust_accuracy_equal_the_closed_form():
    np.testing.assert_array_equal(right(), margins() > 0)
    robust = margins() > 0.05 * np.abs(WEIGHT).sum()
    np.testing.assert_array_equal(right(attack=PGD, key=KEY), robust)
    assert 0 < robust.sum() < (margins() > 0).sum() < COUNT


def random_attack(loss_fn, x, key, mask=None, args=()):
    """Noise alone: its result shows which key an example was given."""
    noise = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], minval=-1))(key)
    return jnp.clip(x + 0.2 * noise, 0, 1)


@pytest.mark.parametrize("batch_size", [1, 4, 21, 250])
@pytest.mark.parametrize("devices", [None, 2, 8])
def test_the_result_does_not_depend_on_batches_and_devices(batch_size, devices):
    mesh = parallel.data_mesh(devices) if devices else None
    got = right(attack=random_attack, key=KEY, batch_size=batch_size, mesh=mesh)
    keys = [jax.random.fold_in(KEY, i) for i in range(COUNT)]
    expected = [
        bool(apply(VARIABLES, random_attack(None, image[None], key[None])).argmax() == label)
        for image, label, key in zip(IMAGES, LABELS, jnp.stack(keys), strict=True)
    ]
    np.testing.assert_array_equal(got, expected)
    assert got.tolist() != right().tolist()


def test_a_gradient_attack_over_a_mesh_equals_one_device():
    mesh = parallel.data_mesh(8)
    expected = right(attack=PGD, key=KEY)
    got = right(attack=PGD, key=KEY, batch_size=10, mesh=mesh)
    np.testing.assert_array_equal(got, expected)
    # Also with the weights of a training run, which lie on all of its devices.
    placed = parallel.create(lambda: {"w": jnp.asarray(WEIGHT)}, mesh)
    got = evaluation.correct(apply, placed, IMAGES, LABELS, attack=PGD, key=KEY, batch_size=10)
    np.testing.assert_array_equal(got, expected)


def test_filled_up_batches_cost_no_new_trace():
    traces = []

    def counted(variables, x):
        traces.append(x.shape)
        return apply(variables, x)

    evaluation.correct(counted, VARIABLES, IMAGES, LABELS, batch_size=8)
    # One shape to read the number of classes, one to run.
    assert set(traces) == {(1, *SHAPE), (8, *SHAPE)}
    before = len(traces)
    evaluation.correct(counted, VARIABLES, IMAGES[:17], LABELS[:17], batch_size=8)
    assert traces[before:].count((8, *SHAPE)) == 0


def test_the_curve_equals_separate_attacks_and_the_closed_form():
    curve = evaluation.accuracy_curve(
        apply, VARIABLES, IMAGES, LABELS, PGD, EPS, key=KEY, batch_size=8
    )
    assert curve.shape == (len(EPS), COUNT)
    for row, eps in zip(curve, EPS, strict=True):
        attack = attacks.linf_pgd(eps, steps=3)
        np.testing.assert_array_equal(row, right(attack=attack, key=KEY))
        np.testing.assert_array_equal(row, margins() > eps * np.abs(WEIGHT).sum())
    assert len(set(curve.sum(1))) > 3


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_curve_is_the_same_on_any_number_of_devices(devices):
    arguments = (apply, VARIABLES, IMAGES, LABELS, PGD, EPS)
    alone = evaluation.accuracy_curve(*arguments, key=KEY, batch_size=8)
    mesh = parallel.data_mesh(devices)
    # As it comes from training: on one device.
    committed = (apply, jax.device_put(VARIABLES, jax.devices()[0]), *arguments[2:])
    many = evaluation.accuracy_curve(*committed, key=KEY, batch_size=5, mesh=mesh)
    np.testing.assert_array_equal(many, alone)
    found = evaluation.correct(*committed[:4], attack=PGD, key=KEY, batch_size=5, mesh=mesh)
    np.testing.assert_array_equal(found, right(attack=PGD, key=KEY))


def test_what_falls_at_one_radius_has_fallen_at_every_larger_one():
    def wavy(variables, x):
        return jnp.sin(40 * apply(variables, x))

    def noise(eps):
        return attacks.linf_pgd(eps, steps=1, step_size=0.0)

    data = (wavy, VARIABLES, IMAGES, LABELS)
    alone = [evaluation.correct(*data, attack=noise(eps), key=KEY) for eps in EPS]
    assert (np.diff(np.asarray(alone, int), axis=0) > 0).any()
    curve = evaluation.accuracy_curve(*data, noise(0.1), EPS, key=KEY)
    np.testing.assert_array_equal(curve, np.logical_and.accumulate(alone, axis=0))


def test_examples_that_have_fallen_are_not_attacked_again():
    attacked = []

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Counting:
        eps: float

        def __call__(self, loss_fn, x, key, *, args):
            jax.debug.callback(lambda x: attacked.append(len(x)), x)
            return PGD(loss_fn, x, key, args=args)

    curve = evaluation.accuracy_curve(
        apply, VARIABLES, IMAGES, LABELS, Counting(0.1), (0.0, 0.1, 0.2), key=KEY, batch_size=1
    )
    jax.effects_barrier()
    assert sum(attacked) == curve[0].sum() + curve[1].sum() < 2 * COUNT


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": IMAGES[0]}, ValueError, r"images must be \[n, h, w, c\]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, ValueError, "n >= 1, got shape"),
        ({"images": (IMAGES * 255).astype(np.uint8)}, TypeError, "floating point .* got uint8"),
        ({"labels": LABELS + 1}, ValueError, r"labels must lie in \[0, 2\), got values in \[1, 2"),
        ({"labels": LABELS[:3]}, ValueError, r"labels must have shape \(21,\), got \(3,\)"),
        ({"labels": LABELS / 2}, TypeError, "labels must be integers"),
        ({"batch_size": True}, ValueError, "batch_size must be a whole number >= 1, got True"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number >= 1, got 0"),
        ({"attack": PGD}, ValueError, "key must be a typed key when an attack is given, got None"),
        ({"attack": PGD, "key": jnp.zeros(2, jnp.uint32)}, TypeError, "key must be typed"),
        ({"attack": PGD, "key": KEY, "images": IMAGES * 9}, ValueError, r"images must lie in"),
        (
            {"attack": attacks.apgd_ce("linf", 0.1), "key": KEY},
            TypeError,
            "accuracy under attack needs attacks called as attack.loss_fn, x, key",
        ),
    ],
)
def test_bad_input_gives_a_clear_error(changes, error, message):
    arguments = {"images": IMAGES, "labels": LABELS} | changes
    with pytest.raises(error, match=message):
        evaluation.correct(apply, VARIABLES, **arguments)


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        ([0.1, 0.05], "eps must rise"),
        ([], "eps must hold at least one radius"),
        ([-0.1, 0.1], r"all >= 0, got \[-0.1, 0.1\]"),
    ],
)
def test_radii_out_of_order_or_range_are_refused(eps, message):
    with pytest.raises(ValueError, match=message):
        evaluation.accuracy_curve(apply, VARIABLES, IMAGES, LABELS, PGD, eps, key=KEY)
