"""Tests of the operation counts: closed forms, unrolled twins and XLA's own analysis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrobust import models
from jaxrobust.flops import Counts, count_flops

X, W = jnp.ones((4, 16)), jnp.ones((16, 16))
LAYER = 2 * 4 * 16 * 16


def layer(x, w):
    return jnp.tanh(x @ w)


def of_shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def products(flops):
    return Counts(flops, flops)


def by_xla(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_counts_add_and_repeat_from_either_side_and_are_no_tuples():
    one, two = Counts(3, 2), Counts(10, 4)
    assert one + two == two + one == sum([one, two]) == Counts(13, 6)
    assert 3 * one == one * 3 == one * np.int64(3) == Counts(9, 6)
    pair = (1, 2)
    for wrong in (lambda: one + pair, lambda: pair + one, lambda: one + 1, lambda: one * 1.5):
        with pytest.raises(TypeError, match=r"unsupported operand|can only concatenate"):
            wrong()
    with pytest.raises(TypeError, match="not supported between"):
        max(one, two)


def test_a_matrix_product_counts_two_per_multiply_accumulate():
    assert count_flops(jnp.matmul, of_shape(3, 5), of_shape(5, 7)) == products(2 * 3 * 5 * 7)
    batched = count_flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), of_shape(9, 3, 5),
                          of_shape(9, 4, 5))  # fmt: skip
    assert batched == products(2 * 9 * 3 * 4 * 5)


def test_elementwise_operations_and_reductions_count_apart_from_products():
    assert count_flops(layer, X, W) == Counts(LAYER + 4 * 16, LAYER)
    assert count_flops(lambda x: jnp.sum(x * x), X) == Counts(64 + 63, 0)
    assert count_flops(lambda x: x**4, X) == Counts(3 * 64, 0)
    assert count_flops(lambda x: jnp.where(x > 0, x.T.reshape(x.shape), 0), X) == Counts(0, 0)


def test_products_of_integers_count_nothing():
    whole = jax.ShapeDtypeStruct((4, 4), jnp.int32)
    assert count_flops(jnp.dot, whole, whole) == Counts(0, 0)


def test_integers_and_random_bits_count_nothing():
    assert count_flops(lambda i: (i * 3 + 1) % 7, jnp.arange(10)) == Counts(0, 0)
    assert count_flops(lambda k: jax.random.bits(k, (8,)), jax.random.key(0)) == Counts(0, 0)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_loop_counts_as_its_unrolled_twin(length):
    def unrolled(x, w):
        for _ in range(length):
            x = layer(x, w)
        return x

    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (layer(x, w), None), x, length=length)[0]

    def fori(x, w):
        return jax.lax.fori_loop(0, length, lambda _, x: layer(x, w), x)

    def nested(x, w):
        return jax.lax.fori_loop(0, length, lambda _, x: jax.jit(scanned)(x, w), x)

    expected = count_flops(unrolled, X, W)
    assert expected == Counts(LAYER + 64, LAYER) * length
    assert count_flops(scanned, X, W) == expected
    assert count_flops(fori, X, W) == expected
    assert count_flops(nested, X, W) == expected * length


def test_the_gradient_through_a_loop_counts_as_through_its_unrolled_twin():
    def loss(w, x, unroll):
        if unroll:
            for _ in range(5):
                x = layer(x, w)
        else:
            x = jax.lax.scan(lambda x, _: (layer(x, w), None), x, length=5)[0]
        return x.sum()

    ours, twin = (
        count_flops(jax.grad(lambda w, x, u=unroll: loss(w, x, u)), W, X)
        for unroll in (False, True)
    )
    # Forward, gradient of the weights, gradient of the input; the first input's is not asked for,
    # and the loop cannot leave it out.
    assert twin.matmul == (3 * 5 - 1) * LAYER
    assert ours.matmul == 3 * 5 * LAYER


def test_a_while_loop_of_unknown_length_asks_for_its_trips():
    def halve(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: layer(x, w), x)

    with pytest.raises(ValueError, match="while_trips must be given"):
        count_flops(halve, X, W)
    with pytest.raises(ValueError, match="while_trips must be >= 0, got -1"):
        count_flops(halve, X, W, while_trips=-1)
    # The condition, a sum of 64 numbers, is asked once more than the body runs.
    assert count_flops(halve, X, W, while_trips=3) == Counts(3 * (LAYER + 64) + 4 * 63, 3 * LAYER)


def test_a_conditional_counts_its_costlier_branch():
    def choose(flag, x, w):
        return jax.lax.cond(flag, lambda: layer(x, w), lambda: x)

    assert count_flops(choose, True, X, W) == count_flops(layer, X, W)


def test_wrappers_do_not_hide_work():
    custom_vjp = jax.custom_vjp(layer)
    custom_vjp.defvjp(lambda x, w: (layer(x, w), (x, w)), lambda res, g: (g @ res[1].T, res[1]))
    custom_jvp = jax.custom_jvp(layer)
    custom_jvp.defjvps(lambda t, y, x, w: t @ w, None)
    for wrapped in (jax.jit(layer), jax.checkpoint(layer), custom_vjp, custom_jvp):
        assert count_flops(wrapped, X, W) == count_flops(layer, X, W)
    assert count_flops(jax.vmap(layer, (0, None)), X[:, None], W).matmul == LAYER


def test_remat_counts_the_recomputed_forward_pass():
    def loss(x, w, wrap):
        return jnp.sum(wrap(lambda x: layer(layer(x, w), w))(x) ** 2)

    plain = count_flops(jax.grad(lambda x, w: loss(x, w, lambda f: f)), X, W)
    remat = count_flops(jax.grad(lambda x, w: loss(x, w, jax.checkpoint)), X, W)
    assert plain.matmul == 4 * LAYER
    # JAX itself drops what the backward pass does not need of the second forward pass.
    assert remat.matmul > plain.matmul


@pytest.mark.parametrize("devices", [1, 8])
def test_mapped_work_is_summed_over_devices(devices):
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    x = of_shape(16, 16)

    def mean(x, w):
        return jax.lax.pmean(layer(x, w), "d")

    plain = count_flops(layer, x, W)
    mapped = jax.shard_map(layer, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    assert count_flops(jax.jit(mapped), x, W) == plain
    mapped = jax.shard_map(mean, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())
    assert count_flops(mapped, x, W).matmul == plain.matmul
    pmapped = jax.pmap(mean, axis_name="d", in_axes=(0, None), devices=jax.devices()[:devices])
    assert count_flops(pmapped, of_shape(devices, 16 // devices, 16), W).matmul == plain.matmul


def convolution(stride=1, dilation=1, groups=1, padding="SAME"):
    return lambda x, w: jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, rhs_dilation=(dilation, dilation),
        feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


CONVOLUTIONS = {
    "plain": (3, {}),
    "strided": (3, {"stride": 2}),
    "dilated": (3, {"dilation": 2}),
    "grouped": (3, {"stride": 2, "groups": 4, "padding": "VALID"}),
    "depthwise": (3, {"stride": 2, "groups": 8}),
    "pointwise": (1, {"stride": 2}),
    "even": (4, {"stride": 3}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_count_alike_and_as_xla_does(name):
    kernel, options = CONVOLUTIONS[name]
    conv = convolution(**options)
    x, w = jnp.ones((2, 13, 11, 8)), jnp.ones((kernel, kernel, 8 // options.get("groups", 1), 16))
    y = jax.eval_shape(conv, x, w)
    by_input = lambda y: jax.linear_transpose(lambda x: conv(x, w), x)(y)  # noqa: E731
    by_kernel = lambda y: jax.linear_transpose(lambda w: conv(x, w), w)(y)  # noqa: E731
    counts = [
        count_flops(fn, *args, count_padding=False)
        for fn, args in ((conv, (x, w)), (by_input, (y,)), (by_kernel, (y,)))
    ]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0].matmul == by_xla(conv, x, w)


def test_padding_counts_as_published_tables_count_it():
    x, w = of_shape(2, 16, 16, 8), of_shape(3, 3, 8, 32)
    assert count_flops(convolution(), x, w) == products(2 * 2 * 16 * 16 * 9 * 8 * 32)
    inside = count_flops(convolution(), x, w, count_padding=False)
    assert inside.matmul == 2 * 2 * (16 * 3 - 2) ** 2 * 8 * 32
    assert count_flops(convolution(stride=2), x, w).matmul == 2 * 2 * 8 * 8 * 9 * 8 * 32


def test_zeros_between_the_elements_of_a_strided_gradient_do_not_count():
    x, w = jnp.ones((1, 16, 16, 8)), jnp.ones((2, 2, 8, 8))
    conv = convolution(stride=2)
    forward = count_flops(conv, x, w)
    gradient = count_flops(jax.grad(lambda x: conv(x, w).sum()), x)
    # The gradient of something linear does not need its value.
    assert gradient.matmul == forward.matmul


def wide_resnet(x, depth):
    """The convolutions and the head of WRN-depth-10, from shapes alone."""
    x, features = convolution()(x, jnp.zeros((3, 3, 3, 16))), 16
    for width, first_stride in ((160, 1), (320, 2), (640, 2)):
        for block in range((depth - 4) // 6):
            stride = first_stride if block == 0 else 1
            inner = convolution(stride)(x, jnp.zeros((3, 3, features, width)))
            inner = convolution()(inner, jnp.zeros((3, 3, width, width)))
            if block == 0:
                x = convolution(stride)(x, jnp.zeros((1, 1, features, width)))
            x, features = x + inner, width
    return x.mean((1, 2)) @ jnp.zeros((features, 10))


@pytest.mark.parametrize(("depth", "known"), [(28, 5.24e9), (34, 6.66e9)])
def test_a_wide_resnet_takes_the_multiply_accumulates_of_its_closed_form(depth, known):
    macs = count_flops(lambda x: wide_resnet(x, depth), of_shape(1, 32, 32, 3)).matmul / 2
    assert macs == pytest.approx(known, rel=2e-3)
    # All 3x3 convolutions of a stage but its first take 9 * width^2 * positions, the same number
    # in all three stages.
    repeated = 3 * (2 * (depth - 4) // 6 - 1) * 9 * 160**2 * 32**2
    stem = 32**2 * 9 * 3 * 16
    first = sum(
        (9 + 1) * before * after * side**2
        for before, after, side in ((16, 160, 32), (160, 320, 16), (320, 640, 8))
    )
    assert macs == repeated + stem + first + 640 * 10


def test_a_network_without_loops_counts_its_products_as_xla_does():
    def network(x, w1, w2):
        x = jax.nn.relu(convolution(stride=2)(x, w1))
        return x.reshape(x.shape[0], -1) @ w2

    args = (jnp.ones((4, 12, 12, 3)), jnp.ones((3, 3, 3, 8)), jnp.ones((288, 10)))
    ours = count_flops(network, *args, count_padding=False)
    # The relu is one operation per element in both counts.
    assert ours.total == ours.matmul + 4 * 6 * 6 * 8
    assert ours.total == pytest.approx(by_xla(network, *args), rel=1e-6)


def test_a_primitive_without_a_rule_is_an_error_not_a_guess():
    with pytest.raises(NotImplementedError, match="'fft'"):
        count_flops(jnp.fft.fft, of_shape(8))
    with pytest.raises(NotImplementedError, match="'cholesky'"):
        count_flops(jnp.linalg.cholesky, of_shape(8, 8))


def test_nothing_is_run_and_keywords_pass_through():
    shape = of_shape(100_000, 100_000)  # 40 GB, were it real.
    assert count_flops(lambda a, *, b: a @ b, shape, b=shape).matmul == 2 * 10**15


def test_our_own_convolution_counts_like_the_compilers():
    x, kernel = jnp.ones((2, 7, 6, 4)), jnp.ones((3, 3, 2, 6))
    own = functools.partial(models.conv2d, stride=2, padding=1, groups=2)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    for padded in (True, False):
        forward = count_flops(own, x, kernel, count_padding=padded).matmul
        assert forward == count_flops(plain, x, kernel, count_padding=padded).matmul > 0
        # Both gradients cost one convolution each.
        gradient = jax.grad(lambda x, k: (own(x, k) ** 2).sum(), (0, 1))
        assert count_flops(gradient, x, kernel, count_padding=padded).matmul == 3 * forward


@pytest.mark.parametrize("length", [1, 3])
def test_work_that_no_result_needs_does_not_count_inside_loops_either(length):
    a = jnp.ones((4, 4))

    def wasteful(x):
        _ = x @ a  # never looked at
        return jax.lax.fori_loop(0, length, lambda _, carry: (carry[0] @ a, carry[1] @ a), (x, x))[
            0
        ]

    assert count_flops(wasteful, jnp.ones((2, 4))).matmul == length * 2 * 2 * 4 * 4
