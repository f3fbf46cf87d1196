"""Layers that every model shares (convolution, dense, normalisation) and the mode of a call.

A layer is called as `layer(x, mode)`. `Mode` says what changes from call to call (training or
inference, the mesh axis, the compute dtype), so that one module serves every call and nothing hides
in its fields. Parameters and running statistics stay float32 whatever the mode.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jaxrobust.models.convolution import conv2d

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's own
    "tanh": jnp.tanh,
}
NORMS = ("batch", "group", "none")

# U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), what the published classifiers' last layers start from.
UNIFORM_FAN_IN = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Mode(NamedTuple):
    """What changes from one call of a module to the next; hashable, so static under `jit`."""

    train: bool = False
    axis_name: str | tuple[str, ...] | None = None
    dtype: Any = None  # None computes in the promoted dtype of input and parameters

    def cast(self, *arrays: Array) -> tuple[Array, ...]:
        """All arrays in the compute dtype."""
        dtype = jnp.result_type(*arrays) if self.dtype is None else self.dtype
        return tuple(a.astype(dtype) for a in arrays)


INFERENCE = Mode()


def activate(x: Array, name: str) -> Array:
    """The activation called `name` (see `ACTIVATIONS`), elementwise."""
    return ACTIVATIONS[name](x)


def normalise(
    x: Float[Array, "b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b h w c"]:
    """(x - mean) / std per channel: a model's own first line, so that `eps` keeps the image's unit.

    Args:
        x: [b, h, w, c] images in [0, 1].
        mean: one number, or c numbers, in the unit of x.
        std: likewise, > 0.

    Returns:
        [b, h, w, c] normalised images, at least float32.

    Raises:
        ValueError: `mean` or `std` has neither one entry nor one per channel.
    """
    for name, value in (("mean", mean), ("std", std)):
        if len(value) not in (1, x.shape[-1]):
            raise ValueError(f"{name} must have 1 or {x.shape[-1]} entries, got {tuple(value)}")
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x - jnp.asarray(mean, x.dtype)) / jnp.asarray(std, x.dtype)


def check_common(*, mean: Sequence[float], std: Sequence[float], **choices: str) -> None:
    """Raise on a bad `mean`, `std`, `activation` or `norm`, before anything is built."""
    for name, values, low in (("mean", mean, -math.inf), ("std", std, 0.0)):
        flat = np.ndim(values) == 1 and len(values) > 0
        if not flat or not all(low < value < math.inf for value in values):
            kind = "finite numbers" + ", > 0" * (name == "std")
            raise ValueError(f"{name} must be {kind}, one or one per channel, got {values}")
    for name, known in (("activation", tuple(ACTIVATIONS)), ("norm", NORMS)):
        check_choice(name, choices.get(name, known[0]), known)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_counts(**counts: Any) -> None:
    """Raise ValueError unless every count is an integer >= 1."""
    for name, value in counts.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


class Conv(nn.Module):
    """Square-kernel convolution; `padding` is "symmetric" (k // 2 each side), SAME or VALID.

    `groups` splits both input and output channels; as many groups as channels is depthwise.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    padding: str = "symmetric"
    use_bias: bool = False
    groups: int = 1
    init: Callable[..., Array] | None = None  # of the kernel; None is He et al. 2015, see below

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w ci"], mode: Mode = INFERENCE
    ) -> Float[Array, "b oh ow co"]:
        """Cross-correlate, then add the bias if there is one."""
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.features)
        # He et al. 2015, in the fan-out form of the published wide nets: N(0, 2 / fan_out), with
        # fan_out = k k c_out / groups, since an input channel reaches its own group only.
        wide = nn.initializers.variance_scaling(2.0 * self.groups, "fan_out", "normal")
        x, kernel = mode.cast(x, self.param("kernel", self.init or wide, shape, jnp.float32))
        padding = self.kernel // 2 if self.padding == "symmetric" else self.padding
        y = conv2d(x, kernel, stride=self.stride, padding=padding, groups=self.groups)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(y.dtype)
        return y


class Dense(nn.Module):
    """Affine map of the last axis; its bias starts at zero, or, as PyTorch's, as UNIFORM_FAN_IN."""

    features: int
    init: Callable[..., Array] = UNIFORM_FAN_IN
    uniform_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b d"], mode: Mode = INFERENCE
    ) -> Float[Array, "*b features"]:
        """Return x @ kernel + bias."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.init, shape, jnp.float32)
        start = _uniform(shape[0] ** -0.5) if self.uniform_bias else nn.initializers.zeros
        bias = self.param("bias", start, (self.features,), jnp.float32)
        x, kernel, bias = mode.cast(x, kernel, bias)
        # As one matrix: XLA's CPU backend takes three times as long for the gradient of a product
        # that sums over two axes.
        flat = x.reshape(-1, x.shape[-1])
        return (flat @ kernel + bias).reshape(*x.shape[:-1], self.features)


def _uniform(bound: float) -> Callable[..., Array]:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class BatchNorm(nn.Module):
    """Batch normalisation with the published nets' constants, statistics over the whole mesh axis.

    Training: y = (x - m) / sqrt(v + eps) * scale + bias with m and v of the global batch; the
    running statistics move once, running <- 0.9 running + 0.1 (m, v n / (n - 1)). Inference: the
    running statistics take the place of m and v. The unbiased n / (n - 1) and momentum 0.1 are
    PyTorch's, on which the published weights were trained.

    Source: Ioffe and Szegedy 2015, algorithm 1 and 2.
    """

    momentum: float = 0.9
    eps: float = 1e-5
    scale_init: Callable[..., Array] = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b h w c"]:
        """Normalise every channel; in training, also move the running statistics."""
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        mean, var = running_mean.value, running_var.value
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if mode.train:
            mean, var, count = _moments(wide, jax.lax.stop_gradient(mean), mode.axis_name)
            unbiased = var * (count / max(count - 1, 1))
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        y = (wide - mean) * (jax.lax.rsqrt(var + self.eps) * scale) + bias
        return y.astype(_output_dtype(x, mode))


def _moments(
    x: Float[Array, "b h w c"], shift: Float[Array, " c"], axis_name: str | tuple[str, ...] | None
) -> tuple[Float[Array, " c"], Float[Array, " c"], int]:
    """Mean, biased variance and count per channel of the global batch, in one pass over x.

    Both moments are taken about `shift` (the running mean): the textbook E[x^2] - E[x]^2 loses all
    digits where the mean is large against the spread, and a second pass would cost a second
    all-reduce per layer.
    """
    centred = x - shift
    moments = jnp.stack([centred.mean((0, 1, 2)), jnp.square(centred).mean((0, 1, 2))])
    count = x.shape[0] * x.shape[1] * x.shape[2]
    if axis_name is not None:
        moments = jax.lax.pmean(moments, axis_name)
        count = count * jax.lax.psum(1, axis_name)
    first, second = moments
    return first + shift, jnp.maximum(second - jnp.square(first), 0.0), count


class GroupNorm(nn.Module):
    """Group normalisation: statistics per example, so a prediction never depends on its batch.

    Groups of 16 channels (of gcd(c, 16) where 16 does not divide c; one group up to 16 channels).

    Source: Wu and He 2018, table 3 (16 channels per group).
    """

    group_size: int = 16
    eps: float = 1e-5
    scale_init: Callable[..., Array] = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], mode: Mode = INFERENCE
    ) -> Float[Array, "b h w c"]:
        """Normalise every group of channels of every example."""
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        size = channels if channels <= self.group_size else math.gcd(channels, self.group_size)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - _group_mean(wide, size)
        var = _group_mean(jnp.square(centred), size)
        y = centred * (jax.lax.rsqrt(var + self.eps) * scale) + bias
        return y.astype(_output_dtype(x, mode))


def _group_mean(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b 1 1 c"]:
    # Over the pixels first, on the image's own layout: a five-dimensional view of it is slower.
    per_channel = x.mean((1, 2), keepdims=True)
    groups = per_channel.reshape(*per_channel.shape[:-1], -1, size).mean(-1)
    return jnp.repeat(groups, size, axis=-1)


class LayerNorm(nn.Module):
    """Layer normalisation of the last axis (Ba et al. 2016); eps 1e-6 as in published ViTs."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], mode: Mode = INFERENCE) -> Float[Array, "*b d"]:
        """Normalise every token."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        var = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(var + self.eps) * scale + bias
        return y.astype(_output_dtype(x, mode))


class Point(nn.Module):
    """The identity with a name: makes a value that no layer returns readable as a tap."""

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return x itself."""
        return x


def norm_layer(kind: str, name: str, *, zero: bool = False) -> Callable[[Array, Mode], Array]:
    """The normalisation layer of this `kind`; `name` keeps the published nets' `bn1` for all.

    With `zero` its scale starts at zero, so that a residual branch that ends in it starts absent.
    """
    if kind == "none":
        return lambda x, mode: x
    start = nn.initializers.zeros if zero else nn.initializers.ones
    return (BatchNorm if kind == "batch" else GroupNorm)(scale_init=start, name=name)


class Stack(nn.Module):
    """Blocks one after the other, named "0", "1", ... as in published state dicts.

    With `remat`, a block's inside is computed again in the backward pass instead of kept: memory
    falls to about one block plus the blocks' outputs, for about a third more work.
    """

    block: type[nn.Module]
    settings: Sequence[Mapping[str, Any]]
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."], mode: Mode = INFERENCE) -> Float[Array, "..."]:
        """Apply every block in turn."""
        block = nn.remat(self.block, static_argnums=(2,)) if self.remat else self.block
        for index, setting in enumerate(self.settings):
            x = block(**setting, name=str(index))(x, mode)
        return x


def _output_dtype(x: Array, mode: Mode) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32) if mode.dtype is None else mode.dtype
