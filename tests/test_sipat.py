"""SIP-AT: the perturbation set, the attack, the objectives, presets, refreshed maps and regions."""

from functools import partial

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies

import jaxrobust as jr
from experiments import sipat as experiment
from experiments.sipat_settings import PRESETS
from jaxrobust import data, evaluation, losses, models, parallel, salience, sipat
from jaxrobust.training import (
    adversarial,
    create_state,
    fit,
    mart,
    sgd,
    smooth_adv,
    trades,
    train_step,
    with_awp,
)
from tests.conftest import EMITTERS

SHAPE, BATCH, CLASSES, EPS = (4, 5, 2), 8, 3, 0.1
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.uniform(0, 1, (BATCH, *SHAPE)).astype(np.float32)
LABELS = RANDOM.integers(0, CLASSES, BATCH).astype(np.int32)
HARD = (RANDOM.uniform(size=(BATCH, 4, 5, 1)) < 0.4).astype(np.float32)
SOFT = RANDOM.uniform(size=(BATCH, 4, 5, 1)).astype(np.float32)
KEY = jax.random.key(0)
ATTACK = jr.linf_pgd(EPS, steps=4, step_size=EPS / 3)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Curved, so that an attack has something to search for, and without a convolution to compile.
W1 = RANDOM.normal(size=(40, 16)).astype(np.float32)
W2 = RANDOM.normal(size=(16, CLASSES)).astype(np.float32)


def logits_of(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params["w1"]) @ params["w2"]


NET = models.Model(
    # Copies, since training gives the memory of its state away.
    init=lambda key, shape: {"params": {"w1": jnp.array(W1), "w2": jnp.array(W2)}},
    apply=lambda variables, x: logits_of(variables["params"], x),
    train=lambda variables, x, *, axis_name=None, dtype=None: (
        logits_of(variables["params"], x),
        {},
    ),
    config={},
)


def loss_fn(x, labels):
    return losses.cross_entropy(logits_of({"w1": W1, "w2": W2}, x), labels)


def perturbed(maps, masking, attack=ATTACK):
    run = sipat.SipPGD(attack=attack, masking=masking)
    return run(loss_fn, IMAGES, KEY, maps, args=(LABELS,))


# The perturbation set


def test_sip_pgd_is_linf_pgd_with_hard_masks_in_the_loop():
    attack = jr.sip_pgd(EPS, 4, EPS / 3)
    assert attack == sipat.SipPGD(attack=ATTACK, masking=sipat.Masking(mode="hard"))
    assert EPS in jax.tree.leaves(attack)  # a number that may be traced


@pytest.mark.parametrize("post_hoc", [False, True])
@pytest.mark.parametrize("mode", ["hard", "support"])
def test_protected_pixels_do_not_move_at_all(mode, post_hoc):
    masking = sipat.Masking(mode=mode, post_hoc=post_hoc)
    delta = perturbed(HARD, masking) - IMAGES
    assert jnp.abs(delta * HARD).max() == 0
    assert (jnp.abs(delta) > 0)[np.broadcast_to(HARD == 0, delta.shape)].mean() > 0.9


@hypothesis.given(seed=strategies.integers(0, 99), mode=strategies.sampled_from(sipat.MODES))
@hypothesis.settings(max_examples=20, deadline=None)
def test_every_perturbation_lies_in_its_set(seed, mode):
    maps = np.random.default_rng(seed).uniform(size=HARD.shape).astype(np.float32).round(1)
    free = {"hard": maps <= 0.5, "support": maps < 1, "soft": 1 - maps}[mode]
    x_adv = perturbed(maps, sipat.Masking(mode=mode))
    # One unit in the last place of x + delta.
    assert (np.abs(x_adv - IMAGES) <= EPS * free + 6e-8).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("post_hoc", [False, True])
def test_soft_maps_scale_the_radius_of_every_pixel(post_hoc):
    delta = np.abs(perturbed(SOFT, sipat.Masking(mode="soft", post_hoc=post_hoc)) - IMAGES)
    assert (delta <= EPS * (1 - SOFT) + 6e-8).all()
    assert delta.max() > 0.9 * EPS * (1 - SOFT.min())


@pytest.mark.parametrize("mode", sipat.MODES)
@pytest.mark.parametrize("post_hoc", [False, True])
def test_a_map_of_zero_is_the_plain_attack_and_a_map_of_one_the_identity(mode, post_hoc):
    masking = sipat.Masking(mode=mode, post_hoc=post_hoc)
    plain = ATTACK(loss_fn, IMAGES, KEY, args=(LABELS,))
    np.testing.assert_array_equal(perturbed(np.zeros_like(HARD), masking), plain)
    np.testing.assert_array_equal(perturbed(np.ones_like(HARD), masking), IMAGES)


def test_inverting_the_masking_is_inverting_the_map():
    inverted = perturbed(HARD, sipat.Masking(invert=True))
    np.testing.assert_array_equal(inverted, perturbed(1 - HARD, sipat.Masking()))
    np.testing.assert_array_equal(jnp.abs(inverted - IMAGES) * (1 - HARD), 0)


def test_searching_under_the_mask_beats_masking_afterwards_on_average():
    gains = []
    for seed in range(10):
        maps = (np.random.default_rng(seed).uniform(size=HARD.shape) < 0.5).astype(np.float32)
        inside, after = (
            loss_fn(perturbed(maps, sipat.Masking(post_hoc=post_hoc)), jnp.asarray(LABELS))
            for post_hoc in (False, True)
        )
        gains.append(float((inside - after).mean()))
    assert np.mean(gains) > 0.01


def test_modes_differ_on_fractions_only():
    fractions = jnp.asarray([0.0, 0.3, 0.5, 0.7, 1.0])
    mask = lambda mode: sipat.Masking(mode=mode).mask(fractions)  # noqa: E731
    np.testing.assert_array_equal(mask("hard"), [1, 1, 1, 0, 0])  # a tie may change
    np.testing.assert_array_equal(mask("support"), [1, 1, 1, 1, 0])
    np.testing.assert_allclose(mask("soft"), [1, 0.7, 0.5, 0.3, 0], rtol=1e-6)


def test_part_keeps_eps_where_it_matters_and_lowers_it_elsewhere():
    part = sipat.preset("part")
    x_adv = perturbed(HARD, part.masking, jr.linf_pgd(8 / 255, steps=10, step_size=2 / 255))
    size = np.abs(x_adv - IMAGES) * 255
    everywhere = np.broadcast_to(HARD, size.shape)
    inside = (IMAGES > 0.05) & (IMAGES < 0.95)  # away from the box
    np.testing.assert_allclose(size[(everywhere == 1) & inside].max(), 8, rtol=1e-4)
    np.testing.assert_allclose(size[(everywhere == 0) & inside].max(), 7, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "firm"}, r"mode must be one of \('hard', 'support', 'soft'\), got 'firm'"),
        ({"salient": -0.5}, "salient must be >= 0, got -0.5"),
        ({"background": 1.5}, r"background must be in \[0, 1\], a share of eps, got 1.5"),
    ],
)
def test_a_masking_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sipat.Masking(**options)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (HARD[:, :3], r"salience must have shape \(8, 4, 5, 1\), got \(8, 3, 5, 1\)"),
        (HARD * np.nan, "salience must not hold NaN"),
        (HARD + 0.5, r"salience must lie in \[0, 1\]"),
    ],
)
def test_the_attack_refuses_maps_that_do_not_fit(maps, message):
    with pytest.raises(ValueError, match=message):
        perturbed(maps, sipat.Masking())


# Training


def batch_with(maps):
    batch = {"image": IMAGES, "label": LABELS, "index": np.arange(BATCH, dtype=np.int32)}
    return batch if maps is None else {**batch, "salience": maps}


def trained(objective, maps=None, steps=2, mapping=None, **options):
    """(params, metrics of the last step)."""
    optimizer = sgd(0.1)
    step = train_step(NET, optimizer, objective, **options)
    state = create_state(NET, optimizer, jax.random.key(1), SHAPE, extra=objective.extra)
    if mapping is None:
        run = jax.jit(step, compiler_options=EMITTERS)
    else:
        run = parallel.data_parallel(step, mapping=mapping)
    for _ in range(steps):
        state, metrics = run(state, batch_with(maps))
    return state.params, jax.tree.map(float, metrics)


BASES = {
    "at": adversarial(ATTACK),
    "trades": trades(ATTACK),
    "mart": mart(ATTACK),
    "awp": with_awp(adversarial(ATTACK), 0.01),
}
over_bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other)))


@over_bases
def test_training_with_a_map_of_zero_is_training_without_bit_for_bit(base):
    plain, _ = trained(base)
    for post_hoc in (False, True):
        objective = sipat.salience_preserving(base, sipat.Masking(post_hoc=post_hoc))
        sparing, metrics = trained(objective, np.zeros_like(HARD))
        assert equal(plain, sparing)
        assert metrics["protected_area"] == 0
    assert not equal(plain, trained(objective, HARD)[0])


@over_bases
def test_training_with_a_map_of_one_is_training_on_clean_images(base):
    untouched = base._replace(perturb=lambda context, images, labels: (images, context.extra, {}))
    sparing, metrics = trained(sipat.salience_preserving(base), np.ones_like(HARD))
    assert equal(sparing, trained(untouched)[0])
    assert metrics["protected_area"] == 1


def test_awp_goes_around_either_side():
    inner = sipat.salience_preserving(with_awp(adversarial(ATTACK), 0.01))
    outer = with_awp(sipat.salience_preserving(adversarial(ATTACK)), 0.01)
    assert equal(trained(inner, HARD)[0], trained(outer, HARD)[0])


def seen_by(objective, maps, step=0, augment=None, **options):
    """The mask that the attack is given in training step `step`."""
    masks = []

    def perturb(context, images, labels):
        jax.debug.callback(lambda mask: masks.append(np.asarray(mask)), context.mask)
        return images, context.extra, {}

    base = adversarial(ATTACK)._replace(perturb=perturb)
    optimizer = sgd(0.0)
    run = train_step(NET, optimizer, objective(base, **options), augment=augment)
    state = create_state(NET, optimizer, jax.random.key(1), SHAPE)
    jax.jit(run)(state._replace(step=jnp.int32(step)), batch_with(maps))
    jax.effects_barrier()
    return masks[0]


sparing = sipat.salience_preserving


def test_the_mask_moves_with_its_image():
    images = []

    def augment(keys, x, maps):
        moved, maps = data.compose(partial(data.pad_crop, pad=1), data.flip)(keys, x, maps)
        jax.debug.callback(lambda x: images.append(np.asarray(x)), moved)
        return moved, maps

    painted = (IMAGES[..., :1] > 0.5).astype(np.float32)
    mask = seen_by(sparing, painted, augment=augment)
    np.testing.assert_array_equal(mask, 1 - (images[0][..., :1] > 0.5))
    assert (mask != 1 - painted).any()


def test_the_protected_area_follows_number_class_and_step():
    share = lambda mask: (1 - mask).mean((1, 2, 3))  # noqa: E731
    np.testing.assert_allclose(share(seen_by(sparing, SOFT, area=0.25)), 0.25)
    per_class = jnp.asarray([0.1, 0.5, 0.9])
    mask = seen_by(sparing, SOFT, area=per_class)
    np.testing.assert_allclose(share(mask), np.asarray(per_class)[LABELS], atol=1e-6)
    schedule = optax.linear_schedule(0.5, 0.1, 10)
    for step, expected in ((0, 0.5), (5, 0.3), (20, 0.1)):
        mask = seen_by(sparing, SOFT, step, area=schedule)
        np.testing.assert_allclose(share(mask), expected, atol=1e-6)


def test_a_soft_area_is_the_mean_of_the_map():
    mask = seen_by(sparing, SOFT, masking=sipat.Masking(mode="soft"), area=0.3)
    np.testing.assert_allclose((1 - mask).mean((1, 2, 3)), 0.3, atol=0.02)
    assert len(np.unique(mask)) > 10


def test_examples_without_annotation_are_not_protected():
    scores = np.where(np.arange(BATCH)[:, None, None, None] < 3, 0, SOFT).astype(np.float32)
    mask = seen_by(sparing, scores, area=0.5)
    np.testing.assert_array_equal(mask[:3], 1)
    np.testing.assert_allclose(mask[3:].mean((1, 2, 3)), 0.5)


def test_nothing_is_protected_during_the_warm_up():
    part = sipat.preset("part").masking
    np.testing.assert_array_equal(seen_by(sparing, HARD, 4, masking=part, warmup_steps=5), 1)
    mask = seen_by(sparing, HARD, 5, masking=part, warmup_steps=5)
    np.testing.assert_allclose(mask, np.where(HARD == 1, 1, 7 / 8), rtol=1e-6)


def test_a_source_asks_the_current_model():
    scores = salience.gradient(
        lambda x: logits_of({"w1": W1, "w2": W2}, x), jnp.asarray(IMAGES), jnp.asarray(LABELS)
    )
    mask = seen_by(sparing, None, source=salience.gradient, area=0.25)
    np.testing.assert_array_equal(mask, 1 - salience.top_fraction(scores, 0.25))


@pytest.mark.parametrize("mapping", ["shard_map", "jit"])
def test_devices_train_what_one_trains(mapping):
    source = partial(salience.smooth_grad, samples=2)
    objective = sparing(trades(ATTACK), source=source, area=0.3)
    params, metrics = trained(objective)
    others, other_metrics = trained(objective, mapping=mapping)
    chex.assert_trees_all_close(params, others, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["protected_area"], 0.3, rtol=1e-5)
    np.testing.assert_allclose(other_metrics["protected_area"], 0.3, rtol=1e-5)


def test_a_batch_without_salience_is_refused():
    with pytest.raises(ValueError, match='batch must have the column "salience"'):
        trained(sparing(adversarial(ATTACK)))
    with pytest.raises(ValueError, match=r"salience must have shape \(8, 4, 5, 1\)"):
        trained(sparing(adversarial(ATTACK)), HARD[:, :2])


def test_noisy_copies_cannot_be_masked_afterwards():
    objective = sparing(smooth_adv(ATTACK, 0.1), sipat.Masking(post_hoc=True))
    with pytest.raises(ValueError, match=r"post_hoc needs x_adv of shape \(8, 4, 5, 2\)"):
        trained(objective, HARD)


def test_settings_of_the_objective_out_of_range_are_refused():
    with pytest.raises(ValueError, match="warmup_steps must be >= 0, got -1"):
        sparing(adversarial(ATTACK), warmup_steps=-1)
    with pytest.raises(ValueError, match=r"area must be in \[0, 1\], got 2"):
        sparing(adversarial(ATTACK), area=2.0)
    with pytest.raises(ValueError, match=r"area must be in \[0, 1\], got 1.5"):
        sparing(adversarial(ATTACK), area=[0.5, 1.5])


# Presets


@pytest.mark.parametrize("name", sipat.PRESETS)
def test_presets_train(name):
    setting = sipat.preset(name)
    optimizer = setting.optimizer(steps_per_epoch=2)
    step = train_step(NET, optimizer, setting.objective(2))
    state = create_state(NET, optimizer, jax.random.key(1), SHAPE)
    state, metrics = jax.jit(step)(state, batch_with(HARD))
    assert np.isfinite(float(metrics["loss"]))
    expected = 0 if setting.refresh_after else HARD.mean()
    np.testing.assert_allclose(metrics["protected_area"], expected, rtol=1e-5)


def test_the_snapshots_learning_rate_falls_by_a_quarter_every_ten_epochs():
    optimizer = sipat.preset("sip_at_2023_11").optimizer(steps_per_epoch=3)
    params = {"w": jnp.ones(())}
    state, rates = optimizer.init(params), []
    for _ in range(61):
        updates, state = optimizer.update({"w": jnp.ones(()) - 1e-6}, state, params)
        rates.append(-float(updates["w"]))
    # From the 20th step on momentum has all but settled at ten times the rate.
    np.testing.assert_allclose(rates[29] / (1 - 0.9**30), 1.0, rtol=1e-4)
    np.testing.assert_allclose(rates[0], 0.1, rtol=1e-5)
    np.testing.assert_allclose(rates[59] / rates[29], 0.75, rtol=0.05)


def test_an_unknown_preset_is_refused():
    with pytest.raises(
        ValueError, match="name must be one of sip_at_2023_06, sip_at_2023_11, part"
    ):
        sipat.preset("sip_at")


# Maps made anew


def refreshed(directory, epochs, made, **options):
    optimizer = sgd(0.1)
    step = train_step(NET, optimizer, sparing(adversarial(ATTACK)))
    state = parallel.create(
        lambda key: create_state(NET, optimizer, key, SHAPE), parallel.data_mesh(1), KEY
    )
    dataset = data.Dataset(IMAGES, LABELS, np.arange(BATCH, dtype=np.int32), ("a", "b", "c"))

    def refresh(variables, dataset):
        scores = salience.compute(
            salience.gradient, NET.apply, variables, dataset.images, dataset.labels
        )
        maps = np.asarray(salience.top_fraction(scores, 0.3))
        made.append(maps)
        return maps

    return sipat.fit_refreshed(
        step,
        state,
        dataset,
        refresh,
        epochs=epochs,
        directory=directory,
        batch_size=4,
        mesh=parallel.data_mesh(1),
        progress=False,
        **options,
    )


def test_maps_are_made_anew_every_round_and_a_resumed_run_ends_the_same(tmp_path):
    made = []
    whole = refreshed(tmp_path / "whole", 5, made, every=2, warmup=1)
    assert len(made) == 2  # at epochs 1 and 3
    assert (made[0] != made[1]).any()
    refreshed(tmp_path / "parts", 3, [], every=2, warmup=1)
    parts = refreshed(tmp_path / "parts", 5, [], every=2, warmup=1)
    assert equal(whole.variables, parts.variables)
    assert int(whole.state.step) == 10


def test_training_in_rounds_with_fixed_maps_is_training(tmp_path):
    optimizer = sgd(0.1)
    step = train_step(NET, optimizer, sparing(adversarial(ATTACK)))
    mesh = parallel.data_mesh(1)
    indices = np.arange(BATCH, dtype=np.int32)
    dataset = data.Dataset(IMAGES, LABELS, indices, ("a", "b", "c"), HARD)
    begin = lambda: parallel.create(  # noqa: E731
        lambda key: create_state(NET, optimizer, key, SHAPE), mesh, KEY
    )
    options = {"epochs": 3, "batch_size": 4, "mesh": mesh, "progress": False}
    plain = fit(step, begin(), dataset, **options)
    rounds = sipat.fit_refreshed(
        step, begin(), dataset, lambda variables, dataset: HARD, directory=tmp_path, **options
    )
    assert equal(plain.variables, rounds.variables)


def test_rounds_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"every must be >= 1 and warmup in \[0, 3\]"):
        refreshed(tmp_path, 3, [], every=0)
    with pytest.raises(ValueError, match=r"every must be >= 1 and warmup in \[0, 3\]"):
        refreshed(tmp_path, 3, [], warmup=4)


# Regions


def test_regions_are_attacked_by_themselves():
    variables = NET.init(None, SHAPE)
    attack = jr.linf_pgd(0.3, steps=5)
    options = {"attack": attack, "key": KEY, "batch_size": 3}
    arguments = (NET.apply, variables, IMAGES, LABELS)
    clean = evaluation.correct(*arguments)
    everywhere = evaluation.correct(*arguments, **options)
    salient = sipat.salience_only_correct(*arguments, HARD, **options)
    background = sipat.background_only_correct(*arguments, HARD, **options)
    assert everywhere.sum() <= min(salient.sum(), background.sum())
    for region, ones in ((salient, sipat.salience_only_correct), (background, None)):
        assert not (region & ~clean).any()
        function = ones or sipat.background_only_correct
        nothing = np.zeros_like(HARD) if ones else np.ones_like(HARD)
        np.testing.assert_array_equal(function(*arguments, nothing, **options), clean)
        np.testing.assert_array_equal(function(*arguments, 1 - nothing, **options), everywhere)
    with pytest.raises(ValueError, match="salience must have shape"):
        sipat.salience_only_correct(*arguments, HARD[:, :2], **options)
    with pytest.raises(ValueError, match=r"mask must be \[n, h, w, 1\]"):
        evaluation.correct(*arguments, mask=HARD[:, :2], **options)


def test_rows_that_need_peoples_maps_are_left_out_where_there_are_none():
    config = PRESETS["paper"]
    human = {name for name, method in config.methods.items() if method.source == "human"}
    asked = {(key["dataset"], key["method"]) for key in experiment.keys(config)}
    assert human
    for dataset in ("cifar10", "cifar100"):
        assert {name for where, name in asked if where == dataset} == set(config.methods) - human
    assert {name for where, name in asked if where == "cub200"} == set(config.methods)
