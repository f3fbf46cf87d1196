"""Counting classes under Gaussian noise: one compiled loop, all examples at once, on any devices.

Sample number s of example i is drawn from fold_in(fold_in(key, i), s): neither chunks, batches nor
devices change the noise.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxrobust import parallel
from jaxrobust.attacks import inputs
from jaxrobust.keys import example_keys

LogitsFn = Callable[..., Array]

# The default of `chunk`: at most so many numbers in the noisy images of a pass, and so many images.
# Measured on CPU: MNIST's CNN is fastest at 32 to 128 images, an 8x8 digits CNN at 128 to 512; more
# fall out of the caches. On an accelerator a pass should fill it, and its activations must fit.
PASS = {"cpu": (2**17, 128)}
PASS_ELSEWHERE = (2**25, 4096)


def counts(
    logits_fn: LogitsFn,
    x: ArrayLike,
    key: Array,
    *,
    sigma: float | Array,
    samples: int,
    start: int = 0,
    chunk: int | None = None,
    args: tuple = (),
    mesh: Mesh | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Int[Array, "b classes"]:
    """How often each class is returned at x + N(0, sigma^2 I); all examples in one call.

    One compiled loop draws the noise and counts on the device; a new sigma or number of samples
    compiles nothing. It may be called inside a trace, where a NaN cannot raise: there, a sample
    with NaN logits is counted for no class.

    Args:
        logits_fn: as for `certify`.
        x: [b, ...] float in `bounds`, all of it on the device.
        key: one typed key, or [b].
        sigma: standard deviation of the noise, > 0.
        samples: noise samples per example, >= 1.
        start: number of the first sample: counts of 0..99 and of 100..199 add up to those of
            0..199.
        chunk: noisy images in one forward pass of one device.
        args: arrays that `logits_fn` takes besides x.
        mesh: spreads the examples over devices.
        bounds: the box that x must lie in, or None.

    Returns:
        [b, classes] int32; a row's sum is `samples`.

    Raises:
        TypeError, ValueError: as for `certify`.
    """
    inputs.check_steps(samples, "samples")
    inputs.check_steps(start, "start", low=0)
    x, keys, chunk = _checked(x, key, sigma, chunk, bounds)
    tally = _tally_of(logits_fn, x, keys, sigma, start, 0, samples, chunk, args, mesh)
    return _split(tally)[1]


def noise(
    key: Array, shape: tuple[int, ...], *, sigma: float | Array, samples: int, start: int = 0
) -> Float[Array, "b samples ..."]:
    """The very noise that `counts` adds to examples of this shape.

    Args:
        key: one typed key, or [b].
        shape: (b, ...) of the examples.
        sigma: standard deviation.
        samples: draws per example.
        start: number of the first draw.

    Returns:
        [b, samples, ...] float32.

    Raises:
        TypeError, ValueError: the key, sigma, or a number of draws is not of the form above.
    """
    inputs.check_number("sigma", sigma, low=0)
    inputs.check_steps(samples, "samples")
    inputs.check_steps(start, "start", low=0)
    keys = example_keys(key, shape[0])
    numbers = jnp.arange(start, start + samples)
    draw = jax.vmap(lambda k: _normal(jnp.broadcast_to(k, (samples,)), numbers, shape[1:]))
    return sigma * draw(keys)


def count_in_batches(
    logits_fn, x, key, sigma, first, samples, chunk, args, mesh, batch_size, bounds, progress
):
    """Two host arrays of counts [n, classes], of the first samples and of the rest."""
    inputs.check_steps(batch_size, "batch_size")
    x, keys, chunk = _checked(x, key, sigma, chunk, bounds)
    # Parts of equal size: one compilation, and hardly a row that fills up.
    size = -(-len(x) // max(1, -(-len(x) // batch_size)))
    parts = [_split(np.zeros((0, _classes(logits_fn, x, args) * 2 + 1), np.int32))]
    starts = range(0, len(x), max(size, 1))
    for start in tqdm(starts, desc="noise", unit="batch", disable=not progress):
        part = slice(start, start + size)
        tally = _tally_of(
            logits_fn, x[part], keys[part], sigma, 0, first, samples, chunk, args, mesh, size
        )
        parts.append(_split(np.asarray(tally)))
    return tuple(np.concatenate(both) for both in zip(*parts, strict=True))


def _split(tally):
    """The two halves of a tally, without its last column, in which samples with NaN are."""
    if not isinstance(tally, jax.core.Tracer) and (bad := int(tally[:, -1].sum())):
        raise ValueError(f"logits_fn must not return NaN, got it for {bad} noisy images")
    classes = tally.shape[1] // 2
    return tally[:, :classes], tally[:, classes:-1]


def _tally_of(logits_fn, x, keys, sigma, start, first, samples, chunk, args, mesh, size=None):
    """[b, 2 classes + 1]: the first samples, the rest, and samples with NaN."""
    batch, total = len(x), first + samples
    classes = _classes(logits_fn, x, args)
    devices = mesh.size if mesh else 1
    size = parallel.rounded(max(size or batch, 1), mesh)
    if size // devices * total + 2 * chunk >= 2**31:
        raise ValueError(
            "samples times examples per device must be below 2^31, "
            f"got {size // devices * total}: count in parts, by `start` or by examples"
        )
    if not batch:
        return jnp.zeros((0, 2 * classes + 1), jnp.int32)
    rows = np.minimum(np.arange(size), batch - 1)
    chunk = min(chunk, size // devices * total)
    numbers = (jnp.asarray(sigma, jnp.float32), np.int32(start), np.int32(first), np.int32(total))
    examples = (x[rows], keys[rows], np.arange(size) < batch)
    return _tally(logits_fn, chunk, mesh, (*numbers, args), examples)[:batch]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _tally(logits_fn, chunk, mesh, shared, examples):
    shard = functools.partial(_tally_shard, logits_fn, chunk)
    return parallel.map_examples(shard, mesh)(shared, examples)


def _tally_shard(logits_fn, chunk, shared, examples, axis_name):
    """The tally of one device's examples.

    (example, sample) pairs are numbered through, and every pass takes the next `chunk` of them:
    its size depends neither on the examples nor on the samples.
    """
    sigma, start, first, total, args = shared
    x, keys, real = examples
    classes = _classes(logits_fn, x, args)
    pairs = real.sum(dtype=jnp.int32) * total

    def part(i):
        pair = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        return pair, jnp.minimum(pair // total, len(x) - 1), pair % total

    def draw(i):
        _, row, number = part(i)
        return (x[row] + sigma * _normal(keys[row], start + number, x.shape[1:])).astype(x.dtype)

    def count(i, carry):
        tally, noisy = carry
        pair, row, number = part(i)
        logits = logits_fn(noisy, *args)
        column = logits.argmax(1).astype(jnp.int32) + classes * (number >= first)
        column = jnp.where(jnp.isnan(logits).any(1), 2 * classes, column)
        tally = tally.at[row, column].add((pair < pairs).astype(jnp.int32))
        # One pass ahead: drawn where it is used, the noise is fused into the first convolution on
        # CPU, which then computes each number once per kernel position, and is 1.7 times slower.
        return tally, draw(i + 1)

    tally = parallel.varying(jnp.zeros((len(x), 2 * classes + 1), jnp.int32), axis_name)
    return jax.lax.fori_loop(0, (pairs + chunk - 1) // chunk, count, (tally, draw(0)))[0]


def _normal(keys, numbers, shape):
    """Standard normal noise, one [*shape] per key and sample number."""
    draw = lambda key, number: jax.random.normal(jax.random.fold_in(key, number), shape)  # noqa: E731
    return jax.vmap(draw)(keys, numbers)


def _classes(logits_fn, x, args):
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    logits = jax.eval_shape(logits_fn, one, *args)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 1:
        got = f"a {type(logits).__name__}" if shape is None else f"shape {shape} for one example"
        raise ValueError(f"logits_fn must return [b, classes], got {got}")
    return shape[1]


def _checked(x, key, sigma, chunk, bounds):
    inputs.check_number("sigma", sigma, low=0, strict=True)
    if not isinstance(sigma, jax.core.Tracer) and not np.isfinite(sigma).all():
        raise ValueError(f"sigma must be finite, got {sigma}")
    if np.ndim(sigma):
        raise ValueError(f"sigma must be one number, got shape {np.shape(sigma)}")
    if chunk is not None:
        inputs.check_steps(chunk, "chunk")
    x = inputs.check_images(x, inputs.check_bounds(bounds))
    return x, example_keys(key, x.shape[0]), chunk or _chunk_of(x.shape[1:])


def _chunk_of(shape):
    """The default of `chunk` for images of this shape."""
    numbers, images = PASS.get(jax.default_backend(), PASS_ELSEWHERE)
    return min(images, max(8, numbers // max(math.prod(shape), 1)))
