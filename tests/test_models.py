"""Models as values: sizes, inference, normalisation, taps, remat, bfloat16, config, bad input."""

import dataclasses
import functools
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxrobust import models, parallel, training
from jaxrobust.models.bound import Bound
from jaxrobust.models.layers import GroupNorm
from jaxrobust.models.vit import hidden_width

KEY = jax.random.key(0)
# SiLU, so that finite differences meet no kink.
TINY_CONFIG = {"stages": (1, 1), "widths": (8, 16), "norm": "batch", "activation": "silu"}
TINY = models.preact_resnet(**TINY_CONFIG)
TINY_REMAT = models.preact_resnet(**TINY_CONFIG, remat=True)
VIT = {"patch": 4, "width": 8, "depth": 2, "heads": 2}


def images(*shape, seed=1):
    return jax.random.uniform(jax.random.key(seed), shape)


def parameter_count(model, shape):
    variables = jax.eval_shape(lambda key: model.init(key, shape), KEY)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("model", "shape", "published"),
    [
        (models.preact_resnet18(norm="batch"), (32, 32, 3), 11_172_170),
        (models.preact_resnet18(norm="batch", final_norm=False), (32, 32, 3), 11_171_146),
        (models.wide_resnet(28, 10, norm="batch"), (32, 32, 3), 36_479_194),
        (models.wide_resnet(34, 10, norm="batch"), (32, 32, 3), 46_160_474),
        (models.wide_resnet(34, 10, norm="group"), (32, 32, 3), 46_160_474),
        (models.vit_preset("B/16", classes=1000), (224, 224, 3), 86_567_656),
        (models.vit_preset("S/16", classes=1000), (224, 224, 3), 22_050_664),
        (models.small_cnn(), (28, 28, 1), 166_406),
    ],
)
def test_parameter_count_is_the_published_one(model, shape, published):
    assert parameter_count(model, shape) == published


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (models.small_cnn(), (8, 8, 1)),
        (models.small_cnn(channels=(4,), strides=(1,), dense=(), norm="group"), (9, 6, 2)),
        (TINY, (8, 8, 3)),
        (models.wide_resnet(10, 1, activation="silu"), (8, 8, 3)),
        (models.vit(**VIT, pool="mean"), (8, 12, 3)),
        (models.vit(**VIT), (8, 8, 1)),
    ],
)
def test_a_half_batch_gives_the_same_rows(model, shape):
    x = images(6, *shape)
    apply = jax.jit(model.apply)
    variables = model.init(KEY, shape)
    whole, half = apply(variables, x), apply(variables, x[3:])
    assert whole.shape == (6, 10)
    assert whole.dtype == jnp.float32
    assert float(jnp.std(whole, axis=0).max()) > 1e-4  # it does look at the image
    # Kernels may be blocked otherwise for another batch size: rounding, no more.
    np.testing.assert_allclose(whole[3:], half, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet", "wide_resnet", "vit"])
def test_normalisation_is_the_models_own_first_line(name):
    small = {
        "small_cnn": {},
        "preact_resnet": {"stages": [1], "widths": [8]},
        "wide_resnet": {"depth": 10, "width": 1},
        "vit": VIT,
    }[name]
    mean, std = (0.1, 0.5, 0.3), (0.2, 0.3, 0.4)
    plain, inside = models.build(name, **small), models.build(name, **small, mean=mean, std=std)
    x = images(2, 8, 8, 3)
    variables = plain.init(KEY, (8, 8, 3))
    outside = jax.jit(plain.apply)(variables, (x - jnp.array(mean)) / jnp.array(std))
    np.testing.assert_allclose(jax.jit(inside.apply)(variables, x), outside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        models.small_cnn(channels=(3, 4), strides=(1, 2), mean=(0.5,)),
        TINY_REMAT,
        models.wide_resnet(16, 2, activation="silu"),
        models.vit(**VIT, pool="mean"),
        models.vit_preset("Ti/16"),
        models.autoencoder((28, 28, 1), latent="spatial"),
        models.jpeg(50),
        models.total_variation(0.2, 3),
    ],
)
def test_a_model_is_rebuilt_from_its_config_through_json(model):
    again = models.build(**json.loads(json.dumps(model.config)))
    assert again.config == model.config
    assert type(again) is type(model)
    assert again == model
    assert hash(again) == hash(model)
    shapes = [
        jax.eval_shape(lambda key, m=m: m.init(key, m.config.get("shape", (32, 32, 3))), KEY)
        for m in (model, again)
    ]
    assert shapes[0] == shapes[1]


def test_the_same_model_built_again_compiles_nothing():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(apply, variables, x):
        traced.append(apply)
        return apply(variables, x)

    def run(**config):
        front = models.autoencoder((8, 8, 3), widths=(4,), latent_channels=2)
        model = models.defend(front, None, models.small_cnn(**config), 2)
        return model, logits(model.apply, model.init(KEY, (8, 8, 3)), images(2, 8, 8, 3))

    first, expected = run(channels=(3,), strides=(2,))
    init_traces = models.model._drawn._cache_size()
    again, found = run(channels=[3], strides=[2])
    assert again is not first
    assert again == first
    assert len(traced) == 1
    assert models.model._drawn._cache_size() == init_traces
    np.testing.assert_array_equal(found, expected)
    other, _ = run(channels=(4,), strides=(2,))
    assert other != first
    assert len(traced) == 2


@pytest.mark.parametrize(
    "other",
    [
        models.defend(None, None, models.jpeg(50)),
        models.defend(models.jpeg(50), 8, models.jpeg(50)),
        models.defend(models.jpeg(51), None, models.jpeg(50)),
        models.defend(models.jpeg(50), None, models.jpeg(50), frozen=()),
        models.defend(models.jpeg(50), None, models.jpeg(50), 2),
    ],
)
def test_what_is_composed_otherwise_is_another_model(other):
    assert models.defend(models.jpeg(50), None, models.jpeg(50)) != other


def test_a_module_without_a_hash_is_a_model_equal_to_itself_alone():
    class Shifted(nn.Module):
        shifts: list[float]

        def __call__(self, x):
            return x.mean((1, 2)) + self.shifts[0]

    class Named(nn.Module):
        shift: float

        def __call__(self, x):
            return x.mean((1, 2)) + self.shift

    model, again = (models.from_linen(Shifted([0.5])) for _ in range(2))
    logits = jax.jit(lambda apply, x: apply({}, x), static_argnums=0)
    x = images(2, 4, 4, 3)
    np.testing.assert_allclose(logits(model.apply, x), x.mean((1, 2)) + 0.5, rtol=1e-6)
    assert model == model
    assert model != again
    assert models.from_linen(Named(0.5)) == models.from_linen(Named(0.5))
    assert models.from_linen(Named(0.5)) != models.from_linen(Named(1.5))
    # 2 and 2.0 are equal, and what is computed with them may be of another type.
    assert models.from_linen(Named(2)) != models.from_linen(Named(2.0))
    assert models.from_linen(Named(2.0)) != models.from_linen(Named(np.float32(2)))


OUTSIDE = {"sign": 1.0}


class ReadsOutside(nn.Module):
    def __post_init__(self):
        self.sign = OUTSIDE["sign"]
        super().__post_init__()

    def __call__(self, x):
        return self.sign * x.mean((1, 2))


class HidesAField(nn.Module):
    sign: float = dataclasses.field(compare=False)

    def __call__(self, x):
        return self.sign * x.mean((1, 2))


class Holds(nn.Module):
    inner: nn.Module

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "module",
    [
        lambda sign: ReadsOutside(),
        HidesAField,
        lambda sign: Holds(ReadsOutside()),
        lambda sign: Holds(HidesAField(sign)),
        lambda sign: nn.Sequential((HidesAField(sign),)),
    ],
)
def test_modules_that_look_alike_to_flax_and_are_not_are_compiled_apart(module, monkeypatch):
    x = images(2, 4, 4, 3)
    logits = jax.jit(lambda apply, x: apply({}, x), static_argnums=0)
    for sign in (1.0, -1.0):
        monkeypatch.setitem(OUTSIDE, "sign", sign)
        found = logits(models.from_linen(module(sign)).apply, x)
        np.testing.assert_allclose(found, sign * x.mean((1, 2)), rtol=1e-6)


def test_a_module_inside_another_is_part_of_what_makes_it_equal():
    one, same, other = (models.from_linen(Holds(nn.Dense(n))) for n in (2, 2, 3))
    kernels = [models.from_linen(Holds(nn.Dense(2, name=name))) for name in ("a", "b")]
    # Flax makes Dense's own draw once, so that two of the same size are equal.
    assert one == same
    assert one != other
    assert kernels[0] != kernels[1]


def test_what_is_bound_to_what_is_bound_is_equal_whatever_was_asked_before():
    inner = Bound(max, 1)
    first = Bound(inner, 2)
    hash(inner)
    assert first == Bound(inner, 2)
    assert first() == 2


def test_numbers_of_numpy_are_a_configurations_own():
    class Scaled(nn.Module):
        count: Any
        mean: Any

        def __call__(self, x):
            return self.count * x.mean((1, 2))

    config = models.from_linen(Scaled(np.int64(3), tuple(np.float32([0.5, 0.25])))).config
    expected = {"name": "Scaled", "count": 3, "mean": [0.5, 0.25]}
    assert json.loads(json.dumps(config)) == expected


def test_a_configuration_tells_long_tables_apart():
    class Table(nn.Module):
        values: np.ndarray

        def __call__(self, x):
            return x.mean((1, 2)) * self.values.sum()

    table = np.zeros(3000)
    other = table.copy()
    other[1500] = 1
    made, again, differs = (
        models.from_linen(Table(values)).config for values in (table, table.copy(), other)
    )
    assert made == again != differs
    json.dumps(made)


def test_a_hidden_width_survives_being_told_as_a_ratio():
    # 896 * (1840 / 896) is 1839.99... in floating point.
    for width in (192, 768, 896, 1152, 1408, 1664):
        for hidden in range(1, 8 * width, 7):
            assert hidden_width(width, hidden / width) == hidden
    assert hidden_width(10, 2.67) == 26


def numpy_group_norm(x, size, eps=1e-5):
    out = np.empty_like(x)
    for i in range(x.shape[0]):
        for start in range(0, x.shape[-1], size):
            group = x[i, :, :, start : start + size]
            out[i, :, :, start : start + size] = (group - group.mean()) / np.sqrt(group.var() + eps)
    return out


@pytest.mark.parametrize(("channels", "size"), [(7, 7), (16, 16), (24, 8), (48, 16)])
def test_group_norm_equals_numpy(channels, size):
    layer = models.from_linen(GroupNorm())
    x = 100 + np.asarray(images(2, 3, 4, channels))
    out = layer.apply(layer.init(KEY, (3, 4, channels)), x)
    # At a mean of 100 float32 holds differences of 1e-5, in units of a spread of 0.3.
    np.testing.assert_allclose(out, numpy_group_norm(x.astype(np.float64), size), atol=1e-4)


def test_taps_are_what_is_inside():
    variables = TINY.init(KEY, (8, 8, 3))
    logits, taps = TINY.apply(variables, images(2, 8, 8, 3), taps=("layer1", "features", "linear"))
    assert taps["layer1"].shape == (2, 8, 8, 8)
    np.testing.assert_array_equal(taps["linear"], logits)
    dense = variables["params"]["linear"]
    np.testing.assert_allclose(
        taps["features"] @ dense["kernel"] + dense["bias"], logits, atol=1e-6
    )


def test_asking_for_taps_changes_no_logit():
    x, variables = images(2, 8, 8, 3), TINY.init(KEY, (8, 8, 3))
    np.testing.assert_array_equal(
        TINY.apply(variables, x), TINY.apply(variables, x, taps=("layer2.0.conv1",))[0]
    )


def test_attention_maps_are_a_tap_whose_rows_sum_to_one():
    model = models.vit(**VIT)
    _, taps = model.apply(
        model.init(KEY, (8, 8, 1)), images(2, 8, 8, 1), taps=("blocks.1.attn.maps",)
    )
    maps = taps["blocks.1.attn.maps"]
    assert maps.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("model", [TINY, TINY_REMAT], ids=["kept", "remat"])
def test_gradient_with_respect_to_a_perturbation_is_that_of_the_activation(model):
    variables = model.init(KEY, (8, 8, 3))
    x = images(2, 8, 8, 3)

    def third_logit(delta, name):
        return model.apply(variables, x, perturbations={name: delta})[:, 3].sum()

    # By hand: behind `features` there is only the last dense layer.
    by_hand = jnp.broadcast_to(variables["params"]["linear"]["kernel"][:, 3], (2, 16))
    got = jax.grad(third_logit)(jnp.zeros((2, 16)), "features")
    np.testing.assert_allclose(got, by_hand, atol=1e-6)
    # Inside a block, against a central difference along the gradient itself.
    run = jax.jit(third_logit, static_argnums=1)
    grad = jax.jit(jax.grad(third_logit), static_argnums=1)(jnp.zeros((2, 8, 8, 8)), "layer1.0.bn2")
    direction = grad / jnp.linalg.norm(grad)
    ends = [run(sign * 0.1 * direction, "layer1.0.bn2") for sign in (1, -1)]
    np.testing.assert_allclose(jnp.linalg.norm(grad), (ends[0] - ends[1]) / 0.2, rtol=0.01)


def test_a_perturbation_is_added_once():
    for model in (TINY, TINY_REMAT):
        variables, x = model.init(KEY, (8, 8, 3)), images(2, 8, 8, 3)
        for name in ("layer1", "layer1.0", "layer1.0.conv1"):
            _, before = model.apply(variables, x, taps=(name,))
            delta = {name: jnp.ones_like(before[name])}
            _, after = model.apply(variables, x, taps=(name,), perturbations=delta)
            np.testing.assert_allclose(after[name] - before[name], 1, atol=1e-5)


def test_remat_gives_the_same_loss_statistics_and_gradients():
    variables, x = TINY.init(KEY, (8, 8, 3)), images(4, 8, 8, 3)

    def loss(params, x, model):
        logits, batch_stats = model.train({**variables, "params": params}, x)
        return jnp.square(logits).sum(), batch_stats

    results = [
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)(
            variables["params"], x, _Static(model)
        )
        for model in (TINY, TINY_REMAT)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


class _Static:
    """A model hidden from jit's argument flattening."""

    def __init__(self, model):
        self.train = model.train


def test_bfloat16_training_is_close_to_float32_and_keeps_float32_outside():
    variables, x = TINY.init(KEY, (8, 8, 3)), images(8, 8, 8, 3)

    def loss(params, dtype):
        logits, batch_stats = TINY.train({**variables, "params": params}, x, dtype=dtype)
        log_probs = jax.nn.log_softmax(logits)
        return -log_probs[jnp.arange(8), jnp.arange(8)].mean(), (logits, batch_stats)

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    grads, (logits, stats) = run(variables["params"], jnp.bfloat16)
    grads32, (logits32, stats32) = run(variables["params"], None)
    assert {a.dtype for a in jax.tree.leaves((grads, logits, stats))} == {jnp.dtype("float32")}
    assert float(jnp.abs(logits - logits32).max()) > 0  # it did compute in another dtype
    # bfloat16 keeps 8 bits: a relative error of 2^-8 per layer, over six layers.
    np.testing.assert_allclose(logits, logits32, atol=0.03 * float(jnp.abs(logits32).max()))
    chex.assert_trees_all_close(stats, stats32, atol=0.02)
    flat, flat32 = (
        jnp.concatenate([a.ravel() for a in jax.tree.leaves(g)]) for g in (grads, grads32)
    )
    cosine = jnp.vdot(flat, flat32) / jnp.linalg.norm(flat) / jnp.linalg.norm(flat32)
    assert float(cosine) > 0.99


def test_the_position_embedding_tells_patches_apart():
    model = models.vit(**VIT)
    variables = model.init(KEY, (8, 8, 1))
    x = images(1, 8, 8, 1)
    swapped = jnp.concatenate([x[:, 4:], x[:, :4]], axis=1)
    apply = jax.jit(model.apply)
    assert float(jnp.abs(apply(variables, x) - apply(variables, swapped)).max()) > 1e-5
    zero = {"params": {**variables["params"], "pos_embed": jnp.zeros((1, 5, 8))}}
    np.testing.assert_allclose(apply(zero, x), apply(zero, swapped), atol=1e-6)


def test_an_ordinary_linen_module_becomes_a_model():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(3)(x.mean((1, 2)))

    model = models.from_linen(Plain())
    variables, x = model.init(KEY, (4, 4, 2)), images(5, 4, 4, 2)
    logits, taps = model.apply(variables, x, taps=("BatchNorm_0",))
    assert logits.shape == (5, 3)
    assert taps["BatchNorm_0"].shape == (5, 4, 4, 2)
    _, batch_stats = model.train(variables, x)
    np.testing.assert_allclose(
        batch_stats["BatchNorm_0"]["mean"], 0.01 * x.mean((0, 1, 2)), rtol=1e-4
    )


@pytest.mark.parametrize(("devices", "mapping"), [(1, "shard_map"), (1, "pmap"), (2, "jit")])
def test_an_ordinary_linen_module_trains(devices, mapping):
    state = run_plain(devices, mapping)
    alone = run_plain(1, "jit")
    chex.assert_trees_all_close(state, alone, atol=1e-6)


def run_plain(devices, mapping):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x).mean((1, 2)))

    model, mesh, optimizer = models.from_linen(Plain()), parallel.data_mesh(devices), optax.sgd(0.1)
    state = parallel.create(
        lambda: training.create_state(model, optimizer, jax.random.key(0), (4, 4, 2)), mesh
    )
    step = training.train_step(model, optimizer, training.standard())
    batch = {"image": images(4, 4, 4, 2), "label": np.int32([0, 1, 2, 0]), "index": np.arange(4)}
    run = parallel.data_parallel(step, mesh, mapping=mapping)
    state, _ = run(state, parallel.shard_batch(batch, mesh))
    return jax.device_get((state.params, state.batch_stats))


def test_an_ordinary_linen_module_with_statistics_is_refused_where_devices_would_differ():
    with pytest.raises(ValueError, match="trains on one device, or on several with mapping='jit'"):
        run_plain(2, "shard_map")


def test_a_linen_module_whose_train_has_no_default_becomes_a_model_too():
    class Required(nn.Module):
        rate: float = 0.0

        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dropout(self.rate, deterministic=not train)(x)
            return nn.Dense(3)(x.mean((1, 2)))

    x = images(5, 4, 4, 2)
    model = models.from_linen(Required())
    variables = model.init(KEY, (4, 4, 2))
    assert model.train(variables, x)[0].shape == (5, 3)
    noisy = models.from_linen(Required(rate=0.5))
    assert noisy.apply(variables, x).shape == (5, 3)
    with pytest.raises(ValueError, match="must not draw random numbers, Required does"):
        noisy.train(variables, x)


FLAT = {"params": {}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: TINY.apply(FLAT, np.zeros((2, 8, 8, 3), np.uint8)),
            r"x must be float in \[0, 1\]",
        ),
        (lambda: TINY.train(FLAT, np.zeros((2, 8, 8, 3), np.int32)), "got int32"),
        (lambda: TINY.apply(FLAT, np.zeros((8, 8, 3), np.float32)), r"got shape \(8, 8, 3\)"),
        (
            lambda: TINY.apply(FLAT, images(1, 8, 8, 3)),
            r'variables must be {"params": ...} of a \w+ for inputs of shape \(8, 8, 3\): Tried',
        ),
        (lambda: TINY.init(KEY, (8, 8)), r"shape must be \(h, w, c\)"),
        (lambda: TINY.init(KEY, (8, 0, 3)), r"shape must be \(h, w, c\)"),
        (lambda: TINY.apply(FLAT, images(1, 8, 8, 3), taps="layer1"), "taps must be a tuple"),
        (lambda: models.wide_resnet(29, 10), "depth must be 6 n"),
        (lambda: models.wide_resnet(28, 0), "width must be an integer >= 1, got 0"),
        (lambda: models.small_cnn(norm="layer"), "norm must be one of batch, group, none"),
        (lambda: models.small_cnn(activation="swish"), "activation must be one of relu"),
        (lambda: models.small_cnn(strides=(2,)), "strides must have 2 entries"),
        (lambda: models.small_cnn(std=(0.0,)), r"std must be finite numbers, > 0, .*got \(0.0,\)"),
        (lambda: models.small_cnn(std=(1.0, float("nan"))), "std must be finite numbers, > 0"),
        (lambda: models.small_cnn(mean=()), "mean must be finite numbers"),
        (lambda: models.vit(registers=-1), "registers must be an integer >= 0, got -1"),
        (lambda: models.vit(norm_eps=float("nan")), "norm_eps must be > 0 and finite, got nan"),
        (lambda: models.vit(mlp_ratio=float("nan")), "mlp_ratio must be >= 1 / width and finite"),
        (lambda: models.preact_resnet(widths=(8,)), "widths must have 4 entries"),
        (lambda: models.vit(width=10, heads=3), "width must be a multiple of heads"),
        (lambda: models.vit_preset("XL/16"), "size must be one of Ti, S, B, L"),
        (lambda: models.vit(**VIT).init(KEY, (9, 8, 3)), "divisible by patch = 4"),
        (lambda: models.build("resnet"), "name must be one of autoencoder"),
        (lambda: models.small_cnn(mean=(0.1, 0.2)).init(KEY, (8, 8, 3)), "mean must have 1 or 3"),
    ],
)
def test_bad_input_gives_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_tap_or_a_misshapen_perturbation_is_named():
    variables, x = TINY.init(KEY, (8, 8, 3)), images(2, 8, 8, 3)
    with pytest.raises(ValueError, match=r"taps must be among conv1, .*layer2.*; got block9"):
        TINY.apply(variables, x, taps=("layer1", "block9"))
    with pytest.raises(ValueError, match=r"perturbations must be among .*; got block9"):
        TINY.apply(variables, x, perturbations={"block9": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"must have shape \(2, 16\), got \(16,\)"):
        TINY.apply(variables, x, perturbations={"features": jnp.zeros(16)})
