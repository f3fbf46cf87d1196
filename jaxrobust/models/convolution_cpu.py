"""Convolution on CPUs: the algorithm for each shape, for the output and for both gradients.

Why CPUs differ: inside a loop body XLA's transposed convolutions miss its fast kernels (JAX issue
12868), here by 10 (input) and 50 to 200 times (kernel). So gradients are made of products and of
plain convolutions here. What each choice gains by shape stands in BUILD_NOTES.md.
"""

import itertools

import jax.numpy as jnp
from jax import lax


def solve_on_cpu(first, second, *, solve, shapes, strides, pads, groups, precision):
    """One of (x, w, y) from the other two; bfloat16 has no fast kernels on CPUs."""
    del precision  # CPUs multiply float32 as it is
    wide = jnp.promote_types(first.dtype, jnp.float32)
    a, b = first.astype(wide), second.astype(wide)
    if _folding_pays(solve, shapes, strides, groups):
        out = _folded(a, b, solve, shapes, strides, pads)
    elif solve == "y":
        out = _forward(a, b, strides, pads, groups)
    elif solve == "x":
        out = _input_gradient(a, b, shapes[0], strides, pads, groups)
    else:
        out = _kernel_gradient(a, b, shapes[1], strides, pads, groups)
    return out.astype(first.dtype)


def direct(x, w, strides, pads, groups, precision=None):
    """XLA's convolution."""
    return lax.conv_general_dilated(
        x, w, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups, precision=precision,
    )  # fmt: skip


def _forward(x, w, strides, pads, groups):
    if min(map(min, pads)) < 0:  # XLA's kernel would read beyond the images (XLA issue 48713).
        x, pads = _pad(x, pads), ((0, 0), (0, 0))
    if w.shape[2] == 1:
        return _shifted_products(x, w, strides, pads)
    if _winograd_pays(x, w.shape, strides, groups):
        return _winograd(x, w, pads)
    return direct(x, w, strides, pads, groups)


def _input_gradient(y, w, shape, strides, pads, groups):
    """Each phase of the stride is a plain convolution of y with its own taps, flipped.

    Row s t + r of x meets y[t + (r + p - u) / s] through the taps u = r + p (mod s).
    """
    if groups == 1 and shape[3] <= 4:
        return _scattered_products(y, w, shape, strides, pads)
    flipped = _swap_channels(w, groups)[::-1, ::-1]
    blocks = [-(-n // s) for n, s in zip(shape[1:3], strides, strict=True)]
    axes = zip(w.shape[:2], strides, pads, blocks, y.shape[1:3], strict=True)
    axes = [[_phase(*sizes, r) for r in range(sizes[1])] for sizes in axes]

    def phase(taps, window):
        sub = flipped[taps[0], taps[1]]
        if sub.size == 0:  # A stride beyond the kernel skips pixels.
            return jnp.zeros((shape[0], *blocks, shape[3]), y.dtype)
        return _forward(y, sub, (1, 1), window, groups)

    pixels = [[phase(*zip(row, column, strict=True)) for column in axes[1]] for row in axes[0]]
    x = jnp.stack([jnp.stack(row, 3) for row in pixels], 2)
    height, width = (n * s for n, s in zip(blocks, strides, strict=True))
    return x.reshape(shape[0], height, width, shape[3])[:, : shape[1], : shape[2]]


def _phase(kernel, stride, pads, blocks, outputs, residue):
    """Taps (of the flipped kernel) and padding that give the pixels of one residue, one axis."""
    first = (residue + pads[0]) % stride
    count = len(range(first, kernel, stride))
    last = first + stride * (count - 1)
    low = (last - residue - pads[0]) // stride
    return slice(kernel - 1 - last, None, stride), (low, blocks - outputs - low + count - 1)


def _scattered_products(y, w, shape, strides, pads):
    """One matrix product gives every tap's share of x; few input channels keep it small."""
    kh, kw, ci, co = w.shape
    shares = (y.reshape(-1, co) @ w.reshape(-1, co).T).reshape(*y.shape[:3], kh, kw, ci)

    def place(*tap):
        axes = zip(tap, strides, pads, shape[1:3], y.shape[1:3], strict=True)
        edges = [(t - p[0], n + p[0] - t - s * (m - 1) - 1, s - 1) for t, s, p, n, m in axes]
        share = shares[:, :, :, tap[0], tap[1]]
        return lax.pad(share, jnp.zeros((), y.dtype), ((0, 0, 0), *edges, (0, 0, 0)))

    return sum(place(u, v) for u in range(kh) for v in range(kw))


def _kernel_gradient(x, y, shape, strides, pads, groups):
    """Matrix products of patches with y, summed over batch and positions."""
    kh, kw, ci, co = shape
    if _winograd_pays(x, shape, strides, groups):
        return _winograd_kernel_gradient(x, y, pads)
    taps = _taps(x, (kh, kw), strides, pads, y.shape[1:3])
    if groups > 1 and ci == 1:
        taps = [jnp.repeat(tap, co // groups, 3) for tap in taps]
        return jnp.stack([(tap * y).sum((0, 1, 2)) for tap in taps]).reshape(shape)
    if groups > 1:
        y = y.reshape(*y.shape[:3], groups, co // groups)
        taps = [tap.reshape(*tap.shape[:3], groups, ci) for tap in taps]
        parts = [jnp.einsum("bhwgc,bhwgd->cgd", tap, y) for tap in taps]
        return jnp.stack(parts).reshape(shape)
    # A product per tap: side by side for a single one, the taps are copied once more.
    y = y.reshape(-1, co).T
    return jnp.stack([(y @ tap.reshape(-1, ci)).T for tap in taps]).reshape(shape)


def _taps(x, kernel, strides, pads, out):
    """Views of the padded images, one per position of the kernel, row by row."""
    x = _pad(x, pads)
    corners = itertools.product(*map(range, kernel))
    views = (x[:, u :: strides[0], v :: strides[1]] for u, v in corners)
    return [view[:, : out[0], : out[1]] for view in views]


def _pad(x, pads):
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))


def _shifted_products(x, w, strides, pads):
    """One input channel per group (depthwise, or grey images): no matrix product is needed."""
    kh, kw, _, co = w.shape
    sizes = zip(x.shape[1:3], pads, (kh, kw), strides, strict=True)
    out = [(n + sum(p) - k) // s + 1 for n, p, k, s in sizes]
    repeats = co // x.shape[3] if x.shape[3] > 1 else 1
    taps = _taps(jnp.repeat(x, repeats, 3), (kh, kw), strides, pads, out)
    return sum(t * k for t, k in zip(taps, w.reshape(kh * kw, co), strict=True))


def _swap_channels(w, groups):
    kh, kw, ci, co = w.shape
    w = w.reshape(kh, kw, ci, groups, co // groups).transpose(0, 1, 4, 3, 2)
    return w.reshape(kh, kw, co // groups, groups * ci)


# Strided convolutions of few channels: the pixels of a stride's step become the channels of one
# place, and the stride 1. Taps are then read in rows of s c numbers instead of c, and there are
# ceil(k / s)^2 of them instead of k^2.


def _folding_pays(solve, shapes, strides, groups):
    (*_, channels), (height, width, *_), _ = shapes
    if groups > 1 or channels > 4 or max(strides) == 1:
        return False
    if solve == "x":
        return True
    # Larger kernels are read fast enough as they are; folded they have more zeros to multiply by.
    fits = solve == "w" and height % strides[0] == width % strides[1] == 0
    return fits or (channels > 1 and height * width <= 9)


def _folded(first, second, solve, shapes, strides, pads):
    (b, *sizes, ci), (*kernel, _, co), (_, *outputs, _) = shapes
    taps = [-(-k // s) for k, s in zip(kernel, strides, strict=True)]
    blocks = [n + t - 1 for n, t in zip(outputs, taps, strict=True)]
    axes = list(zip(blocks, strides, sizes, pads, strict=True))
    edges = [(low, n * s - size - low) for n, s, size, (low, _) in axes]
    wide = strides[0] * strides[1] * ci

    def folded(x):
        return _pixels_to_channels(_pad(x, edges), blocks, strides)

    def folded_kernel(w):
        room = [(0, t * s - k) for t, s, k in zip(taps, strides, kernel, strict=True)]
        w = jnp.moveaxis(jnp.pad(w, (*room, (0, 0), (0, 0))), 3, 0)
        return jnp.moveaxis(_pixels_to_channels(w, taps, strides), 0, 3)

    ones, none = (1, 1), ((0, 0), (0, 0))
    if solve == "y":
        return direct(folded(first), folded_kernel(second), ones, none, 1)
    if solve == "x":
        shape = (b, *blocks, wide)
        x = _scattered_products(first, folded_kernel(second), shape, ones, none)
        return _pad(_channels_to_pixels(x, strides), [(-low, -high) for low, high in edges])
    shape = (*taps, wide, co)
    w = jnp.moveaxis(_kernel_gradient(folded(first), second, shape, ones, none, 1), 3, 0)
    w = _channels_to_pixels(w, strides)[:, : kernel[0], : kernel[1]]
    return jnp.moveaxis(w, 0, 3)


def _pixels_to_channels(x, blocks, strides):
    """[b, n s, m t, c] -> [b, n, m, s t c]."""
    (height, width), (down, right) = blocks, strides
    x = x.reshape(len(x), height, down, width, right, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(x), height, width, -1)


def _channels_to_pixels(x, strides):
    """[b, n, m, s t c] -> [b, n s, m t, c]."""
    b, height, width, _ = x.shape
    x = x.reshape(b, height, width, *strides, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height * strides[0], width * strides[1], -1)


# Winograd's F(4, 3) along the height (Lavin and Gray 2016, section 4.3): tiles of six rows give
# four rows of output with six products per column instead of twelve. Along the width the
# convolution stays direct: the second dimension would halve the products again, but its
# transforms cost more time than that saves on CPUs.

_ROWS = 4
_INPUT = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
          (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))  # fmt: skip
_KERNEL = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
           (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _winograd_pays(x, kernel_shape, strides, groups):
    kh, kw, ci, co = kernel_shape
    square = (kh, kw, groups, tuple(strides)) == (3, 3, 1, (1, 1))
    return square and min(ci, co) >= 64 and x.shape[1] >= _ROWS


def _combine(coefficients, terms):
    pairs = zip(coefficients, terms, strict=True)
    return sum(t if c == 1 else c * t for c, t in pairs if c)


def _tiled_rows(x, pads):
    """The six transformed rows of every tile: six arrays [b, tiles, w, c]."""
    outputs = x.shape[1] + sum(pads[0]) - 2
    tiles = -(-outputs // _ROWS)
    x = _pad(x, ((pads[0][0], pads[0][1] + tiles * _ROWS - outputs), (0, 0)))
    rows = [x[:, i::_ROWS][:, :tiles] for i in range(_ROWS + 2)]
    return [_combine(line, rows) for line in _INPUT], outputs, tiles


def _winograd(x, w, pads):
    rows, outputs, tiles = _tiled_rows(x, pads)
    kernels = [_combine(line, w) for line in _KERNEL]
    products = [
        direct(r, k[None], (1, 1), ((0, 0), pads[1]), 1) for r, k in zip(rows, kernels, strict=True)
    ]
    y = jnp.stack([_combine(line, products) for line in _OUTPUT], 2)
    return y.reshape(y.shape[0], tiles * _ROWS, *y.shape[3:])[:, :outputs]


def _winograd_kernel_gradient(x, y, pads):
    """The transpose of `_winograd` with respect to its kernel."""
    rows, outputs, tiles = _tiled_rows(_pad(x, ((0, 0), pads[1])), pads)
    y = _pad(y, ((0, tiles * _ROWS - outputs), (0, 0)))
    lines = [y[:, i::_ROWS] for i in range(_ROWS)]
    width, ci, co = y.shape[2], x.shape[3], y.shape[3]

    def products(row, *coefficients):
        line = _combine(coefficients, lines).reshape(-1, co).T
        return jnp.stack([line @ row[:, :, v : v + width].reshape(-1, ci) for v in range(3)])

    grads = map(products, rows, *_OUTPUT)
    gradient = map(_combine, zip(*_KERNEL, strict=True), itertools.repeat(tuple(grads)))
    return jnp.stack(list(gradient)).swapaxes(2, 3)
