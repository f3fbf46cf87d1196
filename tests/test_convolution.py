"""`conv2d` against XLA's convolution: values, derivatives of any order, and transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxrobust.models.convolution import conv2d

# Winograd's transforms lose about two digits of float32; relative to the largest value.
TOLERANCE = 3e-5


def reference(x, kernel, *, stride=1, padding="SAME", groups=1):
    strides = (stride, stride) if isinstance(stride, int) else stride
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=numbers, feature_group_count=groups
    )


def draw(shape, kernel_shape, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], kernel_shape)


def with_gradients(f, **options):
    """One program for the output and both gradients along a fixed direction of the output."""

    def run(x, kernel):
        y, pull = jax.vjp(lambda x, k: f(x, k, **options), x, kernel)
        return (y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)))

    return jax.jit(run)


def assert_close(actual, expected, tolerance=TOLERANCE):
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, e in leaves:
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(np.abs(e).max(), 1e-3))


def same_as_xla(shape, kernel_shape, **options):
    x, kernel = draw(shape, kernel_shape)
    assert_close(
        with_gradients(conv2d, **options)(x, kernel),
        with_gradients(reference, **options)(x, kernel),
    )


# [b, h, w, c], [kh, kw, ci / groups, co], options: each line reaches another algorithm or edge.
CASES = {
    "winograd": ((2, 8, 8, 64), (3, 3, 64, 64), {}),
    "winograd_odd_height_and_width": ((1, 13, 5, 64), (3, 3, 64, 72), {"padding": 1}),
    "winograd_uneven_padding": ((1, 4, 7, 72), (3, 3, 72, 64), {"padding": ((0, 3), (2, 1))}),
    "one_channel": ((3, 9, 8, 1), (3, 3, 1, 6), {"padding": 1}),
    "one_channel_strided": ((2, 28, 27, 1), (4, 4, 1, 16), {"stride": 2, "padding": 1}),
    "three_channels": ((2, 9, 9, 3), (3, 3, 3, 64), {"padding": 1}),
    "few_channels_strided": ((2, 9, 8, 3), (3, 3, 3, 6), {"stride": 2, "padding": 1}),
    "few_channels_in_patches": ((2, 13, 12, 3), (4, 4, 3, 6), {"stride": 4, "padding": 1}),
    "few_channels_between_patches": ((1, 18, 14, 3), (6, 6, 3, 5), {"stride": 4}),
    "few_channels_cropped": ((2, 9, 11, 2), (2, 3, 2, 5), {"stride": (3, 2), "padding": "VALID"}),
    "strided_odd": ((2, 15, 11, 8), (3, 3, 8, 12), {"stride": 2, "padding": 1}),
    "strided_even_kernel": ((2, 14, 14, 6), (4, 4, 6, 7), {"stride": 2, "padding": 1}),
    "cropped_left": ((2, 1, 2, 6), (1, 3, 6, 5), {"stride": (1, 2), "padding": ((0, 0), (3, 0))}),
    "patches": ((2, 17, 12, 6), (4, 4, 6, 7), {"stride": 4, "padding": "VALID"}),
    "two_strides": ((1, 9, 11, 5), (3, 2, 5, 4), {"stride": (1, 3), "padding": ((2, 0), (1, 4))}),
    "pointwise_strided": ((2, 8, 7, 6), (1, 1, 6, 9), {"stride": 2, "padding": 0}),
    "stride_beyond_kernel": ((2, 11, 9, 6), (2, 2, 6, 4), {"stride": 3, "padding": "VALID"}),
    "depthwise": ((2, 9, 8, 6), (3, 3, 1, 6), {"groups": 6}),
    "depthwise_strided": ((1, 9, 8, 6), (5, 5, 1, 6), {"groups": 6, "stride": 2}),
    "depthwise_multiplier": ((2, 5, 8, 3), (3, 3, 1, 6), {"groups": 3}),
    "grouped_strided": ((2, 9, 8, 8), (3, 3, 2, 12), {"groups": 4, "stride": 2, "padding": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_those_of_xla(case):
    shape, kernel_shape, options = CASES[case]
    same_as_xla(shape, kernel_shape, **options)


@settings(max_examples=5, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pads=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    channels=st.sampled_from([(1, 1, 2), (1, 3, 2), (1, 6, 5), (1, 4, 3), (2, 2, 1), (3, 2, 2)]),
)
def test_any_geometry_equals_xla(size, kernel, stride, pads, channels):
    groups, ci, co = channels
    pads = tuple(
        (low, max(high, k - n - low)) for n, k, (low, high) in zip(size, kernel, pads, strict=True)
    )
    same_as_xla(
        (2, *size, groups * ci),
        (*kernel, ci, groups * co),
        stride=stride,
        padding=pads,
        groups=groups,
    )


SMALL = {
    "winograd": ((1, 4, 4, 64), (3, 3, 64, 64), {}),
    "strided": ((1, 5, 4, 6), (3, 3, 6, 3), {"stride": 2, "padding": 1}),
}


@pytest.mark.parametrize("case", SMALL)
def test_gradient_of_gradient_and_forward_mode_equal_those_of_xla(case):
    shape, kernel_shape, options = SMALL[case]
    x, kernel = draw(shape, kernel_shape)
    dx, dk = draw(shape, kernel_shape, seed=1)

    def all_derivatives(f):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(f(x, kernel, **options) / 10))

        gradient = jax.grad(loss, (0, 1))

        def penalty(x, kernel):
            return sum(jnp.sum(g**2) for g in gradient(x, kernel))

        def run(x, kernel, dx, dk):
            second = jax.grad(penalty, (0, 1))(x, kernel)
            return (
                second,
                jax.jvp(loss, (x, kernel), (dx, dk)),
                jax.jvp(gradient, (x, kernel), (dx, dk)),
            )

        return jax.jit(run)(x, kernel, dx, dk)

    # Second derivatives go through four convolutions, each with its own rounding.
    assert_close(all_derivatives(conv2d), all_derivatives(reference), 4 * TOLERANCE)


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (3, 1)])
def test_vmap_equals_a_loop(mapped):
    x, kernel = draw((2, 5, 6, 4), (3, 3, 2, 6))
    setting = {"stride": 2, "padding": 1, "groups": 2}
    xs, ks = (
        a if axis is None else jnp.stack([a, a + 1, 2 - a], axis)
        for a, axis in zip((x, kernel), mapped, strict=True)
    )
    got = jax.jit(jax.vmap(with_gradients(conv2d, **setting), mapped))(xs, ks)
    one = with_gradients(reference, **setting)
    for i in range(3):
        pair = [a if d is None else a.take(i, d) for a, d in zip((xs, ks), mapped, strict=True)]
        assert_close(jax.tree.map(lambda a, i=i: a[i], got), one(*pair))


def test_loop_equals_repetition():
    x, kernel = draw((2, 8, 8, 64), (3, 3, 64, 64))
    kernel = kernel / 24

    def ascend(f, x):
        return x + jax.grad(lambda x: jnp.sum(f(x, kernel) ** 2))(x) / 10

    fused = jax.jit(lambda x: lax.fori_loop(0, 3, lambda _, x: ascend(conv2d, x), x))(x)
    expected = x
    for _ in range(3):
        expected = ascend(reference, expected)
    assert_close(fused, expected, 3 * TOLERANCE)


@pytest.mark.parametrize("case", ["winograd", "strided_odd", "depthwise"])
def test_sharded_batch_equals_one_device(case):
    shape, kernel_shape, options = CASES[case]
    x, kernel = draw((4, *shape[1:]), kernel_shape)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(f, total, x, kernel):
        loss = lambda x, k: total(jnp.sum(jnp.sin(f(x, k, **options))))  # noqa: E731
        return jax.grad(loss, (0, 1))(x, kernel)

    expected = jax.jit(lambda *a: run(reference, lambda s: s, *a))(x, kernel)
    mapped = jax.shard_map(
        lambda *a: run(conv2d, lambda s: s, *a),
        mesh=mesh,
        in_specs=(P("batch"), P()),
        out_specs=(P("batch"), P()),
        check_vma=True,
    )
    assert_close(jax.jit(mapped)(x, kernel), expected)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("batch")))
    assert_close(jax.jit(lambda *a: run(conv2d, lambda s: s, *a))(sharded, kernel), expected)


def test_remat_changes_nothing():
    x, kernel = draw((1, 4, 4, 6), (3, 3, 6, 6))
    once = with_gradients(conv2d)(x, kernel)
    assert_close(with_gradients(jax.checkpoint(conv2d))(x, kernel), once, 1e-6)


@pytest.mark.parametrize("case", ["winograd", "strided_odd", "depthwise"])
def test_bfloat16_stays_within_its_rounding(case):
    shape, kernel_shape, options = CASES[case]
    x, kernel = (a.astype(jnp.bfloat16) for a in draw(shape, kernel_shape))
    got = with_gradients(conv2d, **options)(x, kernel)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    exact = [a.astype(jnp.float32) for a in (x, kernel)]
    y, pull = jax.vjp(lambda x, k: reference(x, k, **options), *exact)
    direction = jnp.cos(jnp.arange(y.size, dtype=jnp.bfloat16)).reshape(y.shape)
    expected = (y, *pull(direction.astype(jnp.float32)))
    # bfloat16 keeps eight bits: half a unit of the largest value is 2^-9.
    assert_close([a.astype(jnp.float32) for a in got], expected, 2**-8)


def test_jit_equals_no_jit():
    x, kernel = draw((2, 6, 6, 4), (3, 3, 4, 4))
    assert_close(conv2d(x, kernel), jax.jit(conv2d)(x, kernel), 1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_get_the_plain_convolution(platform):
    x, kernel = draw((2, 8, 8, 64), (3, 3, 64, 64))
    traced = with_gradients(conv2d).trace(x, kernel)
    count = traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")
    # One for y, and for each of two gradients one beside a dead forward that the compiler drops.
    assert count == 5
    assert traced.lower(lowering_platforms=("cpu",)).as_text().count("stablehlo.convolution") > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride must be"),
        ({"groups": 3}, "groups must divide"),
        ({"groups": 2}, "kernel needs 2 input channels, got 4"),
        ({"padding": ((0, 0), (-5, -5))}, "padding must leave an output"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, message):
    x, kernel = draw((1, 6, 6, 4), (3, 3, 4, 4))
    with pytest.raises(ValueError, match=message):
        conv2d(x, kernel, **options)


def test_mixed_dtypes_are_refused():
    x, kernel = draw((1, 6, 6, 4), (3, 3, 4, 4))
    with pytest.raises(ValueError, match="dtype of x"):
        conv2d(x, kernel.astype(jnp.bfloat16))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_products_have_the_precision_of_where_they_were_called(platform):
    x, kernel = draw((1, 6, 6, 3), (3, 3, 3, 5))

    def lowered(f):
        gradients = jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) ** 2), (0, 1)))
        # Lowered outside the context that `f` was traced in.
        return gradients.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    def within(x, kernel):
        with jax.default_matmul_precision("highest"):
            return conv2d(x, kernel)

    for f in (within, lambda x, kernel: conv2d(x, kernel, precision="highest")):
        text = lowered(f)
        assert text.count("HIGHEST") >= 6  # two operands of three convolutions
        assert "precision DEFAULT" not in text
    assert "HIGHEST" not in lowered(conv2d)
