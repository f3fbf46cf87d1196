"""Tests of the training step: one result on any devices, accumulation, EMA, bfloat16, one trace."""

import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust import attacks, data, models, parallel
from jaxrobust.training import (
    adversarial,
    create_state,
    guarded_n_fgsm,
    sgd,
    standard,
    trades,
    train_step,
    with_awp,
)

SHAPE, BATCH, CLASSES = (8, 8, 1), 16, 4
ATTACK = attacks.linf_pgd(0.1, steps=2)
CROP = functools.partial(data.pad_crop, pad=1)


def net(norm):
    return models.small_cnn(
        channels=(4,), strides=(2,), kernel=3, dense=(), classes=CLASSES, norm=norm
    )


PLAIN, BATCH_NORM = net("none"), net("batch")
FROZEN = sgd(0.0)
OPTIMIZER = sgd(0.1, weight_decay=1e-3)


def batch_of(seed):
    random = np.random.default_rng(seed)
    return {
        "image": random.random((BATCH, *SHAPE), np.float32),
        "label": random.integers(0, CLASSES, BATCH).astype(np.int32),
        "index": random.permutation(1000)[:BATCH].astype(np.int32),
    }


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    # The nets are tiny: nearly all of the time here is the compiler's.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def fresh_state(norm, optimizer=OPTIMIZER):
    model = {"none": PLAIN, "batch": BATCH_NORM}[norm]
    make = jax.jit(lambda key: create_state(model, optimizer, key, SHAPE, ema=True))
    return make(jax.random.key(0))


def run_steps(norm, objective, mapping=None, devices=1, *, optimizer=OPTIMIZER, **options):
    """(state, metrics of each step) after three steps; without a mapping, of plain `jit`."""
    model = options.pop("model", {"none": PLAIN, "batch": BATCH_NORM}[norm])
    step = train_step(model, optimizer, objective, ema_decay=0.5, **options)
    run = jax.jit(step)
    if mapping is not None:
        run = parallel.data_parallel(
            step, parallel.data_mesh(devices), mapping=mapping, donate=False
        )
    return after_three(run, fresh_state(norm, optimizer), batch_of)


def after_three(run, state, batches):
    history = []
    for seed in range(3):
        state, metrics = run(state, batches(seed))
        history.append(jax.tree.map(np.asarray, metrics))
    state = state._replace(key=jax.random.key_data(state.key))
    return jax.tree.map(np.asarray, state), history


def three_steps(name, mapping, mesh, local=lambda batch: batch):
    """A recipe's three steps from a state that was made on the mesh, each process's own rows."""
    norm, objective, options = RECIPES[name]
    model = {"none": PLAIN, "batch": BATCH_NORM}[norm]
    state = parallel.create(
        lambda key: create_state(model, OPTIMIZER, key, SHAPE, ema=True), mesh, jax.random.key(0)
    )
    step = train_step(model, OPTIMIZER, objective, ema_decay=0.5, **options)
    run = parallel.data_parallel(step, mesh, mapping=mapping)
    return after_three(run, state, lambda seed: parallel.shard_batch(local(batch_of(seed)), mesh))


def assert_close(tree, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), tree, other)


# ---- the same on any devices --------------------------------------------------------------------

RECIPES = {
    "batch_norm": ("batch", adversarial(ATTACK), {"augment": CROP}),
    "accumulate": ("none", adversarial(ATTACK), {"augment": CROP, "accumulate": 2}),
    "trades_awp": ("batch", with_awp(trades(ATTACK), 0.01), {}),
    # The forms that long attacks and accelerators use: one XLA loop inside the step.
    "fused": (
        "none",
        adversarial(attacks.linf_pgd(0.1, steps=2, momentum=0.9, start="none", loop="fused")),
        {},
    ),
}


@functools.cache
def on_one_device(name):
    norm, objective, options = RECIPES[name]
    return run_steps(norm, objective, **options)


EVERYWHERE = [
    *(("batch_norm", mapping, n) for mapping in parallel.MAPPINGS for n in (1, 2, 8)),
    ("accumulate", "shard_map", 8),
    ("accumulate", "jit", 8),
    ("trades_awp", "shard_map", 8),
    ("fused", "shard_map", 8),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mapping", "devices"), EVERYWHERE)
def test_three_steps_give_the_same_losses_and_state_on_any_devices(name, mapping, devices):
    state, history = three_steps(name, mapping, parallel.data_mesh(devices))
    expected_state, expected_history = on_one_device(name)
    assert_close(history, expected_history)
    assert_close(state, expected_state)
    # Something was learnt: else the comparison would say nothing.
    assert abs(history[0]["loss"] - history[2]["loss"]) > 1e-3
    assert state.step == 3


def test_noise_is_a_function_of_key_step_and_example_on_any_devices():
    seen = standard()._replace(
        perturb=lambda context, x, labels: (
            x,
            context.extra,
            {
                "noise": parallel.mean(
                    jax.vmap(jax.random.uniform)(context.keys).mean(), context.axis_name
                )
            },
        )
    )
    base = jax.random.split(jax.random.key(0))[1]
    expected = []
    for step in range(3):
        at_step = jax.random.fold_in(base, step)
        keys = [jax.random.fold_in(at_step, i) for i in batch_of(step)["index"]]
        draws = [float(jax.random.uniform(jax.random.fold_in(key, 1))) for key in keys]
        assert len(set(draws)) == BATCH
        expected.append(np.mean(draws))
    for mapping, devices in (("shard_map", 8), ("pmap", 2), ("jit", 8)):
        _, history = run_steps("none", seen, mapping, devices)
        np.testing.assert_allclose([m["noise"] for m in history], expected, rtol=1e-5)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_the_compilers_own_generators_give_the_same_run_on_any_devices(impl):
    step = train_step(PLAIN, OPTIMIZER, adversarial(attacks.n_fgsm(0.1)), augment=CROP)
    runs = []
    for devices in (1, 8):
        mesh = parallel.data_mesh(devices)
        state = parallel.create(
            lambda key: create_state(PLAIN, OPTIMIZER, key, SHAPE), mesh,
            jax.random.key(0, impl=impl),
        )  # fmt: skip
        run = parallel.data_parallel(step, mesh)
        batches = lambda seed, mesh=mesh: parallel.shard_batch(batch_of(seed), mesh)  # noqa: E731
        runs.append(after_three(run, state, batches))
    assert_close(*runs)


def test_a_metric_that_differs_between_devices_raises_when_traced():
    local = standard()._replace(perturb=lambda context, x, labels: (x, {}, {"max": x.max()}))
    with pytest.raises(ValueError, match="require replication"):
        run_steps("none", local, "shard_map", 8)


# ---- parts of a step ----------------------------------------------------------------------------


def test_batch_norm_moves_once_per_step_and_only_in_the_training_forward():
    state, _ = run_steps("batch", adversarial(ATTACK), optimizer=FROZEN)
    # At a learning rate of 0 the statistics are a function of the three adversarial batches alone.
    variables = BATCH_NORM.init(jax.random.split(jax.random.key(0))[0], SHAPE)
    params, stats = variables["params"], variables["batch_stats"]
    run_key = jax.random.split(jax.random.key(0))[1]

    @jax.jit
    def after(stats, batch, step):
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = fold(jax.random.fold_in(run_key, step), batch["index"])
        apply = lambda x: BATCH_NORM.apply({"params": params, "batch_stats": stats}, x)  # noqa: E731
        loss = lambda x: optax.losses.softmax_cross_entropy_with_integer_labels(  # noqa: E731
            apply(x), batch["label"]
        )
        x_adv = ATTACK(loss, batch["image"], jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
        return BATCH_NORM.train({"params": params, "batch_stats": stats}, x_adv)[1]

    for step in range(3):
        stats = after(stats, batch_of(step), step)
    assert_close(state.batch_stats, stats)
    assert not np.allclose(stats["bn1"]["mean"], variables["batch_stats"]["bn1"]["mean"])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_equal_the_whole_batch_without_batch_norm(accumulate):
    whole = run_steps("none", standard())
    parts = run_steps("none", standard(), accumulate=accumulate)
    assert_close(parts, whole, atol=1e-6)


def test_the_moving_average_equals_numpy():
    step = jax.jit(train_step(BATCH_NORM, sgd(0.5), standard(), ema_decay=0.9))
    state = create_state(BATCH_NORM, sgd(0.5), jax.random.key(0), SHAPE, ema=True)
    average = jax.tree.map(np.asarray, (state.params, state.batch_stats))
    for seed in range(3):
        state, _ = step(state, batch_of(seed))
        now = (state.params, state.batch_stats)
        average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * np.asarray(b), average, now)
    assert_close(state.ema, average, atol=1e-6)
    averaged = state.variables(averaged=True)
    assert_close((averaged["params"], averaged["batch_stats"]), average, atol=1e-6)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, averaged["params"]))
    assert moved > 1e-3


def test_bfloat16_trains_like_float32_while_the_attack_stays_float32():
    seen = []

    def apply(variables, x, *args):
        seen.append(("attack", x.dtype, {leaf.dtype for leaf in jax.tree.leaves(variables)}))
        return PLAIN.apply(variables, x, *args)

    def train(variables, x, *, axis_name=None, dtype=None):
        seen.append(("train", dtype))
        return PLAIN.train(variables, x, axis_name=axis_name, dtype=dtype)

    watched = PLAIN._replace(apply=apply, train=train)
    half, half_history = run_steps("none", adversarial(ATTACK), model=watched, dtype=jnp.bfloat16)
    full, full_history = run_steps("none", adversarial(ATTACK))
    attacked = [entry for entry in seen if entry[0] == "attack"]
    assert attacked
    assert set(map(str, attacked)) == {
        str(("attack", jnp.dtype("float32"), {jnp.dtype("float32")}))
    }
    assert ("train", jnp.bfloat16) in seen
    assert ("train", None) not in seen
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(half.params))
    difference = [a["loss"] - b["loss"] for a, b in zip(half_history, full_history, strict=True)]
    assert 0 < np.abs(difference).max() < 0.02
    assert_close(half.params, full.params, atol=0.02)


def test_the_network_in_an_attack_may_compute_in_bfloat16():
    half, half_history = run_steps("none", adversarial(ATTACK), attack_dtype=jnp.bfloat16)
    full, full_history = run_steps("none", adversarial(ATTACK))
    difference = [a["loss"] - b["loss"] for a, b in zip(half_history, full_history, strict=True)]
    assert 0 < np.abs(difference).max() < 0.02
    assert_close(half.params, full.params, atol=0.02)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(half.params))


def test_inference_in_bfloat16_is_float32_but_for_its_rounding():
    variables = BATCH_NORM.init(jax.random.key(0), SHAPE)
    x = jax.random.uniform(jax.random.key(1), (3, *SHAPE))
    half, full = (BATCH_NORM.apply(variables, x, dtype=dtype) for dtype in (jnp.bfloat16, None))
    assert half.dtype == full.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.03 * np.abs(full).max()


def test_the_state_is_arrays_only_and_no_buffer_is_held_twice():
    objective = guarded_n_fgsm(attacks.n_fgsm(0.1), ATTACK)
    optimizer = optax.adam(1e-3)
    make = functools.partial(
        create_state, BATCH_NORM, optimizer, shape=SHAPE, ema=True, extra=objective.extra
    )
    for state in (
        make(jax.random.key(0)),
        parallel.create(make, parallel.data_mesh(2), jax.random.key(0)),
    ):
        leaves = jax.tree.leaves(state)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        # Donating one buffer twice is an error.
        raw = [jax.random.key_data(x) if x.dtype == state.key.dtype else x for x in leaves]
        pointers = [x.addressable_data(0).unsafe_buffer_pointer() for x in raw]
        assert len(set(pointers)) == len(pointers)


def test_a_key_is_used_for_parameters_or_for_noise_and_never_for_both():
    state = create_state(PLAIN, sgd(0.1), jax.random.key(5), SHAPE)
    draw, run = jax.random.split(jax.random.key(5))
    assert_close(state.params, PLAIN.init(draw, SHAPE)["params"], atol=0)
    assert (jax.random.key_data(state.key) == jax.random.key_data(run)).all()


def test_an_epoch_with_a_schedule_of_eps_and_rate_is_one_trace():
    traces = []

    def apply(variables, x):
        traces.append(x.shape)
        return PLAIN.apply(variables, x)

    ramp = optax.linear_schedule(0.0, 1.0, 20)
    objective = adversarial(ATTACK, eps_schedule=ramp)
    optimizer = sgd(optax.cosine_decay_schedule(0.1, 20))
    step = train_step(PLAIN._replace(apply=apply), optimizer, objective)
    mesh = parallel.data_mesh(8)
    state = parallel.create(
        lambda key: create_state(PLAIN, optimizer, key, SHAPE), mesh, jax.random.key(0)
    )
    run = parallel.data_parallel(step, mesh)
    state, _ = run(state, parallel.shard_batch(batch_of(0), mesh))
    after_one = len(traces)
    for seed in range(1, 20):
        state, _ = run(state, parallel.shard_batch(batch_of(seed), mesh))
    # At most one per step of the unrolled attack, and all of them in the first call.
    assert 0 < len(traces) == after_one <= ATTACK.steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be a whole number >= 1, got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_step(PLAIN, sgd(0.1), standard(), **options)


def test_accumulation_holds_one_gradient_and_averages_once():
    wide = models.small_cnn(
        channels=(64, 64), strides=(2, 2), kernel=3, dense=(), classes=CLASSES, norm="none"
    )
    state = jax.eval_shape(lambda: create_state(wide, FROZEN, jax.random.key(0), SHAPE))
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))

    def compiled(parts):
        step = train_step(wide, FROZEN, standard(), accumulate=parts)
        mapped = parallel.data_parallel(step, parallel.data_mesh(8), donate=False)
        batch = {name: np.repeat(column, 8, 0) for name, column in batch_of(0).items()}
        return jax.jit(mapped).lower(state, batch).compile()

    few, many = compiled(2), compiled(16)
    temporary = [one.memory_analysis().temp_size_in_bytes for one in (few, many)]
    assert temporary[1] < temporary[0] + weights
    reductions = [one.as_text().count(" all-reduce(") for one in (compiled(1), few, many)]
    assert 0 < reductions[0] == reductions[1] == reductions[2]


def test_an_attack_is_no_objective():
    with pytest.raises(TypeError, match=r"such as training.adversarial\(attack\), got PGD"):
        inspect.unwrap(train_step)(PLAIN, sgd(0.1), ATTACK)


def test_a_step_says_what_it_was_made_of():
    objective = with_awp(trades(ATTACK, 5.0), 0.01)
    config = train_step(PLAIN, sgd(0.1), objective, augment=CROP, dtype=jnp.bfloat16).config
    assert config["attack_dtype"] is None
    assert config == json.loads(json.dumps(config))
    assert config["model"]["name"] == "small_cnn"
    assert config["objective"]["gamma"] == 0.01
    inner = config["objective"]["objective"]
    assert (inner["name"], inner["beta"], inner["attack"]["eps"]) == ("trades", 5.0, ATTACK.eps)
    assert config["augment"] == {"function": "pad_crop", "arguments": [], "pad": 1}
    assert config["dtype"] == "bfloat16"


def test_what_the_state_lacks_is_refused_when_traced():
    state = create_state(PLAIN, sgd(0.1), jax.random.key(0), SHAPE)
    kept = create_state(PLAIN, sgd(0.1), jax.random.key(0), SHAPE, ema=True)
    with pytest.raises(ValueError, match=r"a state with an EMA needs train_step.*ema_decay"):
        jax.eval_shape(train_step(PLAIN, sgd(0.1), standard()), kept, batch_of(0))
    guarded = guarded_n_fgsm(attacks.n_fgsm(0.1), ATTACK)
    with pytest.raises(ValueError, match=r"extra must be the objective's.*rescue_until"):
        jax.eval_shape(train_step(PLAIN, sgd(0.1), guarded), state, batch_of(0))
    with pytest.raises(ValueError, match="ema_decay needs a state with an EMA"):
        jax.eval_shape(train_step(PLAIN, sgd(0.1), standard(), ema_decay=0.5), state, batch_of(0))
    with pytest.raises(ValueError, match="averaged=True needs a state with an EMA"):
        state.variables(averaged=True)
    with pytest.raises(ValueError, match="accumulate must divide the 16 examples"):
        jax.eval_shape(train_step(PLAIN, sgd(0.1), standard(), accumulate=3), state, batch_of(0))
