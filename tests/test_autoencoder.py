"""The convolutional auto-encoder: shapes, range, gradients that never die, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import flops, models
from jaxrobust.models.autoencoder import _unfold, soft_unit

KEY = jax.random.key(0)
SMALL = {"widths": (4, 8), "latent_channels": 3}
MODEL = models.autoencoder((8, 8, 1), **SMALL)


@pytest.fixture(scope="module")
def variables():
    return MODEL.init(KEY)


@pytest.mark.parametrize(
    ("shape", "latent", "kind", "patch"),
    [
        ((28, 28, 1), (7, 7, 3), "flat", 1),
        ((32, 32, 3), (8, 8, 3), "spatial", 1),
        ((10, 17, 3), (3, 5, 3), "flat", 1),
        ((16, 12, 3), (2, 2, 3), "spatial", 2),
        ((10, 17, 3), (1, 2, 3), "flat", 4),
    ],
)
def test_an_image_of_any_sides_comes_back_in_its_shape_and_inside_the_unit_box(
    shape, latent, kind, patch
):
    model = models.autoencoder(shape, latent=kind, patch=patch, **SMALL)
    variables = model.init(KEY)
    x = jax.random.uniform(KEY, (2, *shape))
    out, taps = jax.jit(model.apply, static_argnames="taps")(variables, x, taps=("latent",))
    assert out.shape == x.shape
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    size = latent if kind == "spatial" else (int(np.prod(latent)),)
    assert taps["latent"].shape == (2, *size)


def test_encode_then_decode_is_apply_and_the_latent_is_the_tap(variables):
    x = jax.random.uniform(KEY, (2, 8, 8, 1))
    apply = jax.jit(MODEL.apply, static_argnames="taps")
    out, taps = apply(variables, x, taps=("latent",))
    latent = jax.jit(MODEL.encode)(variables, x)
    np.testing.assert_allclose(latent, taps["latent"], atol=1e-6)
    np.testing.assert_allclose(jax.jit(MODEL.decode)(variables, latent), out, atol=1e-6)


def test_a_normalised_latent_has_norm_sqrt_d_and_an_empty_one_a_finite_gradient(variables):
    # Normalisation has no parameters: the other model's variables serve.
    encode = models.autoencoder((8, 8, 1), latent_norm=True, **SMALL).encode
    x = jax.random.uniform(KEY, (2, 8, 8, 1))
    latent = jax.jit(encode)(variables, x)
    np.testing.assert_allclose(jnp.linalg.norm(latent, axis=1), latent.shape[1] ** 0.5, rtol=1e-4)
    dead = jax.tree.map(jnp.zeros_like, variables)
    grads = jax.jit(jax.grad(lambda params: encode({"params": params}, x).sum()))(dead["params"])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_the_output_keeps_a_gradient_where_a_plain_sigmoid_has_lost_it():
    z = jnp.array([-80.0, -20.0, 0.0, 20.0, 80.0])
    plain = jax.vmap(jax.grad(jax.nn.sigmoid))(z)
    kept = jax.vmap(jax.grad(soft_unit))(z)
    assert float(plain[3]) == 0
    expected = np.exp(-np.abs(np.asarray(z, np.float64))) / (1 + np.exp(-np.abs(z))) ** 2
    np.testing.assert_allclose(kept, expected, rtol=1e-5)
    np.testing.assert_array_equal(soft_unit(z), jax.nn.sigmoid(z))


def test_gradient_flows_from_the_image_through_both_halves_to_the_image(variables):
    x = jax.random.uniform(KEY, (2, 8, 8, 1))
    grad = jax.jit(jax.grad(lambda x: MODEL.apply(variables, x)[:, 3:5, 3:5].sum()))(x)
    assert float(jnp.abs(grad).max(axis=(1, 2, 3)).min()) > 0


def test_a_linear_output_is_what_the_sigmoid_would_squash(variables):
    linear = models.autoencoder((8, 8, 1), output="linear", **SMALL)
    latent = 3 * jax.random.normal(KEY, (1, 12))
    raw, squashed = (jax.jit(m.decode)(variables, latent) for m in (linear, MODEL))
    np.testing.assert_allclose(jax.nn.sigmoid(raw), squashed, atol=1e-6)


def test_patches_are_laid_side_by_side():
    # Channel-wise [place, place, (row, column, colour)], as an explicit loop puts them down.
    x = np.arange(2 * 3 * 12, dtype=np.float32).reshape(1, 2, 3, 12)
    expected = np.zeros((1, 4, 6, 3), np.float32)
    for i, j, row, column in np.ndindex(2, 3, 2, 2):
        start = 3 * (2 * row + column)
        expected[0, 2 * i + row, 2 * j + column] = x[0, i, j, start : start + 3]
    np.testing.assert_array_equal(_unfold(jnp.asarray(x), 2), expected)


def test_patches_of_two_cost_less_than_half_of_the_operations():
    def operations(patch):
        model = models.autoencoder((32, 32, 3), patch=patch, **SMALL)
        variables = jax.eval_shape(model.init, KEY)
        return flops.count_flops(model.apply, variables, jnp.zeros((1, 32, 32, 3))).matmul

    assert 0.25 < operations(2) / operations(1) < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v: m.encode(v, jnp.zeros((1, 8, 9, 1))), r"x must be \[b, 8, 8, 1\]"),
        (lambda m, v: m.encode(v, jnp.zeros((1, 8, 8, 1), jnp.uint8)), "x must be float"),
        (lambda m, v: m.decode(v, jnp.zeros((1, 13))), r"latent must be float \[b, 12\]"),
        (
            lambda m, v: m.encode({"params": {}}, jnp.zeros((1, 8, 8, 1))),
            "variables must be .*of a",
        ),
        (lambda m, v: m.decode({"params": {}}, jnp.zeros((1, 12))), "variables must be .*of a"),
        (lambda m, v: m.init(KEY, (9, 9, 1)), r"shape must be \(8, 8, 1\)"),
        (lambda m, v: models.autoencoder((8, 8)), r"shape must be \(h, w, c\)"),
        (lambda m, v: models.autoencoder(latent="vector"), "latent must be one of flat, spatial"),
        (lambda m, v: models.autoencoder(output="clip"), "output must be one of sigmoid, linear"),
        (lambda m, v: models.autoencoder(patch=0), "patch must be an integer >= 1, got 0"),
        (lambda m, v: models.autoencoder(widths=(8, 0)), r"widths\[1\] must be an integer >= 1"),
    ],
)
def test_bad_input_gives_one_clear_error(variables, call, message):
    with pytest.raises(ValueError, match=message):
        call(MODEL, variables)
