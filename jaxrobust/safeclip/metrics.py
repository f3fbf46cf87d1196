"""What a trained dual encoder can do, what the poisons achieved, and what a split let by.

    prototypes = class_prototypes(encode_captions, class_names)
    scores = embed(encode_images, images) @ prototypes.T
    zero_shot(scores, labels)                      {"top1": .., "top5": ..}
    poison_success(target_scores, adversarial)     Share(successes, n, estimate, low, high)

`encode_images` is any [b, h, w, c] -> [b, d], `encode_captions` any list of texts -> [b, d]. Both
are called with batches of one size, so that a jitted one compiles once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Real

from jaxrobust.attacks.inputs import check_steps
from jaxrobust.data.packages import require
from jaxrobust.metrics import topk_accuracy, wilson_interval
from jaxrobust.safeclip.templates import PROMPTS, prompts
from jaxrobust.training.linear_head import fit_head

# Rows of a similarity matrix that are in memory at a time.
BLOCK = 1024


class Share(NamedTuple):
    """A proportion with its counts and Wilson's interval; NaN where n is 0."""

    successes: int
    n: int
    estimate: float
    low: float
    high: float


class Backdoor(NamedTuple):
    """What a trigger does to images that are not of the target class.

    Attributes:
        success: share of the triggered images that are taken for the target.
        without: the same without the trigger: what is no success of the attack.
        accuracy: share of the triggered images whose true class is found all the same.
        clean_accuracy: the same without the trigger.
    """

    success: Share
    without: Share
    accuracy: Share
    clean_accuracy: Share


class Detection(NamedTuple):
    """How well a score tells poisons from the rest; 1 is perfect.

    Attributes:
        auroc: probability that a poison has the higher score; 0.5 is chance.
        average_precision: area under precision over recall; chance is the share of poisons.
    """

    auroc: float
    average_precision: float


def embed(
    encode: Callable[[Any], Any], items: Any, *, batch_size: int = 250
) -> Float[np.ndarray, "n d"]:
    """The embeddings of all images or captions, in batches of one size.

    Args:
        encode: b images, or b texts or token rows, -> [b, d].
        items: n >= 1 of them: an array, or a sequence of texts.
        batch_size: how many at a time; the last batch is filled up with its last item.

    Raises:
        ValueError: no items, or batch_size < 1.
    """
    check_steps(batch_size, "batch_size")
    count = len(items)
    if count < 1:
        raise ValueError("items must be at least one, got none")
    size, found = min(batch_size, count), []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        texts = isinstance(items, list | tuple)
        batch = [items[row] for row in rows] if texts else np.asarray(items[rows])
        found.append(np.asarray(encode(batch), np.float32))
    return np.concatenate(found)[:count]


def class_prototypes(
    encode: Callable[[list[str]], Any],
    class_names: Sequence[str],
    *,
    templates: Sequence[str] = PROMPTS,
    batch_size: int = 250,
) -> Float[np.ndarray, "classes d"]:
    """One unit row per class: the mean of its prompts' unit embeddings, made unit again.

    Args:
        encode: texts -> [b, d].
        class_names: k names.
        templates: of the prompts.
        batch_size: prompts at a time.

    Raises:
        ValueError: as `templates.prompts`.

    Source: Radford et al. 2021, section 3.1.4.
    """
    sentences = prompts(class_names, templates)
    flat = [sentence for of_class in sentences for sentence in of_class]
    rows = _unit(embed(encode, flat, batch_size=batch_size))
    return _unit(rows.reshape(len(class_names), len(templates), -1).mean(1))


def zero_shot(scores: Any, labels: Any, *, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Top-k accuracies, {"top1": share, "top5": share}.

    Args:
        scores: [n, classes], image embeddings times prototypes.
        labels: [n] true classes.
        ks: which k, each at most the number of classes.

    Raises:
        ValueError: as `metrics.topk_accuracy`.
    """
    return {f"top{k}": float(_right(scores, labels, k).mean()) for k in ks}


def retrieval(
    images: Real[np.ndarray, "n d"],
    texts: Real[np.ndarray, "m d"],
    *,
    image_ids: Integer[np.ndarray, "_"] | None = None,
    text_ids: Integer[np.ndarray, "_"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k both ways: is a right one among the k nearest?

    With several right ones the nearest counts. A wrong one at the same distance stands before a
    right one, so that embeddings that are all the same find nothing.

    Args:
        images: [n, d] embeddings; similarities are their products with the texts'.
        texts: [m, d].
        image_ids: [n] what each image shows; by default all differ.
        text_ids: [m] the id of what each text describes: several texts of one image, and several
            images of one text, are right for each other. By default text i is of image i.
        ks: ranks.

    Returns:
        {"image_to_text_r1": .., "text_to_image_r1": .., ...}, shares of the queries.

    Raises:
        ValueError: ids of another number, an image without a text or a text without an image.
    """
    image_ids = np.arange(len(images)) if image_ids is None else np.asarray(image_ids)
    text_ids = np.arange(len(texts)) if text_ids is None else np.asarray(text_ids)
    for name, ids, rows in (("image_ids", image_ids, images), ("text_ids", text_ids, texts)):
        if ids.shape != (len(rows),) or not len(rows):
            raise ValueError(f"{name} must have shape [{len(rows)}], not 0, got {ids.shape}")
    alone = np.setxor1d(image_ids, text_ids)
    if len(alone):
        raise ValueError(
            f"image_ids and text_ids must name the same things, {alone[0]} is in one alone"
        )
    ways = {
        "image_to_text": _ranks(images, texts, image_ids, text_ids),
        "text_to_image": _ranks(texts, images, text_ids, image_ids),
    }
    return {f"{way}_r{k}": float((rank < k).mean()) for way, rank in ways.items() for k in ks}


def linear_probe(
    features: Any, labels: Any, test_features: Any, test_labels: Any, classes: int, **options: Any
) -> float:
    """Accuracy of a linear head that is fitted to frozen features (`training.fit_head`).

    Args:
        features: [n, d] of the training images.
        labels: [n] in [0, classes).
        test_features: [m, d].
        test_labels: [m].
        classes: how many.
        options: of `fit_head`: decay, scale, iterations.

    Raises:
        ValueError: as `fit_head`.
    """
    head = fit_head(features, labels, classes, **options)["params"]
    logits = np.asarray(test_features, np.float32) @ head["kernel"] + head["bias"]
    return float(_right(logits, test_labels, 1).mean())


def poison_success(scores: Any, adversarial: Any, *, k: int = 1) -> Share:
    """Share of the target images that are taken for their adversarial class (PSR).

    Args:
        scores: [m, classes] zero-shot scores of the target images.
        adversarial: [m] class that each was poisoned to be.
        k: taken for it means among the k best.

    Raises:
        ValueError: as `metrics.topk_accuracy`.
    """
    return _share(_right(scores, adversarial, k))


def backdoor_success(
    triggered: Any, clean: Any, labels: Any, target: int, *, k: int = 1
) -> Backdoor:
    """What a trigger does, counted over the images that are not of the target class.

    Args:
        triggered: [n, classes] zero-shot scores of the images with the trigger.
        clean: [n, classes] those without.
        labels: [n] true classes.
        target: the class of the backdoor.
        k: taken for a class means among the k best.

    Raises:
        ValueError: shapes that do not fit, a target that is no class, or no image of another class.
    """
    triggered, clean, labels = np.asarray(triggered), np.asarray(clean), np.asarray(labels)
    if triggered.shape != clean.shape or labels.shape != triggered.shape[:1]:
        raise ValueError(
            "triggered and clean must be [n, classes] and labels [n], got "
            f"{triggered.shape}, {clean.shape} and {labels.shape}"
        )
    if not 0 <= target < triggered.shape[1]:
        raise ValueError(f"target must lie in [0, {triggered.shape[1]}), got {target}")
    others = labels != target
    if not others.any():
        raise ValueError(f"labels must hold another class than the target {target}")
    aim = np.full(int(others.sum()), target, np.int32)
    return Backdoor(
        success=_share(_right(triggered[others], aim, k)),
        without=_share(_right(clean[others], aim, k)),
        accuracy=_share(_right(triggered[others], labels[others], k)),
        clean_accuracy=_share(_right(clean[others], labels[others], k)),
    )


def try_backdoor(
    encode: Callable[[Any], Any],
    prototypes: Real[np.ndarray, "classes d"],
    images: Any,
    labels: Any,
    trigger: Callable[..., Any],
    target: int,
    *,
    indices: Any = None,
    batch_size: int = 250,
    k: int = 1,
) -> Backdoor:
    """Puts the trigger on test images and counts, as `backdoor_success`.

    Args:
        encode: images -> [b, d].
        prototypes: of the classes.
        images: [n, h, w, c] in [0, 1], none of which was poisoned.
        labels: [n] true classes.
        trigger: called with images and indices.
        target: the class of the backdoor.
        indices: [n] ids, for a trigger that is drawn anew; by default row numbers.
        batch_size: images at a time.
        k: as for `backdoor_success`.
    """
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)

    def seen(rows):
        return encode(trigger(np.asarray(images[rows]), indices[rows]))

    triggered = embed(seen, np.arange(len(images)), batch_size=batch_size)
    plain = embed(encode, images, batch_size=batch_size)
    scores = (triggered @ prototypes.T, plain @ prototypes.T)
    return backdoor_success(*scores, labels, target, k=k)


def leak(safe: Bool[np.ndarray, "n"], poisoned: Bool[np.ndarray, "_"]) -> Share:
    """Share of the poisons that are in the safe set; n counts poisons, and may be 0.

    Raises:
        ValueError: masks of different shapes.
    """
    if safe.shape != poisoned.shape:
        raise ValueError(
            f"safe and poisoned must be masks of one shape, got {safe.shape} and {poisoned.shape}"
        )
    return _share(safe[poisoned])


def detection(scores: Real[np.ndarray, "n"], poisoned: Bool[np.ndarray, "_"]) -> Detection:
    """Area under the ROC curve and average precision of a score of suspicion.

    Args:
        scores: [n] finite, the higher the more suspicious: the negative of a similarity.
        poisoned: [n] the truth; both poisons and others.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes that differ, a score that is not finite, or poisons or others alone.
    """
    if scores.shape != poisoned.shape or not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite {poisoned.shape}, got {scores.shape}")
    if poisoned.all() or not poisoned.any():
        raise ValueError(
            f"poisoned must hold poisons and others, got {poisoned.sum()} of {poisoned.size}"
        )
    ranking = require("sklearn.metrics", "scikit-learn", "the curves of a detector")
    return Detection(
        float(ranking.roc_auc_score(poisoned, scores)),
        float(ranking.average_precision_score(poisoned, scores)),
    )


def _right(scores, labels, k) -> Bool[np.ndarray, "n"]:
    labels = jnp.asarray(labels, jnp.int32)
    return np.asarray(topk_accuracy(jnp.asarray(scores), labels, k=k)) > 0


def _share(successes) -> Share:
    hits, count = int(np.sum(successes)), len(successes)
    if not count:
        return Share(0, 0, np.nan, np.nan, np.nan)
    return Share(hits, count, *wilson_interval(hits, count))


def _ranks(queries, keys, query_ids, key_ids) -> Int[np.ndarray, "n"]:
    """How many wrong keys stand before the first right one of each query."""
    found = []
    for start in range(0, len(queries), BLOCK):
        similarity = queries[start : start + BLOCK] @ keys.T
        right = query_ids[start : start + BLOCK, None] == key_ids
        best = np.where(right, similarity, -np.inf).max(1, keepdims=True)
        # Written so that a NaN, which compares as false, stands before everything.
        found.append((~right & ~(similarity < best)).sum(1))
    return np.concatenate(found)


def _unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
