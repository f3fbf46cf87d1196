"""Accuracy under attack: per example, in fixed batches, on all devices, along a range of eps."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxrobust import inference, losses, metrics, parallel
from jaxrobust.attacks.inputs import check_labels, check_steps
from jaxrobust.attacks.wrap import check_takes_loss
from jaxrobust.data import check_images
from jaxrobust.keys import example_keys

Apply = Callable[..., jax.Array]


def correct(
    apply: Apply,
    variables: Any,
    images: Any,
    labels: Any,
    *,
    attack: Any = None,
    key: jax.Array | None = None,
    mask: Any = None,
    batch_size: int = 250,
    mesh: Mesh | None = None,
    loss: Callable[..., jax.Array] = losses.cross_entropy,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = False,
) -> np.ndarray:
    """Which examples are classified rightly, clean or under an attack.

    Args:
        apply: (variables, x) -> [b, classes] logits: the whole defended model.
        variables: its parameters.
        images: [n, h, w, c] float32 in [0, 1].
        labels: [n] whole numbers.
        attack: a gradient attack, or None for clean images.
        key: one typed key, of which example i draws from fold_in(key, i), whatever the batch size;
            or [n] keys of their own.
        mask: [n, h, w, 1] or [n, h, w, c], 1 where the attack may change a pixel; None for all.
        batch_size: examples at a time, rounded up to a multiple of the devices; the last batch is
            filled up, so that nothing recompiles.
        mesh: spreads each batch over devices; one device by default.
        loss: (logits, labels) -> [b], what the attack raises.
        bounds: the box in which the images are to lie; the attack has its own.
        progress: show a progress bar.

    Returns:
        [n] bool.

    Raises:
        TypeError, ValueError: images, labels or key are not of the form above.
    """
    images, labels = _checked(apply, variables, images, labels, bounds)
    if attack is not None:
        check_takes_loss("accuracy under attack", attack)
    if attack is not None and key is None:
        raise ValueError("key must be a typed key when an attack is given, got None")
    count = len(labels)
    if mask is not None and np.shape(mask)[:3] != images.shape[:3]:
        raise ValueError(f"mask must be [n, h, w, 1] of {images.shape}, got {np.shape(mask)}")
    batch_size = _batch_size(batch_size, count, mesh)
    objective = LossOfModel(apply, loss)
    keys = None if attack is None else example_keys(key, count)
    place = partial(parallel.place, mesh=mesh)
    right = []
    variables = parallel.replicate(variables, mesh)  # once, not with every batch
    batches = list(inference.filled(np.arange(count), batch_size))
    label = "accuracy" if attack is None else f"accuracy under {type(attack).__name__}"
    for rows in tqdm(batches, desc=label, unit="batch", disable=not progress):
        x, y, free = place((images[rows], labels[rows], None if mask is None else mask[rows]))
        if attack is not None:
            x = attack(objective, x, keys[rows], mask=free, args=(variables, y))
        right.append(_correct(apply, variables, x, y))
    return np.concatenate([np.asarray(part) for part in right])[:count]


def accuracy_curve(
    apply: Apply,
    variables: Any,
    images: Any,
    labels: Any,
    attack: Any,
    eps: Sequence[float],
    *,
    key: jax.Array,
    batch_size: int = 250,
    mesh: Mesh | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = False,
) -> np.ndarray:
    """Which examples survive at each radius: one compilation, the radii one after another.

    An example that falls is not attacked at larger radii, whose balls hold the smaller ball's
    perturbation, and one that is misclassified as it is is not attacked at all.

    Args:
        apply: (variables, x) -> [b, classes] logits.
        variables: its parameters.
        images: [n, h, w, c] float32 in [0, 1].
        labels: [n] whole numbers.
        attack: an attack value with an `eps`; a fixed `step_size` stays as it is.
        eps: the radii, rising; at 0 no attack is run.
        key: one typed key, of which example i draws from fold_in(key, i) at every radius; or [n]
            keys of their own.
        batch_size: examples at a time, rounded up to a multiple of the devices; the last batch of a
            radius is filled up.
        mesh: spreads each batch over devices; one device by default.
        bounds: the box in which the images are to lie; the attack has its own.
        progress: show a progress bar.

    Returns:
        [len(eps), n] bool; the mean of a row is the accuracy at that radius.

    Raises:
        TypeError, ValueError: images, labels or key are not of the form above; eps is empty,
            negative or does not rise.
    """
    images, labels = _checked(apply, variables, images, labels, bounds)
    check_takes_loss("accuracy under attack", attack)
    if list(eps) != sorted(eps):
        raise ValueError(f"eps must rise, got {list(eps)}")
    if not len(eps) or min(eps) < 0:
        raise ValueError(f"eps must hold at least one radius, all >= 0, got {list(eps)}")
    count = len(labels)
    batch_size = _batch_size(batch_size, count, mesh)
    keys = example_keys(key, count)
    place = partial(parallel.place, mesh=mesh)
    variables = parallel.replicate(variables, mesh)  # once, not with every batch
    standing = correct(
        apply, variables, images, labels, batch_size=batch_size, mesh=mesh, bounds=bounds
    )
    curve = np.zeros((len(eps), count), bool)
    whole = len(eps) * count
    label = f"accuracy over eps under {type(attack).__name__}"
    with tqdm(total=whole, desc=label, unit="image", disable=not progress) as bar:
        for row, radius in enumerate(eps):
            left, found = np.flatnonzero(standing) if radius else np.array([], int), []
            for rows in inference.filled(left, batch_size):
                batch = place((images[rows], labels[rows], keys[rows]))
                right = _correct_at(apply, attack, np.float32(radius), variables, *batch)
                found.append((rows, right))
                bar.update(len(np.unique(rows)))
            # Not before: the next batch is under way while one is being computed.
            for rows, right in found:
                standing[rows] = right
            curve[row] = standing
            bar.update((row + 1) * count - bar.n)
    return curve


@jax.jit(static_argnums=0)
def _correct_at(apply, attack, radius, variables, images, labels, keys):
    attack = dataclasses.replace(attack, eps=radius)
    x = attack(LossOfModel(apply), images, keys, args=(variables, labels))
    return _correct(apply, variables, x, labels)


@jax.jit(static_argnums=0)
def _correct(apply, variables, images, labels):
    return ~metrics.misclassified(apply(variables, images), labels)


@dataclasses.dataclass(frozen=True)
class AsApply:
    """A `logits_fn` called as `apply`; equal for equal functions, so that it compiles once."""

    logits_fn: Apply

    def __call__(self, args, x):
        """The logits of x."""
        return self.logits_fn(x, *args)


@dataclasses.dataclass(frozen=True)
class LossOfModel:
    """What an attack on a model raises; hashable, so that it compiles once per model.

    Attributes:
        apply: (variables, x) -> [b, classes] logits.
        loss: (logits, labels) -> [b].
    """

    apply: Apply
    loss: Callable[..., jax.Array] = losses.cross_entropy

    def __call__(self, x: jax.Array, variables: Any, labels: jax.Array) -> jax.Array:
        """Losses [b] to raise."""
        return self.loss(self.apply(variables, x), labels)


def _batch_size(wanted, count, mesh):
    check_steps(wanted, "batch_size")
    return parallel.rounded(min(wanted, count), mesh)


def _checked(apply, variables, images, labels, bounds):
    images = check_images(images, bounds)
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    classes = jax.eval_shape(apply, variables, one).shape[-1]
    return images, np.asarray(check_labels(labels, len(images), classes))
