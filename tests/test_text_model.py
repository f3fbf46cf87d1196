"""The text transformer against a slow one in numpy; what its mask hides; how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import models
from jaxrobust.models.text import end_position
from jaxrobust.models.vit import Attention

SIZE = {"vocabulary": 12, "projection": 3, "length": 6, "width": 8, "depth": 2, "heads": 2}
END = 11
ENCODER = models.text_encoder(**SIZE)
VARIABLES = ENCODER.init(jax.random.key(0), (6,))
# Larger than they start, so that every part shows in the output.
LOUD = jax.tree.map(lambda a: a + 0.5 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), VARIABLES)
TOKENS = np.array([[10, 3, 4, END, 0, 0], [10, 1, 2, 3, 4, END], [10, END, 0, 0, 0, 0]], np.int32)
APPLY = jax.jit(ENCODER.apply, static_argnames="taps")


def reference(params, tokens, act):
    """One text at a time, one head at a time, one query at a time, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, q):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * q["scale"] + q["bias"]

    def dense(x, q):
        return x @ q["kernel"] + q["bias"]

    def attention(x, q):
        out = np.zeros_like(x)
        query, key, value = np.split(dense(x, q["qkv"]), 3, axis=1)
        for lo in (0, 4):
            head = slice(lo, lo + 4)
            for i in range(len(x)):
                seen = slice(0, i + 1)
                scores = np.exp(key[seen, head] @ query[i, head] / 2.0)
                out[i, head] = scores / scores.sum() @ value[seen, head]
        return dense(out, q["proj"])

    rows = []
    for row in tokens:
        x = p["token_embed"][row] + p["pos_embed"][: len(row)]
        for block in (p["blocks"]["0"], p["blocks"]["1"]):
            x = x + attention(norm(x, block["norm1"]), block["attn"])
            y = act(dense(norm(x, block["norm2"]), block["mlp"]["fc1"]))
            x = x + dense(y, block["mlp"]["fc2"])
        rows.append(norm(x, p["norm"])[list(row).index(END)] @ p["proj"])
    return np.stack(rows)


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def tanh_free_gelu(x):
    return x * np.vectorize(lambda v: 0.5 * (1 + float(jax.scipy.special.erf(v / 2**0.5))))(x)


@pytest.mark.parametrize(
    ("name", "act"), [("quick_gelu", quick_gelu), ("gelu", tanh_free_gelu)]
)  # fmt: skip
def test_it_equals_a_slow_transformer_in_numpy(name, act):
    encoder = models.text_encoder(**SIZE, activation=name)
    expected = reference(LOUD["params"], TOKENS, act)
    found = jax.jit(encoder.apply)(LOUD, TOKENS)
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_token_behind_the_end_changes_nothing():
    other = TOKENS.copy()
    other[0, 4:], other[2, 3:] = 7, 9
    np.testing.assert_array_equal(APPLY(LOUD, other), APPLY(LOUD, TOKENS))
    # While one before it does, in every text.
    other = TOKENS.copy()
    other[:, 0] = 5
    assert (np.abs(APPLY(LOUD, other) - APPLY(LOUD, TOKENS)).max(1) > 1e-3).all()


def test_no_gradient_comes_from_behind_the_end():
    def first(embedding):
        params = {**LOUD["params"], "token_embed": embedding}
        return ENCODER.apply({"params": params}, np.array([[10, 3, END, 7, 8, 9]]))[0, 0]

    grad = np.abs(jax.jit(jax.grad(first))(LOUD["params"]["token_embed"])).max(1)
    assert set(np.flatnonzero(grad)) == {10, 3, END}


def test_the_length_of_the_padding_changes_nothing():
    short = APPLY(LOUD, TOKENS[[0, 2], :4])
    np.testing.assert_allclose(short, APPLY(LOUD, TOKENS)[jnp.array([0, 2])], rtol=1e-6, atol=1e-6)


def test_attention_maps_are_lower_triangular_with_rows_that_sum_to_one():
    maps = APPLY(LOUD, TOKENS, taps=("blocks.1.attn.maps",))[1]["blocks.1.attn.maps"]
    assert maps.shape == (3, 2, 6, 6)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-6)
    assert not np.triu(maps, 1).any()
    assert (maps[..., 5, :] > 0).all()


def test_attention_without_the_flag_sees_everything():
    x = jax.random.normal(jax.random.key(1), (1, 4, 8))
    layers = [Attention(2, causal=causal) for causal in (False, True)]
    variables = layers[0].init(jax.random.key(0), x)
    whole, causal = (layer.apply(variables, x) for layer in layers)
    # The last token sees all others with the mask too, the first only itself.
    np.testing.assert_allclose(whole[:, 3], causal[:, 3], rtol=1e-6, atol=1e-6)
    assert np.abs(whole[:, 0] - causal[:, 0]).max() > 1e-3


def test_the_end_is_the_largest_id_or_the_one_that_is_named():
    tokens = jnp.array([[1, 9, 2, 9, 0], [1, 5, 2, 3, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(end_position(tokens), [1, 1, 0])
    np.testing.assert_array_equal(end_position(tokens, 2), [2, 2, 4])
    # Read at the 2, what stands behind it, the largest id too, is nothing.
    named = jax.jit(models.text_encoder(**SIZE, end=2).apply)
    a, b = (named(LOUD, np.array([[10, 3, 2, last]])) for last in (END, 0))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - APPLY(LOUD, np.array([[10, 3, 2, END]]))).max() > 1e-3


def test_an_id_that_the_vocabulary_lacks_shows():
    out = np.asarray(APPLY(LOUD, np.array([[10, 12, END], [10, 3, END]])))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_weights_start_as_clips_own():
    width, depth = 64, 3
    encoder = models.text_encoder(
        vocabulary=500, projection=32, length=40, width=width, depth=depth, heads=1
    )
    params = encoder.init(jax.random.key(0), (40,))["params"]
    block = params["blocks"]["2"]
    expected = {
        "token_embed": (params["token_embed"], 0.02),
        "pos_embed": (params["pos_embed"], 0.01),
        "proj": (params["proj"], width**-0.5),
        "attention's input": (block["attn"]["qkv"]["kernel"], width**-0.5),
        "attention's output": (block["attn"]["proj"]["kernel"], (2 * depth * width) ** -0.5),
        "fc1": (block["mlp"]["fc1"]["kernel"], (2 * width) ** -0.5),
        "fc2": (block["mlp"]["fc2"]["kernel"], (2 * depth * width) ** -0.5),
    }
    for name, (array, std) in expected.items():
        # A standard deviation of n draws is off by 1 / sqrt(2 n); five of those.
        np.testing.assert_allclose(array.std(), std, rtol=5 / (2 * array.size) ** 0.5, err_msg=name)
        assert abs(float(array.mean())) < 5 * std / array.size**0.5, name
    assert not block["attn"]["qkv"]["bias"].any()
    bias = block["mlp"]["fc1"]["bias"]
    assert 0.8 / 8 < np.abs(bias).max() <= 1 / 8


def test_bfloat16_is_near_float32_and_parameters_stay():
    train = jax.jit(ENCODER.train, static_argnames="dtype")
    fine, _ = train(VARIABLES, TOKENS, dtype=None)
    coarse, stats = train(VARIABLES, TOKENS, dtype=jnp.bfloat16)
    assert coarse.dtype == jnp.float32
    assert stats == {}
    scale = np.abs(fine).max()
    assert 0 < np.abs(coarse - fine).max() < 0.05 * scale
    np.testing.assert_array_equal(fine, APPLY(VARIABLES, TOKENS))


def test_remat_changes_no_gradient():
    again = models.text_encoder(**SIZE, remat=True)
    grad = lambda e: jax.jit(jax.grad(lambda v: e.apply(v, TOKENS)[:, 0].sum()))(LOUD)  # noqa: E731
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        grad(ENCODER), grad(again),
    )  # fmt: skip


def test_it_can_be_built_again():
    again = models.build(**ENCODER.config)
    assert again.config == ENCODER.config
    np.testing.assert_array_equal(jax.jit(again.apply)(LOUD, TOKENS), APPLY(LOUD, TOKENS))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("width must be a multiple of heads = 3, got 8",
         lambda: models.text_encoder(**{**SIZE, "heads": 3})),
        ("vocabulary must be an integer >= 1",
         lambda: models.text_encoder(**{**SIZE, "vocabulary": 0})),
        ("activation must be one of", lambda: models.text_encoder(**SIZE, activation="swish")),
        ("end must be an id below vocabulary = 12, got 12",
         lambda: models.text_encoder(**SIZE, end=12)),
        ("norm_eps must be > 0", lambda: models.text_encoder(**SIZE, norm_eps=0.0)),
        ("mlp_ratio must be", lambda: models.text_encoder(**SIZE, mlp_ratio=0.01)),
        ("tokens must have at most 6 columns, got 7",
         lambda: ENCODER.apply(VARIABLES, np.zeros((1, 7), np.int32))),
        ("tokens must be integer ids, got float32",
         lambda: ENCODER.apply(VARIABLES, np.zeros((1, 6), np.float32))),
        (r"tokens must be \[b, t\], got shape \(6,\)",
         lambda: ENCODER.apply(VARIABLES, np.zeros(6, np.int32))),
        (r"shape must be \(t,\), integers > 0, got \(0,\)",
         lambda: ENCODER.init(jax.random.key(0), (0,))),
        ("taps must be among.*norm", lambda: ENCODER.apply(VARIABLES, TOKENS, taps=("head",))),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()
