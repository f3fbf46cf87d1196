"""Pre-processors that learn nothing: JPEG and total variation. Known to break under attack.

They stand here because people ask, and because an attack that does not break them is no attack.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxrobust.models.bound import Bound
from jaxrobust.models.layers import check_counts
from jaxrobust.models.model import Model, images

_BLOCK = 8
# Tables K.1 and K.2 of the standard (ITU-T T.81), which libjpeg scales by its quality.
_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMINANCE = np.full((_BLOCK, _BLOCK), 99)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)


def jpeg(quality: int = 75) -> Model:
    """JPEG compression without chroma subsampling, as a model without variables.

    Rounding has no gradient: white-box PGD sees a model that does not react. Attack it with
    `attacks.bpda`, which passes the gradient straight through.

    Args:
        quality: 1 to 100, libjpeg's scale.

    Returns:
        A Model from images [b, h, w, c] in [0, 1], c = 1 or 3, of any size, to the same.

    Raises:
        ValueError: quality is not an integer from 1 to 100.
    """
    check_counts(quality=quality)
    if quality > 100:
        raise ValueError(f"quality must be <= 100, got {quality}")
    return _filter("jpeg", _jpeg, quality=int(quality))


def total_variation(weight: float = 0.1, steps: int = 30) -> Model:
    """Total variation denoising, argmin_z |z - x|^2 / 2 + weight TV(z), as a model.

    By projected gradient steps on the dual, which are differentiable: attacks go through them.

    Args:
        weight: >= 0, in the unit of the images: larger is smoother.
        steps: iterations of the dual, >= 1.

    Returns:
        A Model from images [b, h, w, c] in [0, 1] to the same; channels are joined in one norm of
        the gradient.

    Raises:
        ValueError: weight < 0 or steps < 1.

    Source: Rudin et al. 1992; Chambolle 2004, eq. 9, with the projected step of Chambolle 2005.
    """
    check_counts(steps=steps)
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be >= 0 and finite, got {weight}")
    return _filter("total_variation", _total_variation, weight=float(weight), steps=int(steps))


def _filter(name: str, function: Callable[..., Array], **options: int | float) -> Model:
    filtered = Bound(function, **options)
    return Model(
        init=_init,
        apply=Bound(_apply, name, filtered),
        train=Bound(_train, name, filtered),
        config={"name": name, **options},
    )


def _init(key: Array, shape: Any) -> dict[str, Any]:
    return {"params": {}}


def _apply(
    name: str,
    filtered: Bound,
    variables: Any,
    x: ArrayLike,
    taps: Any = (),
    perturbations: Any = None,
    dtype: Any = None,
) -> Any:
    if taps or perturbations:
        raise ValueError(f"{name} has no activations, got {taps or perturbations}")
    return filtered(images(x))


def _train(
    name: str,
    filtered: Bound,
    variables: Any,
    x: ArrayLike,
    *,
    axis_name: Any = None,
    dtype: Any = None,
    taps: Any = (),
) -> Any:
    return _apply(name, filtered, variables, x, taps), {}


def _jpeg(x: Float[Array, "b h w c"], *, quality: int) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    if c not in (1, 3):
        raise ValueError(f"x must have 1 or 3 channels, got shape {x.shape}")
    x = jnp.pad(x, ((0, 0), (0, -h % _BLOCK), (0, -w % _BLOCK), (0, 0)), mode="edge")
    exact = {"precision": jax.lax.Precision.HIGHEST}  # what is rounded next shows every error
    planes = jnp.round(255 * x)
    if c == 3:
        planes = jnp.matmul(planes, _TO_YCC.T.astype(x.dtype), **exact)
        planes = jnp.round(planes + jnp.array([0, 128, 128], x.dtype))
    tables = quantisation(quality)[[0, 1, 1][:c]].astype(x.dtype)
    rows, columns = planes.shape[1] // _BLOCK, planes.shape[2] // _BLOCK
    blocks = (planes - 128).reshape(b, rows, _BLOCK, columns, _BLOCK, c)
    wave = _cosines().astype(x.dtype)
    coefficients = jnp.einsum("bricjk,ui,vj->brckuv", blocks, wave, wave, **exact)
    coefficients = jnp.round(coefficients / tables) * tables
    blocks = jnp.einsum("brckuv,ui,vj->bricjk", coefficients, wave, wave, **exact)
    planes = jnp.clip(jnp.round(blocks.reshape(planes.shape) + 128), 0, 255)
    if c == 3:
        back = np.linalg.inv(_TO_YCC).T.astype(x.dtype)
        planes = jnp.matmul(planes - jnp.array([0, 128, 128], x.dtype), back, **exact)
        planes = jnp.round(planes)
    return jnp.clip(planes / 255, 0, 1)[:, :h, :w]


def quantisation(quality: int) -> Int[np.ndarray, "2 8 8"]:
    """The steps of brightness and of colour by frequency, in integers as libjpeg computes them."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((np.stack([_LUMINANCE, _CHROMINANCE]) * scale + 50) // 100, 1, 255)


def _cosines() -> np.ndarray:
    """The orthonormal DCT-II matrix, [frequency, place]."""
    place, frequency = np.arange(_BLOCK), np.arange(_BLOCK)[:, None]
    wave = np.cos(math.pi * (2 * place + 1) * frequency / (2 * _BLOCK)) * math.sqrt(2 / _BLOCK)
    wave[0] /= math.sqrt(2)
    return wave


def _total_variation(
    x: Float[Array, "b h w c"], *, weight: float, steps: int
) -> Float[Array, "b h w c"]:
    if weight == 0:
        return x

    def ascend(_, dual):
        slope = _gradient(x - weight * _adjoint(dual))
        # On a grid |gradient|^2 <= 8, so that this step cannot overshoot.
        moved = dual + slope / (8 * weight)
        length = jnp.sqrt(jnp.maximum(jnp.square(moved).sum((0, 4), keepdims=True), 1))
        return moved / length

    # A scan and not a loop without a tape: attacks differentiate through it. The first step is
    # apart, after which the carry differs by device wherever x does.
    dual = ascend(None, jnp.zeros((2, *x.shape), x.dtype))
    dual = jax.lax.scan(lambda d, i: (ascend(i, d), None), dual, None, length=steps - 1)[0]
    return jnp.clip(x - weight * _adjoint(dual), 0, 1)


def _gradient(z: Float[Array, "b h w c"]) -> Float[Array, "2 b h w c"]:
    """Differences to the next pixel downwards and to the right; 0 at the border."""
    down = jnp.pad(z[:, 1:] - z[:, :-1], ((0, 0), (0, 1), (0, 0), (0, 0)))
    right = jnp.pad(z[:, :, 1:] - z[:, :, :-1], ((0, 0), (0, 0), (0, 1), (0, 0)))
    return jnp.stack([down, right])


def _adjoint(dual: Float[Array, "2 b h w c"]) -> Float[Array, "b h w c"]:
    """The transpose of `_gradient`."""
    down, right = dual[0][:, :-1], dual[1][:, :, :-1]
    ends = lambda d, axis, side: jnp.pad(  # noqa: E731
        d, [(side if a == axis else (0, 0)) for a in range(4)]
    )
    return (
        ends(down, 1, (1, 0)) - ends(down, 1, (0, 1)) + ends(right, 2, (1, 0))
        - ends(right, 2, (0, 1))
    )  # fmt: skip
