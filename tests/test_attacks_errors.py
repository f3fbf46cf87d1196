"""Bad input to attacks gives one clear error each."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks
from jaxrobust.attacks import classifier, inputs

KEY = jax.random.key(0)
X = jnp.full((2, 3, 3, 1), 0.5)
LABELS = jnp.array([0, 1])


def loss_fn(x):
    return x.sum((1, 2, 3))


def logits_fn(x):
    return x.sum((2, 3))


def unchecked(attack):
    """The call as it is outside of the tests, without their checks of the annotations."""
    call = inspect.unwrap(type(attack).__call__)
    return lambda *args, **options: call(attack, *args, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attacks.linf_pgd(-0.1), "eps must be >= 0, got -0.1"),
        (lambda: attacks.linf_pgd(float("nan")), "eps must be >= 0, got nan"),
        (lambda: attacks.l2_pgd(np.array([0.1, -0.2])), "eps must be >= 0, got -0.2"),
        (lambda: attacks.l2_pgd(jnp.array([0.1, jnp.nan])), "eps must be >= 0, got nan"),
        (lambda: attacks.l1_pgd(1.0, step_size=-1.0), "step_size must be >= 0, got -1"),
        (lambda: attacks.l2_pgd(1.0, momentum=-0.5), "momentum must be >= 0, got -0.5"),
        (lambda: attacks.linf_pgd(0.1, 0), "steps must be a whole number >= 1, got 0"),
        (lambda: attacks.linf_pgd(0.1, True), "steps must be a whole number >= 1, got True"),
        (lambda: attacks.pgd("l7", 0.1), r"norm must be one of .*got 'l7'"),
        (lambda: attacks.fgsm(0.1, "l7"), r"norm must be one of .*got 'l7'"),
        (lambda: attacks.linf_pgd(0.1, start="warm"), r"start must be one of .*got 'warm'"),
        (lambda: attacks.linf_pgd(0.1, loop="while"), r"loop must be one of .*got 'while'"),
        (
            lambda: attacks.linf_pgd(0.1, bounds=(1.0, 0.0)),
            r"bounds must be \(low, high\) with low < high, got \(1.0, 0.0\)",
        ),
        (lambda: attacks.n_fgsm(-0.1), "eps must be >= 0, got -0.1"),
        (lambda: attacks.n_fgsm(0.1, noise=-1.0), "noise must be >= 0, got -1"),
        (lambda: attacks.n_fgsm(0.1, start="none"), "start must be .*, got 'none'"),
        (lambda: attacks.n_fgsm(0.1, step_size=-1.0), "step_size must be >= 0, got -1"),
        (
            lambda: attacks.restarts(attacks.fgsm(0.1), 0),
            "count must be a whole number >= 1, got 0",
        ),
        (
            lambda: attacks.multi_targeted(attacks.fgsm(0.1), 0),
            "targets must be a whole number >= 1, got 0",
        ),
        (lambda: attacks.worst_of(), "worst_of needs at least one attack, got none"),
        (lambda: attacks.linf_pgd(8), r"which lie in \(0.0, 1.0\), got 8: 8 / 255, not 8"),
        (lambda: attacks.linf_pgd(jnp.array([0.1, 4.0])), "got 4: 8 / 255, not 8"),
        (lambda: attacks.fgsm(1.5), "got 1.5: 8 / 255, not 8"),
        (lambda: attacks.fgsm(3.0, bounds=(-1.0, 1.0)), "got 3: 8 / 255, not 8"),
        (lambda: attacks.apgd("linf", 8), "8 / 255, not 8"),
        (lambda: attacks.apgd_ce("linf", 8), "8 / 255, not 8"),
        (lambda: attacks.square("linf", 8), "8 / 255, not 8"),
        (lambda: attacks.fab("linf", 8), "8 / 255, not 8"),
        (lambda: attacks.fab_t("linf", 8), "8 / 255, not 8"),
        (lambda: attacks.apgd("linf", 0.1, rho=1.0), r"rho must lie in \(0, 1\), got 1"),
        (lambda: classifier.loss_for("hinge", 10), "loss must be .*'targeted_dlr'.*got 'hinge'"),
    ],
)
def test_an_attack_of_bad_numbers_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_number_is_refused():
    for make in (attacks.linf_pgd, attacks.n_fgsm, attacks.fgsm):
        with pytest.raises(
            TypeError, match="eps must be a number or an array of them, got '8/255'"
        ):
            make("8/255")


def test_radii_as_wide_as_the_box_and_of_other_norms_are_not_of_another_unit():
    attacks.fgsm(1.0)
    attacks.fgsm(np.float32(0.9) - np.float32(-0.3), bounds=(-0.3, 0.9))
    attacks.linf_pgd(8.0, bounds=None)
    attacks.n_fgsm(8.0)
    for make in (attacks.l2_pgd, attacks.l1_pgd):
        make(8.0)


plain = inspect.unwrap  # annotations are for whole numbers of Python's
COUNTS = {
    "steps": lambda n: plain(attacks.apgd)("linf", 0.1, steps=n).steps,
    "targets": lambda n: plain(attacks.apgd_t)("linf", 0.1, targets=n).targets,
    "restarts": lambda n: plain(attacks.fab)("linf", 0.1, restarts=n).restarts,
    "draws": lambda n: plain(attacks.apgd_ce)("linf", 0.1, draws=n).draws,
    "queries": lambda n: plain(attacks.square)("linf", 0.1, queries=n).queries,
    "places": lambda n: plain(attacks.patch)(2, places=n).attack.restarts,
    "size": lambda n: plain(attacks.patch)(n).size[0],
    "grid": lambda n: plain(attacks.spatial)(grid=(1, n, 1)).grid[1],
    "searches": lambda n: plain(attacks.cw_l2)(n).searches,
    "levels": lambda n: plain(attacks.ddn)(levels=n).levels,
    "candidates": lambda n: plain(attacks.deepfool)(candidates=n).candidates,
    "evaluations": lambda n: plain(attacks.hop_skip_jump)(evaluations=n).evaluations,
    "max_evaluations": lambda n: plain(attacks.hop_skip_jump)(max_evaluations=n).max_evaluations,
    "chunk": lambda n: plain(attacks.hop_skip_jump)(chunk=n).chunk,
    "count": lambda n: plain(attacks.restarts)(PGD, n).count,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_whole_numbers_of_any_kind_and_no_others(name):
    assert json.dumps(COUNTS[name](np.int64(3))) == "3"
    for wrong in (True, 2.5, -1, "3"):
        message = rf"{name} must be a whole number >= \d, got {wrong!r}"
        with pytest.raises(ValueError, match=message):
            COUNTS[name](wrong)


PGD = attacks.linf_pgd(0.1, 2)
BATCHES = [
    (X[0, 0, 0], ValueError, r"x must be a batch \[b, ...\] of rank >= 2, got shape \(1,\)"),
    (jnp.ones((2, 3, 3, 1), jnp.uint8), TypeError, r"x must be floating point in .*got uint8"),
    (255 * X, ValueError, r"x must lie in \(0.0, 1.0\), got values in \[127.5, 127.5\]"),
    (X - 0.6, ValueError, r"x must lie in \(0.0, 1.0\), got values in \[-0.1, -0.1\]"),
    (X.at[1].set(jnp.nan), ValueError, r"x must lie in .*\[nan, nan\]: some are NaN"),
    (X.at[1].set(jnp.inf), ValueError, r"x must lie in .*got values in \[0.5, inf\]"),
]


@pytest.mark.parametrize(("x", "error", "message"), BATCHES)
def test_a_bad_batch_is_refused_by_every_attack(x, error, message):
    for attack in (PGD, attacks.n_fgsm(0.1), attacks.restarts(PGD, 2), attacks.worst_of(PGD)):
        with pytest.raises(error, match=message):
            attack(loss_fn, x, KEY)
    for attack in (attacks.targeted(PGD), attacks.multi_targeted(PGD)):
        with pytest.raises(error, match=message):
            attack(logits_fn, x, LABELS, KEY)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (jnp.array([0, 3]), ValueError, r"labels must lie in \[0, 3\), got values in \[0, 3\]"),
        (jnp.array([-1, 2]), ValueError, r"labels must lie in \[0, 3\), got values in \[-1, 2\]"),
        (jnp.array([0.0, 1.0]), TypeError, "labels must be integers, got float32"),
        (jnp.array([0, 1, 2]), ValueError, r"labels must have shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_labels_are_refused(labels, error, message):
    for attack in (attacks.targeted(PGD), attacks.multi_targeted(PGD)):
        with pytest.raises(error, match=message):
            attack(logits_fn, X, labels, KEY)


LOSS_ATTACKS = (PGD, attacks.fgsm(0.1), attacks.n_fgsm(0.1), attacks.apgd("linf", 0.1, steps=2))
CLASS_ATTACKS = (
    attacks.apgd_ce("linf", 0.1, steps=2),
    attacks.fab("linf", 0.1),
    attacks.square("linf", 0.1),
    attacks.patch(2),
    attacks.spatial(),
    attacks.ddn(3),
    attacks.hop_skip_jump(),
    attacks.multi_targeted(PGD),
    attacks.transfer(PGD, logits_fn),
)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((3, 3, 1), 255, np.uint8), r"values in \[255, 255\] in shape \(3, 3, 1\)"),
        (jnp.ones((3, 3, 1)).at[0].set(-1), r"values in \[-1, 1\] in shape \(3, 3, 1\)"),
        (np.array([1.0, np.nan]), r"values in \[nan, nan\] in shape \(2,\)"),
        (np.ones((4, 3, 1)), r"mask must be a number.*got shape \(4, 3, 1\)"),
    ],
)
def test_a_mask_that_is_no_share_is_refused_by_every_attack(mask, message):
    for attack in LOSS_ATTACKS:
        with pytest.raises(ValueError, match=message):
            attack(loss_fn, X, KEY, mask)
    for attack in CLASS_ATTACKS:
        if not isinstance(attack, attacks.FAB | attacks.Spatial):  # they take none
            with pytest.raises(ValueError, match=message):
                attack(logits_fn, X, LABELS, KEY, mask)


def test_masks_of_bits_and_of_traced_values_pass():
    mask = np.arange(9).reshape(3, 3, 1) % 2
    given = [mask > 0, mask.astype(np.uint8), jnp.asarray(mask, jnp.float32)]
    results = [PGD(loss_fn, X, KEY, each) for each in given]
    results.append(jax.jit(lambda mask: PGD(loss_fn, X, KEY, mask))(mask > 0))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_args_that_are_no_tuple_are_refused_by_every_attack():
    message = r"args must be a tuple, such as \(labels,\), got ArrayImpl"
    for attack in LOSS_ATTACKS:
        with pytest.raises(TypeError, match=message):
            unchecked(attack)(loss_fn, X, KEY, args=LABELS)
    for attack in CLASS_ATTACKS:
        with pytest.raises(TypeError, match=message):
            unchecked(attack)(logits_fn, X, LABELS, KEY, args=LABELS)
    assert inputs.check_args([LABELS]) == (LABELS,)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: (logits_fn(x), x), "a tuple"),
        (lambda x: {"logits": logits_fn(x)}, "a dict"),
        (lambda x: x.sum((1, 2, 3)), r"shape \(2,\)"),
        (lambda x: logits_fn(x)[:1], r"shape \(1, 3\)"),
    ],
)
def test_what_is_not_one_array_of_logits_is_refused_by_every_attack(function, got):
    for attack in CLASS_ATTACKS:
        with pytest.raises(ValueError, match=rf"return one array \[2, classes\], got {got}"):
            attack(function, X, LABELS, KEY)


def test_attacks_that_take_pictures_say_so():
    flat = X.reshape(2, -1)
    message = r"x must be pictures \[b, h, w, c\] for this attack, got images of shape \(9,\)"
    for attack in (attacks.square("linf", 0.1), attacks.patch(2), attacks.spatial()):
        with pytest.raises(ValueError, match=message):
            attack(lambda x: x[:, :3], flat, (flat[:, :3]).argmax(1), KEY)


def test_labels_where_a_key_belongs_are_noticed():
    for attack in LOSS_ATTACKS:
        with pytest.raises(TypeError, match="An attack that takes a loss takes no labels"):
            attack(loss_fn, X, LABELS)
        with pytest.raises(TypeError, match="An attack that takes a loss takes no labels"):
            unchecked(attack)(loss_fn, X, LABELS, KEY)


def test_attacks_that_take_labels_are_refused_where_one_on_a_loss_is_needed():
    makers = {
        "restarts": lambda a: attacks.restarts(a, 2),
        "worst_of": lambda a: attacks.worst_of(PGD, a),
        "targeted": attacks.targeted,
        "multi_targeted": attacks.multi_targeted,
        "transfer": lambda a: attacks.transfer(a, logits_fn),
    }
    for name, make in makers.items():
        for attack in (*CLASS_ATTACKS, attacks.targeted(PGD)):
            message = rf"{name} needs attacks called as .*got {type(attack).__name__}, which takes"
            with pytest.raises(TypeError, match=message):
                make(attack)
        make(lambda loss_fn, x, key, mask=None, args=(): x)


def test_a_traced_share_of_the_moves_is_accepted():
    shifted = jax.jit(lambda eps: attacks.spatial(eps, grid=(1, 1, 1))(logits_fn, X, LABELS, KEY))
    assert shifted(0.5).shape == X.shape


def test_a_model_of_one_class_has_no_other_to_be_driven_to():
    with pytest.raises(ValueError, match="logits of at least 2 classes, got 1"):
        attacks.multi_targeted(PGD)(lambda x: logits_fn(x)[:, :1], X, 0 * LABELS, KEY)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (None, TypeError, r"key must be typed, as jax.random.key\(0\) makes it, got None"),
        (jnp.zeros(2, jnp.uint32), TypeError, r"key must be typed, as jax.random.key\(0\)"),
        (jax.random.split(KEY, 3), ValueError, r"one per example \(2,\), got \(3,\)"),
    ],
)
def test_a_bad_key_is_refused_where_one_is_needed(key, error, message):
    for attack in (PGD, attacks.restarts(PGD, 2)):
        if key is not None or attack is PGD:  # the wrapper's annotation refuses None by itself
            with pytest.raises(error, match=message):
                attack(loss_fn, X, key)
    if key is None:
        assert attacks.fgsm(0.1)(loss_fn, X).shape == X.shape
        assert PGD(loss_fn, X, delta=jnp.zeros_like(X)).shape == X.shape


@pytest.mark.parametrize("loss", [lambda x: x.sum(), lambda x: x.sum(3)])
def test_a_loss_that_is_not_one_number_per_example_is_refused(loss):
    for attack in (PGD, attacks.n_fgsm(0.1)):
        with pytest.raises(ValueError, match=r"loss_fn must return one loss per example, \(2,\)"):
            attack(loss, X, KEY)


def test_shapes_that_do_not_fit_the_batch_are_named():
    wrong = jnp.ones((3, 3))
    for name in ("eps", "step_size"):
        attack = dataclasses.replace(PGD, **{name: wrong})
        with pytest.raises(ValueError, match=rf"{name} must be a number.*got shape \(3, 3\)"):
            attack(loss_fn, X, KEY)
    with pytest.raises(ValueError, match=r"mask must be a number.*got shape \(3, 3\)"):
        PGD(loss_fn, X, KEY, wrong)


def test_the_stepped_loop_is_refused_inside_jit():
    attack = dataclasses.replace(PGD, loop="stepped")
    with pytest.raises(ValueError, match="loop='stepped' runs from the host"):
        jax.jit(lambda x: attack(loss_fn, x, KEY))(X)
