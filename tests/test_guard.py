"""Tests of guarded N-FGSM: when it looks, how long it rescues, and that it prevents a collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust import attacks, data, evaluation, models, parallel
from jaxrobust.training import (
    adversarial,
    create_state,
    fit,
    guarded_n_fgsm,
    read_metrics,
    sgd,
    train_step,
)

# One pixel, two classes, boundary at 1/2: the guard of radius 0.2 flips 0.6 and not 0.9, while the
# cheap attack of radius 0 flips nothing.
PIXEL = models.Model(
    init=lambda key, shape: {"params": {"w": jnp.ones(1)}},
    apply=lambda variables, x: pixel_logits(variables["params"]["w"], x),
    train=lambda variables, x, *, axis_name=None, dtype=None: (
        pixel_logits(variables["params"]["w"], x),
        {},
    ),
    config={},
)
GUARD = attacks.linf_pgd(0.2, steps=1, start="none")


def pixel_logits(w, x):
    z = w * (x.reshape(len(x), 1) - 0.5)
    return jnp.concatenate([-z, z], axis=1)


def pixels(share_of_weak):
    weak = np.arange(16) < 16 * share_of_weak
    image = np.where(weak, 0.6, 0.9).astype(np.float32).reshape(16, 1, 1, 1)
    index = np.arange(16, dtype=np.int32)
    # Shuffled, so that the shares of 8 devices differ.
    order = np.random.default_rng(0).permutation(16)
    return {"image": image[order], "label": np.ones(16, np.int32), "index": index}


@pytest.mark.parametrize(
    ("mapping", "accumulate"), [("shard_map", 1), ("shard_map", 2), ("pmap", 1), ("jit", 2)]
)
def test_the_guard_looks_at_its_steps_and_rescues_for_its_time(mapping, accumulate):
    cheap = attacks.n_fgsm(0.0)
    objective = guarded_n_fgsm(cheap, GUARD, check_every=4, gap=0.5, rescue_steps=6)
    optimizer = sgd(0.0, momentum=0.0)
    step = train_step(PIXEL, optimizer, objective, accumulate=accumulate)
    state = create_state(PIXEL, optimizer, jax.random.key(0), (1, 1, 1), extra=objective.extra)
    run = parallel.data_parallel(step, parallel.data_mesh(8), mapping=mapping)
    #         0  1  2  3  4  5  6  7  8  9  10 11 12    13
    shares = [0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0.25, 1]
    history = []
    for share in shares:
        state, metrics = run(state, pixels(share))
        history.append({name: round(float(value), 4) for name, value in metrics.items()})
    rescued = {4, 5, 6, 7, 8, 9}
    assert [m["rescue"] for m in history] == [float(i in rescued) for i in range(14)]
    if accumulate == 1:
        # Between looks, the last gap seen.
        assert [m["guard_gap"] for m in history] == [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [0.25] * 2
    # On weak pixels the guard leaves nothing right: what was trained on shows in the accuracy.
    expected = [1 - share if i in rescued else 1 for i, share in enumerate(shares)]
    assert [m["accuracy"] for m in history] == expected
    assert int(state.extra["rescue_until"]) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check_every": 0}, "check_every must be >= 1, got 0"),
        ({"rescue_steps": 0}, "rescue_steps must be >= 1, got 0"),
        ({"gap": 0.0}, r"gap must be in \(0, 1\), got 0.0"),
        ({"gap": 1.0}, r"gap must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_settings_of_the_guard_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        guarded_n_fgsm(attacks.n_fgsm(0.1), GUARD, **options)


# ---- a real collapse ----------------------------------------------------------------------------

# FGSM with a step of twice the radius and no noise: the harshest one-step training there is.
EPS = 0.2
ONE_STEP = attacks.n_fgsm(EPS, noise=0.0, step_size=2 * EPS)
NET = models.small_cnn(channels=(), strides=(), dense=(256, 256))


def digits():
    """Training and test part of the 8x8 digits, shuffled: they are sorted by who wrote them."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = (bunch.images / 16).astype(np.float32)[order, ..., None]
    labels, names = bunch.target.astype(np.int32)[order], tuple("0123456789")
    cut, numbers = 1437, np.arange(len(labels), dtype=np.int32)
    return [
        data.Dataset(images[part], labels[part], numbers[part], names)
        for part in (slice(None, cut), slice(cut, None))
    ]


def trained(objective, directory):
    """(accuracy under FGSM, under PGD-20, share of rescued steps) of the averaged weights."""
    train, test = digits()
    optimizer, mesh = optax.adam(3e-3), parallel.data_mesh(1)
    state = parallel.create(
        lambda key: create_state(NET, optimizer, key, (8, 8, 1), ema=True, extra=objective.extra),
        mesh,
        jax.random.key(0),
    )
    step = train_step(NET, optimizer, objective, ema_decay=0.98)
    settings = {"batch_size": 64, "epochs": 40, "mesh": mesh, "averaged": True}
    settings |= {"directory": directory, "log_every": 4, "progress": False}
    variables = fit(step, state, train, **settings).variables
    rescued = np.mean([row.get("rescue", 0) for row in read_metrics(directory)])
    accuracies = [
        evaluation.correct(
            NET.apply,
            variables,
            test.images,
            test.labels,
            attack=attack,
            key=jax.random.key(1),
            batch_size=len(test.labels),
        ).mean()
        for attack in (attacks.fgsm(EPS), attacks.linf_pgd(EPS, steps=20))
    ]
    return *accuracies, rescued


@pytest.mark.slow
def test_one_step_training_collapses_without_the_guard_and_not_with_it(tmp_path):
    fgsm, pgd, _ = trained(adversarial(ONE_STEP), tmp_path / "without")
    # Catastrophic overfitting: right under the one step, never under several. Measured: 0.80, 0.01.
    assert fgsm > 0.6
    assert pgd < 0.1
    guard = attacks.linf_pgd(EPS, steps=7)
    guarded = guarded_n_fgsm(ONE_STEP, guard, check_every=5, gap=0.1, rescue_steps=40)
    _, pgd, rescued = trained(guarded, tmp_path / "with")
    # Measured: 0.35, at a quarter of the steps on PGD-7.
    assert pgd > 0.2
    assert 0.05 < rescued < 0.6
