"""Exact floating-point operation counts of a JAX function, read from its jaxpr.

XLA's `compiled.cost_analysis()` counts the body of a loop once, whatever its length; attacks and
training steps are loops. Here bodies are multiplied by their trip counts, nothing is compiled and
nothing is run.
"""

import dataclasses
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class Counts:
    """Floating-point operations; one multiplication with its addition counts as two.

    Attributes:
        total: everything, elementwise operations and reductions included.
        matmul: matrix products and convolutions only, what hardware peaks are stated for.
    """

    total: int
    matmul: int

    def __add__(self, other):
        """Both pieces of work; `sum` begins with 0."""
        if isinstance(other, int) and other == 0:
            return self
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(self.total + other.total, self.matmul + other.matmul)

    def __mul__(self, times):
        """The same work so many times."""
        try:
            times = operator.index(times)
        except TypeError:
            return NotImplemented
        return Counts(self.total * times, self.matmul * times)

    __radd__, __rmul__ = __add__, __mul__


class Rules(NamedTuple):
    """What the caller decides about the count; see `count_flops`."""

    while_trips: int | None
    count_padding: bool


def count_flops(fn, *args, while_trips: int | None = None, count_padding: bool = True, **kwargs):
    """Count the floating-point operations of `fn(*args, **kwargs)` over all devices.

    Matrix products and convolutions are exact. An elementwise operation counts 1 per output
    element (an exponential too), a reduction 1 per element that it takes in beyond the first;
    moving, converting, comparing, choosing, integers and communication count 0. Of a
    conditional the costlier branch counts. Zeros that a convolution inserts between the elements
    of its input (the gradient of a strided one does) are never counted, nor is work that no result
    needs.

    Args:
        fn: function of arrays; anything static must be closed over.
        *args: arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are looked at.
        while_trips: trips of each `while` loop whose length depends on values. (A `fori_loop`
            between Python numbers, `scan` and `map` are known.) None: such a loop is an error.
        count_padding: count products with the zeros around an image, as published tables of
            networks do; False counts those inside only, as XLA's cost analysis does.
        **kwargs: keyword arguments of `fn`, arrays as well.

    Returns:
        `Counts(total, matmul)`, Python integers. Work inside `shard_map` and `pmap` is summed
        over the devices.

    Raises:
        ValueError: a loop of unknown length without `while_trips`, or while_trips < 0.
        NotImplementedError: a primitive without a rule (matrix decompositions, FFT, callbacks,
            Pallas kernels), rather than a silent guess.
    """
    if while_trips is not None and while_trips < 0:
        raise ValueError(f"while_trips must be >= 0, got {while_trips}")
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs).jaxpr
    # A compiler leaves out what no result needs, such as a decoder in an attack on the code.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of_jaxpr(jaxpr, Rules(while_trips, count_padding))


def conv_macs(lhs_shape, rhs_shape, out_shape, params, *, count_padding: bool = True) -> int:
    """Multiply-accumulates of one `conv_general_dilated`, from its shapes and parameters.

    MACs = output batch * output features * input features per group * prod_d taps_d
    taps_d = number of (output position, kernel position) pairs that meet an input element

    Args:
        lhs_shape: input shape, in the order of `params["dimension_numbers"].lhs_spec`.
        rhs_shape: kernel shape, in the order of `rhs_spec`.
        out_shape: output shape, in the order of `out_spec`.
        params: the primitive's parameters.
        count_padding: whether padding counts as input elements.

    Returns:
        Multiply-accumulates. Without padding, a convolution and both its gradients agree.
    """
    numbers = params["dimension_numbers"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    taps = 1
    for d in range(len(lhs) - 2):
        taps *= _taps(
            size=lhs_shape[lhs[2 + d]],
            kernel=rhs_shape[rhs[2 + d]],
            out=out_shape[out[2 + d]],
            stride=params["window_strides"][d],
            low=params["padding"][d][0],
            lhs_dilation=params["lhs_dilation"][d],
            rhs_dilation=params["rhs_dilation"][d],
            count_padding=count_padding,
        )
    # rhs_spec is (output features, input features per group, spatial...).
    return out_shape[out[0]] * out_shape[out[1]] * rhs_shape[rhs[1]] * taps


def _taps(*, size, kernel, out, stride, low, lhs_dilation, rhs_dilation, count_padding):
    """Count the pairs (output, kernel position) of one axis that meet an element, not a hole."""
    pairs = 0
    for k in range(kernel):
        offset = k * rhs_dilation - low
        positions = range(offset, offset + out * stride, stride)
        if not count_padding:
            positions = [p for p in positions if 0 <= p <= (size - 1) * lhs_dilation]
        pairs += sum(p % lhs_dilation == 0 for p in positions)
    return pairs


def _of_jaxpr(jaxpr, rules) -> Counts:
    # A ClosedJaxpr holds its Jaxpr under the same name.
    equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return sum((_of_equation(equation, rules) for equation in equations), Counts(0, 0))


def _of_equation(equation, rules) -> Counts:
    name, params = equation.primitive.name, equation.params
    if name in _FREE:
        return Counts(0, 0)
    if name in _LOOPS_AND_CALLS:
        return _LOOPS_AND_CALLS[name](params, rules)
    inside = [math.prod(getattr(v.aval, "shape", ())) for v in equation.invars]
    if name == "dot_general" and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact):
        return _product(_dot_macs(equation))
    if name == "conv_general_dilated":
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        return _product(conv_macs(*shapes, params, count_padding=rules.count_padding))
    if name == "jaxrobust_conv2d":  # models/convolution.py
        return _product(_own_conv_macs(params, rules))
    known = name.startswith(_HOLDS_A_SCALAR_PROGRAM) or not any(map(_is_program, params.values()))
    if name in _UNCOUNTED or not known:
        raise NotImplementedError(f"count_flops has no rule for the primitive {name!r}")
    # Integers are indices and random bits, booleans are masks: neither is floating point.
    outputs = (v.aval for v in equation.outvars)
    out = sum(math.prod(a.shape) for a in outputs if jnp.issubdtype(a.dtype, jnp.inexact))
    return Counts(_elementwise(name, inside, out, params), 0)


def _own_conv_macs(params, rules) -> int:
    """Of `models.conv2d` and its gradients: one sum of products, whichever is asked for."""
    x, kernel, y = params["shapes"]
    taps = [
        _taps(
            size=x[1 + d],
            kernel=kernel[d],
            out=y[1 + d],
            stride=params["strides"][d],
            low=params["pads"][d][0],
            lhs_dilation=1,
            rhs_dilation=1,
            count_padding=rules.count_padding,
        )
        for d in range(2)
    ]
    return y[0] * y[3] * kernel[2] * math.prod(taps)


def _product(macs) -> Counts:
    return Counts(2 * macs, 2 * macs)


def _dot_macs(equation) -> int:
    (contracting, _), _ = equation.params["dimension_numbers"]
    lhs_shape = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(lhs_shape[i] for i in contracting)


def _elementwise(name, inside, out, params) -> int:
    """Operations of an equation that is neither a product nor a call, by the sizes it handles."""
    if name.startswith("reduce_window"):
        return out * (math.prod(params["window_dimensions"]) - 1)
    if name.startswith("reduce"):
        return max(inside[0] - out, 0) if out else 0
    if name.startswith("scatter"):
        return inside[2] if out else 0
    if name.startswith("select_and_scatter_add"):
        return inside[0] * math.prod(params["window_dimensions"])
    if name == "integer_pow":
        return out * max(abs(params["y"]) - 1, 1)
    return out


def _is_program(value) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_program, value))
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _call(params, rules):
    name = next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
    return _of_jaxpr(params[name], rules)


def _scan(params, rules):
    return _of_jaxpr(params["jaxpr"], rules) * params["length"]


def _while(params, rules):
    if rules.while_trips is None:
        raise ValueError(
            "while_trips must be given: fn has a while loop whose number of trips depends on values"
        )
    condition, body = (_of_jaxpr(params[key], rules) for key in ("cond_jaxpr", "body_jaxpr"))
    # The condition is asked once more than the body runs.
    return (condition + body) * rules.while_trips + condition


def _cond(params, rules):
    branches = (_of_jaxpr(branch, rules) for branch in params["branches"])
    return max(branches, key=lambda counts: (counts.total, counts.matmul))


def _shard_map(params, rules):
    # The body is one device's program; axes left to the compiler keep their global shapes.
    axes = params.get("newly_manual_axes", params.get("manual_axes")) or params["mesh"].axis_names
    return _call(params, rules) * math.prod(params["mesh"].shape[axis] for axis in axes)


# fmt: off
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "linear_call",
}

_LOOPS_AND_CALLS = {
    **dict.fromkeys(_CALLS, _call),
    "scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map,
}

# Primitives that combine elements two by two hold the combiner as a program; it is counted by
# the number of elements.
_HOLDS_A_SCALAR_PROGRAM = ("reduce", "scatter-", "scatter_", "select_and_")

# Costs that grow faster than the output, or that cannot be seen: an error is better than a guess.
_UNCOUNTED = {
    "cholesky", "eig", "eigh", "fft", "geqrf", "householder_product", "lu", "qr", "schur", "svd",
    "triangular_solve", "tridiagonal_solve", "ragged_dot", "ragged_dot_general", "ffi_call",
    "pure_callback", "io_callback",
}

_FREE = {
    # Moving and converting.
    "reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "slice", "dynamic_slice",
    "dynamic_update_slice", "concatenate", "pad", "rev", "gather", "scatter", "split", "copy",
    "convert_element_type", "bitcast_convert_type", "reduce_precision", "device_put", "empty",
    "stop_gradient", "optimization_barrier", "name", "iota", "sharding_constraint",
    "debug_callback", "debug_print",
    # Choosing.
    "select_n", "sort", "top_k", "argmax", "argmin",
    # Communication.
    "psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant",
    "reduce_scatter", "psum_scatter", "ppermute", "all_to_all", "axis_index", "pvary", "pcast",
    "mesh_cast", "reshard",
    # Random keys and bits, whose types are not numbers.
    "random_seed", "random_wrap", "random_unwrap", "random_bits", "random_split", "random_fold_in",
    "random_clone", "threefry2x32",
}
# fmt: on
