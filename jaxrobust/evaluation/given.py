"""What an evaluation is given: images, labels, keys and a classifier, refused before any attack."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrobust.attacks import classifier, inputs
from jaxrobust.keys import check_key, numbered_keys


def check_bounds(bounds: Any) -> tuple[float, float]:
    """The box as floats.

    Raises:
        ValueError: None, which other functions take for no box, or not (low, high).
    """
    if bounds is None or np.shape(bounds) != (2,):
        raise ValueError(f"bounds must be (low, high), the box of the images, got {bounds!r}")
    return inputs.check_bounds(bounds)


def check_examples(
    images: Any, labels: Any, indices: Any, key: jax.Array, bounds: Any
) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Images float32, labels int32, and a key for each example; refuses what is not of that form.

    Args:
        images: [n, h, w, c] float in `bounds`.
        labels: [n] whole numbers.
        indices: [n] whole numbers; None is 0 .. n - 1.
        key: one typed key; example i gets fold_in(key, indices[i]).
        bounds: the box.

    Raises:
        TypeError, ValueError: names the argument, its value and what was expected.
    """
    bounds = check_bounds(bounds)
    kind = type(images).__name__
    with contextlib.suppress(ValueError):  # of parts of unequal shapes
        images = np.asarray(images)
    if not isinstance(images, np.ndarray) or images.dtype == object:
        raise TypeError(f"images must be an array [n, h, w, c], got {kind}")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be [n, h, w, c] with n >= 1, got shape {images.shape}")
    inputs.check_images(images, bounds, "images")
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"labels must be [{len(images)}] whole numbers, got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be whole numbers, got {labels.dtype}")
    if np.ndim(key) != 0:
        raise ValueError(f"key must be one typed key, got shape {np.shape(key)}")
    check_key(key)
    keys = numbered_keys(key, check_indices(indices, len(images)))
    return images.astype(np.float32), labels.astype(np.int32), keys


def check_indices(indices: Any, count: int) -> np.ndarray:
    """The examples' numbers in their data set, 0 .. count - 1 if `indices` is None.

    Raises:
        TypeError, ValueError: they are not [count] whole numbers.
    """
    indices = np.arange(count) if indices is None else np.asarray(indices)
    if indices.shape != (count,):
        raise ValueError(f"indices must have shape {(count,)}, got {indices.shape}")
    if not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(f"indices must be whole numbers, got {indices.dtype}")
    return indices


def class_count(
    logits_fn: Any, shape: tuple[int, ...], args: Any, *, draws: int = 0, rows: int = 1
) -> int:
    """How many classes a classifier of images tells apart; asks for shapes alone.

    Args:
        logits_fn: (x, *args) -> [b, classes], or (x, keys, *args) with draws > 0.
        shape: (h, w, c).
        args: what it takes besides.
        draws: as of the attacks.
        rows: b.

    Raises:
        TypeError: no function, one that takes x last, or args that are no tuple.
        ValueError: fewer than 2 logits, or what is not one array [b, classes].
    """
    if not callable(logits_fn):
        advice = "lambda x, variables: model.apply(variables, x), with args=(variables,)"
        raise TypeError(
            "logits_fn must be a function (x, *args) -> [b, classes], got "
            f"{type(logits_fn).__name__}" + f": pass {advice}" * hasattr(logits_fn, "apply")
        )
    args = inputs.check_args(args)
    x = jax.ShapeDtypeStruct((rows, *shape), np.float32)
    keys = (jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),) if draws else ()
    try:
        return classifier.class_count(logits_fn, x, (*keys, *args))
    except Exception as error:
        if not _takes_x_last(logits_fn, x, args):  # the function's own error says it best
            raise
        raise TypeError(
            "logits_fn must take (x, *args), got one that takes x last, as apply does: pass "
            "lambda x, variables: apply(variables, x)"
        ) from error


def _takes_x_last(logits_fn: Callable, x, args):
    with contextlib.suppress(Exception):
        return bool(args) and len(jax.eval_shape(logits_fn, *args, x).shape) == 2
    return False
