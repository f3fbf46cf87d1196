"""The dual encoder: one sphere, gradients to both towers, batch statistics, zero-shot."""

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrobust import losses, models
from jaxrobust.attacks import linf_pgd
from jaxrobust.models.clip_resnet import halve
from jaxrobust.parallel import data_mesh

KEY = jax.random.key(0)
TEXT = {"vocabulary": 12, "dim": 6, "length": 5, "width": 8, "depth": 1, "heads": 2}
TOWERS = {
    "vit": models.vit(8, 8, 1, 2, classes=None),
    "resnet": models.clip_resnet((1, 1), 4, projection=6, heads=2),
    "cnn": models.small_cnn(channels=(4, 8), dense=(), classes=6, norm="group"),
}
JOINED = {"vit": True, "resnet": False, "cnn": False}  # whether Clip's own projection is needed
X = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
TOKENS = jnp.array([[10, i % 9 + 1, i // 2 + 1, 11, 0] for i in range(8)], jnp.int32)
CNN = models.clip(TOWERS["cnn"], projection=False, **TEXT)
CNN_VARIABLES = CNN.init(KEY, (16, 16, 3))
IMAGES, TEXTS = (jax.jit(encode, static_argnames="taps") for encode in CNN[1:3])


@functools.cache
def made(name):
    clip = models.clip(TOWERS[name], projection=JOINED[name], **TEXT)
    return clip, clip.init(KEY, (16, 16, 3))


@pytest.mark.parametrize("name", TOWERS)
def test_both_towers_end_on_one_sphere_and_learn(name):
    clip, variables = made(name)
    assert set(variables) == {"params", "batch_stats"}
    assert set(variables["params"]) - {"projection"} == {"image", "text", "logit_scale"}
    assert ("projection" in variables["params"]) == JOINED[name]
    assert set(variables["batch_stats"]) == ({"image"} if name == "resnet" else set())

    @jax.jit
    @jax.value_and_grad
    def step(params):
        held = {**variables, "params": params}
        image, text, stats = clip.train(held, X, TOKENS[:5])
        assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
        assert image.shape == (8, 6)
        assert text.shape == (5, 6)
        lengths = jnp.concatenate([image, text])
        scale = jnp.exp(params["logit_scale"])
        nearest = losses.cross_entropy(scale * image[:5] @ text.T, jnp.arange(5)).sum()
        return nearest + 0 * jnp.abs(jnp.linalg.norm(lengths, axis=1) - 1).sum()

    params = variables["params"]
    value, grads = step(params)
    for part in params:
        norms = [float(jnp.linalg.norm(g)) for g in jax.tree.leaves(grads[part])]
        assert np.isfinite(norms).all(), part
        assert max(norms) > 1e-5, part
    # To first order a hundredth of the loss, whatever the tower's scale is.
    size = 0.01 * value / sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
    shrunk = jax.tree.map(lambda p, g: p - size * g, params, grads)
    assert step(shrunk)[0] < value


def test_embeddings_are_unit_rows_of_the_towers_own_outputs():
    clip, variables = made("vit")
    params = variables["params"]
    features = jax.jit(TOWERS["vit"].apply)({"params": params["image"]}, X)
    image = np.asarray(features @ params["projection"])
    found = jax.jit(clip.encode_image)(variables, X)
    unit = image / np.linalg.norm(image, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit, rtol=1e-5, atol=1e-6)
    options = {k: v for k, v in TEXT.items() if k != "dim"}
    encoder = models.text_encoder(**options, projection=6)
    text = jax.jit(encoder.apply)({"params": params["text"]}, TOKENS)
    np.testing.assert_allclose(
        TEXTS(variables, TOKENS), text / np.linalg.norm(text, axis=1, keepdims=True),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    assert TEXTS(variables, TOKENS).dtype == jnp.float32


def test_training_without_batch_statistics_is_inference():
    image, text, stats = jax.jit(CNN.train)(CNN_VARIABLES, X, TOKENS)
    np.testing.assert_allclose(image, IMAGES(CNN_VARIABLES, X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(text, TEXTS(CNN_VARIABLES, TOKENS), rtol=1e-5, atol=1e-6)
    assert stats == {}


def test_the_scale_starts_where_clips_does():
    scale = CNN_VARIABLES["params"]["logit_scale"]
    assert scale.shape == ()
    assert scale.dtype == jnp.float32
    assert math.exp(scale) == pytest.approx(1 / 0.07)
    assert math.exp(models.MAX_LOGIT_SCALE) == pytest.approx(100)


def test_taps_of_both_towers_can_be_read():
    clip, variables = made("resnet")
    encode = jax.jit(clip.encode_image, static_argnames="taps")
    rows, taps = encode(variables, X, taps=("attnpool.maps", "layer2"))
    assert rows.shape == (8, 6)
    # 16 pixels, halved by the stem twice and by the second stage once; and the mean of all.
    assert taps["attnpool.maps"].shape == (8, 2, 2 * 2 + 1)
    np.testing.assert_allclose(taps["attnpool.maps"].sum(-1), 1, rtol=1e-6)
    assert taps["layer2"].shape == (8, 2, 2, 32)
    rows, taps = TEXTS(variables, TOKENS, taps=("features",))
    np.testing.assert_allclose(losses.unit_rows(taps["features"]), rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_batch_statistics_are_those_of_the_global_batch(devices):
    clip, variables = made("resnet")
    whole = jax.jit(clip.train, static_argnames="dtype")(variables, X, TOKENS, dtype=None)
    spec = PartitionSpec
    mapped = jax.jit(
        jax.shard_map(
            lambda v, x, t: clip.train(v, x, t, axis_name="data"),
            mesh=data_mesh(devices),
            in_specs=(spec(), spec("data"), spec("data")),
            out_specs=(spec("data"), spec("data"), spec()),
            check_vma=True,
        )
    )(variables, X, TOKENS)
    chex.assert_trees_all_close(whole, mapped, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), variables["batch_stats"], whole[2]
    )
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_bfloat16_computes_and_float32_comes_back():
    clip, variables = made("resnet")
    train = jax.jit(clip.train, static_argnames="dtype")
    fine, coarse = (train(variables, X, TOKENS, dtype=dtype) for dtype in (None, jnp.bfloat16))
    for a, b in zip(jax.tree.leaves(fine), jax.tree.leaves(coarse), strict=True):
        assert a.dtype == b.dtype == jnp.float32
    for a, b in zip(fine[:2], coarse[:2], strict=True):
        assert 0 < np.abs(a - b).max() < 0.1
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_it_can_be_built_again_after_json(name):
    clip, variables = made(name)
    again = models.build(**json.loads(json.dumps(clip.config)))
    assert again.config == clip.config
    assert again == clip
    assert hash(again) == hash(clip)
    assert repr(again) == repr(clip)
    assert repr(clip).startswith("Clip(name='clip', tower=")
    found, expected = (jax.jit(c.encode_image)(variables, X) for c in (again, clip))
    np.testing.assert_array_equal(found, expected)
    like = jax.eval_shape(lambda: again.init(KEY, (16, 16, 3)))
    assert jax.tree.structure(like) == jax.tree.structure(variables)


def test_zero_shot_is_the_scaled_cosine_to_the_prototypes():
    prototypes = losses.unit_rows(jax.random.normal(KEY, (4, 6)))
    logits = models.zero_shot(CNN, prototypes)(CNN_VARIABLES, X)
    cosine = np.asarray(IMAGES(CNN_VARIABLES, X)) @ np.asarray(prototypes).T
    np.testing.assert_allclose(logits, cosine / 0.07, rtol=1e-5, atol=1e-5)
    held = {**CNN_VARIABLES, "prototypes": prototypes}
    np.testing.assert_allclose(models.zero_shot(CNN)(held, X), logits, rtol=1e-5, atol=1e-5)
    again, taps = models.zero_shot(CNN, prototypes)(CNN_VARIABLES, X, taps=("features",))
    np.testing.assert_array_equal(again, logits)
    assert taps["features"].ndim == 2


def test_equal_zero_shot_classifiers_are_compiled_once():
    traces = []

    def traced(variables, x, taps=()):
        traces.append(1)
        return CNN.encode_image(variables, x, taps)

    counted = CNN._replace(encode_image=traced)
    prototypes = np.eye(6)[:3]
    first, second = models.zero_shot(counted, prototypes), models.zero_shot(counted, prototypes * 1)
    assert first == second
    assert hash(first) == hash(second)
    run = jax.jit(lambda fn, v, x: fn(v, x), static_argnums=0)
    a, b = run(first, CNN_VARIABLES, X), run(second, CNN_VARIABLES, X)
    assert len(traces) == 1
    np.testing.assert_array_equal(a, b)
    other = models.zero_shot(counted, 2 * prototypes)
    assert other != first
    np.testing.assert_allclose(run(other, CNN_VARIABLES, X), 2 * a, rtol=1e-6)
    # As data, other prototypes cost nothing.
    free = models.zero_shot(counted)
    assert free == models.zero_shot(counted) != first
    for scale in (1, 2):
        run(free, {**CNN_VARIABLES, "prototypes": scale * prototypes}, X)
    assert len(traces) == 3
    assert first != CNN


def test_what_was_given_can_change_without_changing_the_classifier():
    prototypes = np.eye(6)[:3]
    classifier = models.zero_shot(CNN, prototypes)
    before = classifier(CNN_VARIABLES, X)
    prototypes[:] = 0
    np.testing.assert_array_equal(classifier(CNN_VARIABLES, X), before)


def test_an_attack_lowers_the_true_class():
    classifier = models.zero_shot(CNN, np.eye(6)[:3])
    labels = classifier(CNN_VARIABLES, X).argmax(1)
    loss = lambda x, v: losses.cross_entropy(jax.jit(classifier)(v, x), labels)  # noqa: E731
    x_adv = linf_pgd(eps=8 / 255, steps=3)(loss, X, KEY, args=(CNN_VARIABLES,))
    assert (loss(x_adv, CNN_VARIABLES) > loss(X, CNN_VARIABLES)).all()
    assert np.abs(x_adv - X).max() <= 8 / 255 + 1e-6


def test_a_resnet_block_starts_as_its_shortcut_and_halves_by_means():
    tower = models.clip_resnet((2, 1), 4, projection=6, norm="group")
    variables = tower.init(KEY, (16, 16, 3))
    apply = jax.jit(tower.apply, static_argnames="taps")
    _, taps = apply(variables, X, taps=("layer1.0", "layer1.1"))
    np.testing.assert_array_equal(taps["layer1.1"], taps["layer1.0"])
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    expected = [[2.5, 4.5], [10.5, 12.5]]
    np.testing.assert_array_equal(halve(x)[0, ..., 0], expected)


def test_a_resnet_starts_as_clips_own():
    tower = models.clip_resnet((1,), 16, projection=32, heads=2)
    params = tower.init(KEY, (32, 32, 3))["params"]
    pool, width = params["attnpool"], 64
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        kernel = pool[name]["kernel"]
        np.testing.assert_allclose(kernel.std(), width**-0.5, rtol=5 / (2 * kernel.size) ** 0.5)
        assert np.abs(pool[name]["bias"]).max() <= width**-0.5
    np.testing.assert_allclose(pool["positional_embedding"].std(), width**-0.5, rtol=0.05)
    assert pool["positional_embedding"].shape == (8 * 8 + 1, width)
    bound = (9 * 8) ** -0.5  # PyTorch's: 1 / sqrt(fan_in) of 3x3 over 8 channels
    assert 0.95 * bound < np.abs(params["conv2"]["kernel"]).max() <= bound
    assert not params["layer1"]["0"]["bn3"]["scale"].any()
    assert (params["layer1"]["0"]["bn2"]["scale"] == 1).all()


def test_published_sizes_have_their_published_counts():
    # Radford et al. 2021: RN50's image tower has 38,316,896 parameters, its text tower of width
    # 512 and 12 layers 63,690,240 with a joint space of 1024.
    tower = models.clip_resnet()
    clip = models.clip(tower, vocabulary=49408, dim=1024, projection=False)
    params = jax.eval_shape(lambda: clip.init(KEY, (224, 224, 3)))["params"]
    count = lambda tree: sum(math.prod(a.shape) for a in jax.tree.leaves(tree))  # noqa: E731
    assert count(params["image"]) == 38_316_896
    assert count(params) == 102_007_137


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("dim must be the width of the tower's output, 8, without a projection, got 6",
         lambda: models.clip(TOWERS["vit"], projection=False, **TEXT).init(KEY, (16, 16, 3))),
        ("tower must give one vector per image, got shape",
         lambda: models.clip(models.jpeg(), **TEXT).init(KEY, (16, 16, 3))),
        ("dim must be an integer >= 1", lambda: models.clip(TOWERS["vit"], **{**TEXT, "dim": 0})),
        ("heads", lambda: models.clip(TOWERS["vit"], **{**TEXT, "heads": 3})),
        ("key must be typed", lambda: CNN.init(jax.random.PRNGKey(0), (16, 16, 3))),
        (r"prototypes must be \[classes, 6\], got shape \(2, 5\)",
         lambda: models.zero_shot(CNN, np.zeros((2, 5)))),
        (r"prototypes must be \[classes, 6\], got shape \(6,\)",
         lambda: models.zero_shot(CNN, np.zeros(6))),
        ("stages must not be empty", lambda: models.clip_resnet(())),
        ("width be even", lambda: models.clip_resnet((1,), 5)),
        ("heads must divide the attention pool's width 16, got 3",
         lambda: models.clip_resnet((1,), 4, heads=3)),
        (r"stages\[1\] must be an integer >= 1", lambda: models.clip_resnet((1, 0))),
        ("sides divisible by 8",
         lambda: models.clip_resnet((1, 1), 4).init(KEY, (20, 16, 3))),
        ("x must be float", lambda: CNN.encode_image(CNN_VARIABLES, np.zeros((1, 16, 16, 3), int))),
        ("tokens must be integer ids", lambda: CNN.encode_text(CNN_VARIABLES, np.zeros((1, 5)))),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()
