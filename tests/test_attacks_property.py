"""Every attack stays inside ball and box: 1,000 drawn cases for each kind of eps and precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks, losses

CASES, IMAGE, CLASSES = 1000, (3, 2, 2), 4
RADII = (0.0, 0.01, 0.1, 0.5, 1.0, 4.0)
WEIGHTS = jax.random.normal(jax.random.key(9), (*IMAGE, CLASSES))


def logits_fn(x):
    return jnp.einsum("bhwc,hwck->bk", jnp.sin(4 * x.astype(jnp.float32)), WEIGHTS)


def loss_fn(x, labels):
    return losses.cross_entropy(logits_fn(x), labels)


def gradient_attack(make):
    return lambda eps, x, labels, keys: make(eps)(loss_fn, x, keys, args=(labels,))


def class_attack(make):
    return lambda eps, x, labels, keys: make(eps)(logits_fn, x, labels, keys)


def pgd(norm, **options):
    return lambda eps: attacks.pgd(norm, eps, steps=3, loop="fused", **options)


def breaking(make):
    """An attack on a classifier that returns what it has broken, called on what is right."""

    def attack(eps, x, labels, keys):
        labels = logits_fn(x).argmax(1)
        x_adv = make(eps)(logits_fn, x, labels, keys)
        # Asked of what comes back, in its own precision; an untouched row is no failure.
        holds = (logits_fn(x_adv).argmax(1) == labels) & (x_adv != x).any((1, 2, 3))
        return jnp.where(holds[:, None, None, None], jnp.nan, x_adv)

    return attack


def both_linf(eps):
    return attacks.worst_of(attacks.linf_pgd(eps, 2), attacks.fgsm(eps))


# name: (norm, attack)
ATTACKS = {
    "linf_pgd": ("linf", gradient_attack(pgd("linf"))),
    "l2_pgd": ("l2", gradient_attack(pgd("l2"))),
    "l1_pgd": ("l1", gradient_attack(pgd("l1"))),
    "momentum_pgd": ("l2", gradient_attack(pgd("l2", momentum=0.9, start="gaussian"))),
    "linf_fgsm": ("linf", gradient_attack(attacks.fgsm)),
    "l2_fgsm": ("l2", gradient_attack(lambda eps: attacks.fgsm(eps, "l2"))),
    "l1_fgsm": ("l1", gradient_attack(lambda eps: attacks.fgsm(eps, "l1"))),
    "n_fgsm": ("linf", gradient_attack(attacks.n_fgsm)),
    "restarts": ("l2", gradient_attack(lambda eps: attacks.restarts(attacks.l2_pgd(eps, 2), 2))),
    "worst_of": ("linf", gradient_attack(both_linf)),
    "targeted": ("linf", class_attack(lambda eps: attacks.targeted(attacks.linf_pgd(eps, 2)))),
    "multi_targeted": (
        "l1",
        class_attack(lambda eps: attacks.multi_targeted(attacks.l1_pgd(eps, 1), 2)),
    ),
    "apgd_ce": ("linf", breaking(lambda eps: attacks.apgd_ce("linf", eps, steps=4))),
    "apgd_dlr": ("l2", breaking(lambda eps: attacks.apgd_dlr("l2", eps, steps=4))),
    "apgd_t": ("l1", breaking(lambda eps: attacks.apgd_t("l1", eps, steps=4, targets=1))),
    "fab": ("linf", breaking(lambda eps: attacks.fab("linf", eps, steps=4))),
    "square": ("linf", breaking(lambda eps: attacks.square("linf", eps, queries=8))),
    "patch": ("linf", breaking(lambda eps: attacks.patch(2, eps=eps, steps=4, places=1))),
}
BREAKING = ("apgd_ce", "apgd_dlr", "apgd_t", "fab", "square", "patch")


def draw(seed, dtype):
    """Images with values at and one rounding error outside the box; three kinds of radii."""
    rng = np.random.default_rng(seed)
    ulp = 1.2e-7 if dtype == "float32" else 0.0
    special = np.array([0.0, -0.0, 1.0, -ulp, 1 + ulp], np.float32)
    x = rng.uniform(0, 1, (CASES, *IMAGE)).astype(np.float32)
    x = np.where(rng.random(x.shape) < 0.4, rng.choice(special, x.shape), x)
    labels = rng.integers(0, CLASSES, CASES).astype(np.int32)
    numbers = rng.choice(RADII, 50).astype(np.float32)
    vector = rng.choice(RADII, CASES).astype(np.float32)
    maps = rng.choice(RADII, (CASES, *IMAGE)).astype(np.float32)
    return jnp.asarray(x, dtype), labels, numbers, vector, maps


def assert_inside(x, x_adv, eps, norm, tolerance):
    assert x_adv.dtype == x.dtype
    x, x_adv = (np.asarray(v, np.float64) for v in (x, x_adv))
    assert np.all(x_adv >= np.minimum(x, 0))  # false for NaN as well
    assert np.all(x_adv <= np.maximum(x, 1))
    eps = np.broadcast_to(eps, x.shape)
    frozen = eps == 0
    assert np.all(np.signbit(x_adv[frozen]) == np.signbit(x[frozen]))
    assert np.all(x_adv[frozen] == x[frozen])
    u = np.abs(np.where(frozen, 0, (x_adv - x) / np.where(frozen, 1, eps))).reshape(len(x), -1)
    size = {"linf": u.max(1), "l2": np.sqrt((u**2).sum(1)), "l1": u.sum(1)}[norm]
    assert size.max() <= 1 + tolerance
    return size


KINDS = ("number", "vector", "map")
SPARSE = {"float32": ("number", "vector"), "bfloat16": ("map",)}  # each compiles for seconds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_stay_inside_ball_and_box(name, dtype):
    kinds = KINDS if name in ("linf_pgd", "l2_pgd", "l1_pgd") else SPARSE[dtype]
    if name in BREAKING:
        kinds = ("vector",) if name == "fab" else kinds[-1:]  # FAB has no maps
    norm, attack = ATTACKS[name]
    x, labels, numbers, vector, maps = draw(sorted(ATTACKS).index(name), dtype)
    keys = jax.random.split(jax.random.key(0), CASES)
    split = lambda v: v.reshape(50, 20, *v.shape[1:])  # noqa: E731

    def number(numbers, x, labels, keys):
        x_adv = jax.vmap(attack)(numbers, split(x), split(labels), split(keys))
        return x_adv.reshape(x.shape)

    # Compiled without optimisation: each program runs once.
    run = jax.jit(
        lambda radii, *batch: [
            (number if kind == "number" else attack)(radii[kind], *batch) for kind in kinds
        ],
        compiler_options={"xla_backend_optimization_level": 0},
    )
    radii = {"number": numbers, "vector": vector, "map": maps}
    # x + delta is rounded to half an ulp of 1 in float32, to the inside in fewer bits.
    tolerance = 1e-5 + 6e-8 * np.prod(IMAGE) / RADII[1] * (dtype == "float32")
    for kind, x_adv in zip(kinds, run(radii, x, labels, keys), strict=True):
        eps = np.float64(np.repeat(numbers, 20) if kind == "number" else radii[kind])
        eps = eps.reshape(-1, 1, 1, 1) if eps.ndim == 1 else eps
        eps = 3 * eps if name == "n_fgsm" else eps  # 2 eps of noise and a step of eps
        size = assert_inside(x, x_adv, eps, norm, tolerance)
        # The attacks do move; what only breaks, no further than it must, and in l1 seldom.
        least, share = (0, 0.15) if name in BREAKING else (0.3, 0.3)
        assert np.mean(size > least) > share


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", BREAKING)
def test_what_is_broken_in_half_precision_is_inside_and_broken_in_half_precision(name, dtype):
    norm, attack = ATTACKS[name]
    x, _, _, vector, _ = draw(sorted(ATTACKS).index(name), dtype)
    x, vector = x[:64], np.minimum(vector[:64], 1)
    x_adv = attack(vector, x, None, attacks.example_keys(jax.random.key(1), 64))
    size = assert_inside(x, x_adv, np.float64(vector).reshape(-1, 1, 1, 1), norm, 1e-5)
    assert np.mean(size > 0) > 0.1


def test_the_check_notices_what_leaves_ball_or_box():
    x = jnp.full((1, *IMAGE), 0.5)
    for wrong in (x + 0.11, x.at[0, 0, 0, 0].set(jnp.nan), x - 0.6):
        with pytest.raises(AssertionError):
            assert_inside(x, wrong, 0.1, "linf", 1e-5)
    with pytest.raises(AssertionError):
        assert_inside(-0.0 * x, 0.0 * x, 0.0, "linf", 1e-5)


def test_images_one_rounding_error_outside_the_box_pass_and_go_no_further():
    x = jnp.array([1 + 1.2e-7, -1.2e-7, 1.0, 0.0]).reshape(4, 1)
    attack = attacks.linf_pgd(0.1, 2)
    for direction in (1.0, -1.0):
        x_adv = attack(lambda x, d: (d * x).sum(1), x, jax.random.key(0), args=(direction,))
        assert np.all((x_adv <= jnp.maximum(x, 1)) & (x_adv >= jnp.minimum(x, 0)))
    still = dataclasses.replace(attack, eps=0.0)
    assert still(lambda x: x.sum(1), x, jax.random.key(0)).tobytes() == x.tobytes()
