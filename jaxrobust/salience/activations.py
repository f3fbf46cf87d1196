"""Salience from inside the network: Grad-CAM and LayerCAM on any tap, attention roll-out."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrobust.attacks.inputs import check_steps
from jaxrobust.salience.gradients import Apply, Images, Keys, Labels, Scores, label_logit


def grad_cam(apply: Apply, x: Images, labels: Labels, keys: Keys = None, *, tap: str) -> Scores:
    """Grad-CAM: the layer's channels, weighted by their mean gradient.

    relu( sum_k w_k A_k ),  w_k = mean over positions of d z_y / d A_k

    Args:
        apply: `Model.apply` with its variables bound: x -> logits, with `taps`, `perturbations`.
        x: [b, h, w, c] images in [0, 1].
        labels: [b] the classes that are explained.
        keys: unused; all methods are called alike.
        tap: name of an activation [b, h', w', k], or of tokens [b, n, k]; in the source the last
            convolution.

    Returns:
        [b, h, w, 1] scores >= 0, resized to the image bilinearly.

    Raises:
        ValueError: an unknown tap, or one that has no positions.

    Source: Selvaraju et al. 2017, eq. 1 and 2.
    """
    weigh = lambda gradients: gradients.mean((1, 2), keepdims=True)  # noqa: E731
    return _cam(apply, x, labels, tap, weigh)


def layer_cam(apply: Apply, x: Images, labels: Labels, keys: Keys = None, *, tap: str) -> Scores:
    """LayerCAM: every position of a channel weighted by its own gradient, if that is positive.

    relu( sum_k relu(d z_y / d A_k) A_k ), position by position

    Finer than Grad-CAM on early layers. Arguments, result and errors as `grad_cam`.

    Source: Jiang et al. 2021, eq. 5 to 7.
    """
    return _cam(apply, x, labels, tap, jax.nn.relu)


def attention_rollout(
    apply: Apply, x: Images, labels: Labels, keys: Keys = None, *, blocks: int
) -> Scores:
    """Attention roll-out: how much of each patch reaches what a ViT's head reads.

    R = (A_L + I)/2 ... (A_1 + I)/2,  A_l = mean over the heads of block l's attention

    The class token's row of R is the map; without a class token, the mean over all rows.

    Args:
        apply: `models.vit`'s `apply` with its variables bound.
        x: [b, h, w, c] images in [0, 1].
        labels: unused: attention explains no class in particular.
        keys: unused.
        blocks: how many blocks the ViT has, >= 1.

    Returns:
        [b, h, w, 1] scores >= 0, resized to the image bilinearly.

    Raises:
        ValueError: blocks < 1, or the model has no such blocks.

    Source: Abnar and Zuidema 2020, eq. 1 and 2 with the residual of section 3.
    """
    check_steps(blocks, "blocks")
    names = tuple(f"blocks.{i}.attn.maps" for i in range(blocks))
    _, maps = apply(x, taps=names)
    first = maps[names[0]]
    identity = jnp.eye(first.shape[-1], dtype=first.dtype)
    rollout = jnp.broadcast_to(identity, (len(x), *identity.shape))
    for name in names:
        mixed = (maps[name].mean(1) + identity) / 2
        rollout = jnp.matmul(mixed, rollout, precision="highest")
    skip, *_ = token_grid(first.shape[-1], *x.shape[1:3])
    reached = rollout[:, 0] if skip else rollout.mean(1)
    return _resized(_grid(reached[..., None], x), x)


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int, int]:
    """How tokens tile an image: (class tokens before them, rows, columns) of square patches.

    Raises:
        ValueError: neither `tokens` nor `tokens` - 1 square patches tile the image.
    """
    for skip in (0, 1):
        if tokens <= skip:
            continue
        patch = math.isqrt(height * width // (tokens - skip))
        rows, columns = height // max(patch, 1), width // max(patch, 1)
        exact = rows * patch == height and columns * patch == width
        if exact and rows * columns == tokens - skip:
            return skip, rows, columns
    raise ValueError(f"{tokens} tokens do not tile an image of {height}x{width} in square patches")


def _cam(apply, x, labels, tap, weigh: Callable[[Array], Array]):
    _, shapes = jax.eval_shape(lambda x: apply(x, taps=(tap,)), x)

    def total(delta):
        logits, values = apply(x, taps=(tap,), perturbations={tap: delta})
        return label_logit(logits, labels).sum(), values[tap]

    # Plus 0 x: a constant would be the same on all devices of a mesh, and its gradient their sum.
    zero = jnp.zeros(shapes[tap].shape, shapes[tap].dtype) + 0 * x.sum().astype(shapes[tap].dtype)
    gradients, activation = jax.grad(total, has_aux=True)(zero)
    gradients, activation = _grid(gradients, x, tap), _grid(activation, x, tap)
    cam = jax.nn.relu((weigh(gradients) * activation).sum(-1, keepdims=True))
    return _resized(cam, x)


def _grid(activation: Array, x: Images, tap: str = "maps") -> Float[Array, "b rows columns k"]:
    """An activation laid out over the image; of tokens, those that are patches."""
    if activation.ndim == 4:
        return activation
    if activation.ndim != 3:
        raise ValueError(
            f"tap must have positions, [b, h, w, k] or [b, tokens, k]; {tap!r} has shape "
            f"{activation.shape}"
        )
    skip, rows, columns = token_grid(activation.shape[1], *x.shape[1:3])
    return activation[:, skip:].reshape(len(activation), rows, columns, -1)


def _resized(scores, x):
    return jax.image.resize(scores, (*x.shape[:3], 1), "bilinear")
