"""Convolution of channel-last images: one function for every layer, fast on CPUs inside loops too.

    y[b, i, j, o] = sum_{u, v, c} x[b, s i + u - p, s j + v - p, c] kernel[u, v, c, o]

A convolution and its two gradients are one trilinear form in (x, kernel, y), solved for y, x or
kernel. One JAX primitive, `conv2d`, holds the three; the derivative of each is again one of the
three. So `grad` and `jvp` of any order, `vmap`, `jit`, `shard_map` and `remat` work, and the
algorithm is chosen when a program is compiled for a platform: XLA's convolution everywhere except
on CPUs, where `convolution_cpu.py` chooses by shape.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from jaxrobust.models.convolution_cpu import direct, solve_on_cpu


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw ci co"],
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "b oh ow co"]:
    """Two-dimensional cross-correlation, NHWC images with an HWIO kernel.

    On CPUs, 3x3 convolutions of 64 channels or more run as Winograd's F(4, 3) along the height:
    within 1e-5 of the direct sum, relative to the largest output.

    Args:
        x: [b, h, w, c] images or features, float32 or bfloat16.
        kernel: [kh, kw, c / groups, co] weights of the same dtype.
        stride: steps along height and width, >= 1.
        padding: "SAME", "VALID", one number for all four sides, or ((top, bottom), (left, right)).
        groups: input and output channels are split into as many independent convolutions.
        precision: of the products on accelerators, as in `jax.lax.conv_general_dilated`; None is
            what `jax.default_matmul_precision` says where this is called.

    Returns:
        [b, oh, ow, co] in the dtype of `x`.

    Raises:
        ValueError: channels, groups, stride or padding that do not fit together.

    Source: Winograd 1980; Lavin and Gray 2016, "Fast algorithms for convolutional neural
    networks", section 4.
    """
    strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
    _check(x, kernel, strides, groups)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding.upper())
    elif isinstance(padding, int):
        padding = ((padding, padding),) * 2
    pads = tuple((int(low), int(high)) for low, high in padding)
    sizes = zip(x.shape[1:3], kernel.shape[:2], strides, pads, strict=True)
    out = tuple((n + low + high - k) // s + 1 for n, k, s, (low, high) in sizes)
    if min(out) < 1:
        raise ValueError(f"padding must leave an output, got {padding} for {x.shape[1:3]} images")
    x, kernel = _equally_varying(x, kernel)
    shapes = (x.shape, kernel.shape, (x.shape[0], *out, kernel.shape[3]))
    # Read here, as JAX's own products do: the context may be left before the program is lowered.
    precision = precision or jax.config.jax_default_matmul_precision or "default"
    return conv2d_p.bind(
        x, kernel, solve="y", shapes=shapes, strides=strides, pads=pads, groups=groups,
        precision=precision,
    )  # fmt: skip


def _check(x, kernel, strides, groups):
    if x.dtype != kernel.dtype:
        raise ValueError(f"kernel must have the dtype of x, {x.dtype}, got {kernel.dtype}")
    if len(strides) != 2 or min(strides) < 1:
        raise ValueError(f"stride must be one or two integers >= 1, got {strides}")
    if groups < 1 or x.shape[3] % groups or kernel.shape[3] % groups:
        channels = (x.shape[3], kernel.shape[3])
        raise ValueError(f"groups must divide the channels {channels}, got {groups}")
    if kernel.shape[2] * groups != x.shape[3]:
        needed = x.shape[3] // groups
        raise ValueError(f"kernel needs {needed} input channels, got {kernel.shape[2]}")


def _equally_varying(*arrays):
    """Under `shard_map` the operands of one primitive must vary over the same mesh axes."""
    have = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    every = frozenset().union(*have)
    lacking = [tuple(sorted(every - h)) for h in have]
    pairs = zip(arrays, lacking, strict=True)
    return [lax.pcast(a, axes, to="varying") if axes else a for a, axes in pairs]


# The primitive. `solve` names the unknown of the trilinear form; the operands are the other two
# of (x, w, y), in this order except that a gradient y comes first for x: ("y": x, w), ("x": y, w),
# ("w": x, y). `shapes` are those of (x, w, y).

conv2d_p = Primitive("jaxrobust_conv2d")
_STATIC = ("solve", "shapes", "strides", "pads", "groups", "precision")
_OPERANDS = {"y": ("x", "w"), "x": ("y", "w"), "w": ("x", "y")}


def _transpose(position, cotangent, first, second, *, solve, **params):
    """Solve for the operand at `position`: the cotangent takes the place of the old unknown."""
    names = _OPERANDS[solve]
    known = {solve: cotangent, names[1 - position]: (first, second)[1 - position]}
    operands = [known[name] for name in _OPERANDS[names[position]]]
    return conv2d_p.bind(*operands, solve=names[position], **params)


def _abstract(first, _second, *, solve, shapes, **_):
    return first.update(shape=shapes["xwy".index(solve)], weak_type=False)


def _batch(args, dims, *, solve, shapes, groups, **params):
    """Fold a mapped axis into the batch or, where kernels are mapped too, into the groups."""
    names = _OPERANDS[solve]
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    one_kernel = "w" in names and dims[names.index("w")] is None
    axis = 0 if one_kernel else 3
    folded = tuple(
        shape if name == "w" and one_kernel else _merged_shape(shape, axis, size)
        for name, shape in zip("xwy", shapes, strict=True)
    )
    operands = [
        a if name == "w" and one_kernel else _merge(a, d, axis, size)
        for name, a, d in zip(names, args, dims, strict=True)
    ]
    groups = groups if one_kernel else groups * size
    out = conv2d_p.bind(*operands, solve=solve, shapes=folded, groups=groups, **params)
    shape = shapes["xwy".index(solve)]
    return out.reshape(*shape[:axis], size, *shape[axis:]), axis


def _merge(a, dim, axis, size):
    """Make the mapped axis the slower part of `axis`."""
    a = jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)
    return jnp.moveaxis(a, 0, axis).reshape(_merged_shape(a.shape[1:], axis, size))


def _merged_shape(shape, axis, size):
    return (*shape[:axis], size * shape[axis], *shape[axis + 1 :])


def _plain(first, second, *, solve, shapes, **setting):
    """XLA's convolution, and its own transposes."""
    if solve == "y":
        return direct(first, second, **setting)
    # The unknown must vary over a mesh as its equation does: else it would be cast to, and the
    # transpose of that cast is a sum over the devices. The forward that `vjp` adds is dead code.
    unknown = _equally_varying(jnp.zeros(shapes["xwy".index(solve)], first.dtype), first)[0]
    if solve == "x":
        return jax.vjp(lambda x: direct(x, second, **setting), unknown)[1](first)[0]
    return jax.vjp(lambda w: direct(first, w, **setting), unknown)[1](second)[0]


ad.defbilinear(conv2d_p, functools.partial(_transpose, 0), functools.partial(_transpose, 1))
batching.primitive_batchers[conv2d_p] = _batch
conv2d_p.def_abstract_eval(_abstract)
conv2d_p.def_impl(jax.jit(conv2d_p.bind, static_argnames=_STATIC))
mlir.register_lowering(conv2d_p, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(
    conv2d_p, mlir.lower_fun(solve_on_cpu, multiple_results=False), platform="cpu"
)
