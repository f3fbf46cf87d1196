"""What every attack is called with: keys of any generator, and numbers as they are checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import attacks
from jaxrobust.attacks import box, inputs
from jaxrobust.keys import example_keys, threefry

BATCH, IMAGE = 6, (4, 3, 2)
X = jax.random.uniform(jax.random.key(1), (BATCH, *IMAGE))
WEIGHTS = jax.random.normal(jax.random.key(2), (*IMAGE, 4))
GENERATORS = ("rbg", "unsafe_rbg")


def loss_fn(x):
    return jnp.sin(5 * x).sum((1, 2, 3))


def logits_fn(x):
    return jnp.einsum("bhwc,hwck->bk", jnp.sin(4 * x), WEIGHTS)


def noisy_fn(x, keys):
    return logits_fn(x) + jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def test_keys_of_the_default_generator_stay_as_they_are():
    keys = jax.random.split(jax.random.key(3), BATCH)
    np.testing.assert_array_equal(data(example_keys(keys, BATCH)), data(keys))
    folded = [jax.random.fold_in(jax.random.key(3), i) for i in range(BATCH)]
    ours = data(example_keys(jax.random.key(3), BATCH))
    np.testing.assert_array_equal(ours, [data(key) for key in folded])


@pytest.mark.parametrize("generator", GENERATORS)
def test_every_word_of_another_generators_key_counts(generator):
    words = jnp.array([[1, 2, 3, 4], [0, 2, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0]], jnp.uint32)
    keys = jax.random.wrap_key_data(words, impl=generator)
    ours = threefry(keys)
    assert str(jax.random.key_impl(ours)) == "threefry2x32"
    assert len(np.unique(data(ours), axis=0)) == len(words)
    for key, row in zip(keys, data(ours), strict=True):
        np.testing.assert_array_equal(data(threefry(key)), row)
        np.testing.assert_array_equal(data(jax.jit(threefry)(key)), row)


DRAWING = {
    "linf_pgd": lambda x, keys: attacks.linf_pgd(0.1, 1, 0.0)(loss_fn, x, keys),
    "l2_pgd": lambda x, keys: attacks.l2_pgd(0.5, 1, 0.0)(loss_fn, x, keys),
    "n_fgsm": lambda x, keys: attacks.n_fgsm(0.1)(loss_fn, x, keys),
    "apgd_ce": lambda x, keys: attacks.apgd_ce("linf", 0.1, steps=2, draws=2)(
        noisy_fn, x, logits_fn(x).argmax(1), keys
    ),
    "eot": lambda x, keys: attacks.eot(lambda x, keys: noisy_fn(x, keys)[:, 0], 2)(x, keys),
}


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("name", DRAWING)
def test_a_row_draws_alike_with_any_neighbours_and_generator(name, generator):
    keys = jax.random.split(jax.random.key(0, impl=generator), BATCH)
    whole = DRAWING[name](X, keys)
    part = DRAWING[name](X[3:5], keys[3:5])
    np.testing.assert_allclose(part, whole[3:5], atol=1e-6)
    one = DRAWING[name](X, jax.random.key(0, impl=generator))
    np.testing.assert_allclose(DRAWING[name](X[:2], jax.random.key(0, impl=generator)), one[:2])
    assert np.any(one != whole)


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (1.0, {"low": 0, "high": 1, "strict": True}, r"share must lie in \(0, 1\), got 1"),
        (-0.5, {"low": 0, "high": 1}, r"share must lie in \[0, 1\], got -0.5"),
        (np.array([0.5, 2.0]), {"low": 0, "high": 1}, r"share must lie in \[0, 1\], got 2"),
        (np.nan, {"low": 0, "high": 1}, r"share must lie in \[0, 1\], got nan"),
        (0, {"low": 0, "strict": True}, "share must be > 0, got 0"),
    ],
)
def test_numbers_outside_their_interval_are_named(value, limits, message):
    with pytest.raises(ValueError, match=message):
        inputs.check_number("share", value, **limits)


def test_numbers_inside_empty_and_traced_ones_pass():
    for value in (0, 1, 0.5, np.array([0.0, 1.0]), np.zeros(0), None):
        inputs.check_number("share", value, low=0, high=1)
    jax.jit(lambda v: inputs.check_number("share", v, low=0, high=1))(2.0)
    inputs.check_number("share", np.inf, low=0, strict=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_even_if_the_compiler_drops_the_cast(dtype):
    values = jnp.linspace(0, 1, 1001)
    rounded = jax.jit(lambda v: box.rounded(v, dtype))
    np.testing.assert_array_equal(rounded(values), values.astype(dtype))
    assert "reduce-precision" in rounded.lower(values).as_text("hlo")
    assert box.rounded(values, values.dtype) is values
