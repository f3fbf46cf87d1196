"""SAFECLIP's metrics, on embeddings small enough to count by hand."""

import numpy as np
import pytest
import sklearn.metrics

from jaxrobust import cropd, training
from jaxrobust.metrics import wilson_interval
from jaxrobust.safeclip import metrics, triggers

RANDOM = np.random.default_rng(3)


def test_items_are_embedded_in_batches_of_one_size():
    seen = []

    def encode(batch):
        seen.append(len(batch))
        return np.asarray(batch).reshape(len(batch), -1)[:, :2]

    images = RANDOM.random((7, 2, 2, 1), dtype=np.float32)
    found = metrics.embed(encode, images, batch_size=3)
    np.testing.assert_array_equal(found, images.reshape(7, 4)[:, :2])
    assert seen == [3, 3, 3]
    texts = ["a", "bb", "ccc"]
    found = metrics.embed(lambda b: np.array([[len(t)] for t in b]), texts, batch_size=2)
    np.testing.assert_array_equal(found, [[1], [2], [3]])
    with pytest.raises(ValueError, match="at least one"):
        metrics.embed(encode, [])


def test_a_prototype_is_the_unit_mean_of_unit_prompts():
    table = {"a cat": [3, 0], "b cat": [0, 0.5], "a dog": [-1, 0], "b dog": [-2, 0]}
    found = metrics.class_prototypes(
        lambda texts: np.array([table[text] for text in texts], np.float32),
        ["cat", "dog"],
        templates=("a {}", "b {}"),
        batch_size=3,
    )
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[half, half], [-1, 0]], atol=1e-6)


def test_zero_shot_counts_the_k_best():
    scores = np.array([[3, 2, 1], [1, 3, 2], [3, 1, 2]], np.float32)
    found = metrics.zero_shot(scores, [0, 2, 1], ks=(1, 2, 3))
    assert found == pytest.approx({"top1": 1 / 3, "top2": 2 / 3, "top3": 1})
    with pytest.raises(ValueError, match=r"k must lie in \[1, 3\]"):
        metrics.zero_shot(scores, [0, 2, 1])


def slow_recall(queries, keys, query_ids, key_ids, k):
    hits = 0
    for query, own in zip(queries, query_ids, strict=True):
        order = np.argsort(-(keys @ query), kind="stable")[:k]
        hits += any(key_ids[row] == own for row in order)
    return hits / len(queries)


def test_retrieval_equals_a_slow_count_with_several_captions_of_an_image(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 4)
    images, texts = RANDOM.normal(size=(9, 3)), RANDOM.normal(size=(23, 3))
    image_ids = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7])
    text_ids = np.concatenate([np.arange(8), RANDOM.integers(0, 8, 15)])
    found = metrics.retrieval(images, texts, image_ids=image_ids, text_ids=text_ids)
    for k in (1, 5, 10):
        there = slow_recall(images, texts, image_ids, text_ids, k)
        back = slow_recall(texts, images, text_ids, image_ids, k)
        assert found[f"image_to_text_r{k}"] == pytest.approx(there)
        assert found[f"text_to_image_r{k}"] == pytest.approx(back)
    assert 0 < found["image_to_text_r1"] < 1


def test_retrieval_finds_itself_and_not_among_equals_or_nans():
    eye = np.eye(12)
    assert set(metrics.retrieval(eye, eye).values()) == {1.0}
    flat = metrics.retrieval(np.ones((12, 2)), np.ones((12, 2)))
    assert set(flat.values()) == {0.0}
    assert set(metrics.retrieval(np.nan * eye, eye).values()) == {0.0}


def test_retrieval_is_refused_ids_that_do_not_match():
    eye = np.eye(3)
    with pytest.raises(ValueError, match="3 is in one alone"):
        metrics.retrieval(eye, np.eye(4, 3))
    with pytest.raises(ValueError, match="text_ids must have shape"):
        metrics.retrieval(eye, eye, text_ids=np.arange(2))


def test_a_linear_probe_separates_what_is_separable_and_cropd_has_the_same_head():
    assert cropd.fit_head is training.linear_head.fit_head
    labels = np.arange(60) % 3
    features = np.eye(3)[labels] + 0.1 * RANDOM.normal(size=(60, 3))
    args = features[:30], labels[:30], features[30:]
    assert metrics.linear_probe(*args, labels[30:], 3) == 1
    assert metrics.linear_probe(*args, (labels[30:] + 1) % 3, 3, decay=0.1) == 0


def test_poison_success_is_a_share_with_wilsons_interval():
    scores = np.eye(4, dtype=np.float32)
    found = metrics.poison_success(scores, [0, 1, 0, 3])
    assert found == (3, 4, *wilson_interval(3, 4))
    assert metrics.poison_success(scores, [0, 1, 0, 3], k=2).successes == 4


def test_backdoor_success_leaves_out_the_images_of_the_target():
    #            label:  0  0  1  1  2(target)
    labels = np.array([0, 0, 1, 1, 2])
    clean = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2]]
    triggered = np.eye(3, dtype=np.float32)[[2, 0, 2, 2, 2]]
    found = metrics.backdoor_success(triggered, clean, labels, 2)
    assert found.success[:2] == (3, 4)
    assert found.without[:2] == (1, 4)
    assert found.accuracy[:2] == (1, 4)
    assert found.clean_accuracy[:2] == (3, 4)
    assert found.success.low < 0.75 < found.success.high
    for message, arguments in (
        ("must be \\[n, classes\\]", (triggered, clean[:3], labels, 2)),
        ("target must lie", (triggered, clean, labels, 3)),
        ("another class", (triggered[4:], clean[4:], labels[4:], 2)),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.backdoor_success(*arguments)


def test_a_backdoor_is_tried_on_triggered_images():
    def encode(x):
        """Bright upper left corner: class 1; else class 0."""
        lit = np.asarray(x)[:, 0, 0, 0] == 1
        return np.stack([~lit, lit], 1).astype(np.float32)

    images = 0.5 * np.ones((5, 6, 6, 1), np.float32)
    trigger = triggers.badnets(0.2, pattern="white", place=(0, 0))
    found = metrics.try_backdoor(
        encode, np.eye(2), images, np.array([0, 0, 0, 0, 1]), trigger, 1, batch_size=2
    )
    assert found.success[:3] == (4, 4, 1.0)
    assert found.without.successes == found.accuracy.successes == 0
    assert found.clean_accuracy.estimate == 1


def test_the_leak_is_the_share_of_the_poisons_that_pass():
    safe = np.array([True, True, False, True, False])
    poisoned = np.array([False, True, True, False, True])
    assert metrics.leak(safe, poisoned)[:2] == (1, 3)
    assert metrics.leak(safe, poisoned).estimate == pytest.approx(1 / 3)
    none = metrics.leak(safe, np.zeros(5, bool))
    assert none.n == 0
    assert np.isnan(none[2:]).all()
    with pytest.raises(ValueError, match="one shape"):
        metrics.leak(safe, poisoned[:3])


def test_detection_is_by_pairs_and_by_precision():
    poisoned = RANDOM.random(40) < 0.3
    scores = RANDOM.normal(size=40) + poisoned
    pairs = scores[poisoned][:, None] - scores[~poisoned]
    found = metrics.detection(scores, poisoned)
    assert found.auroc == pytest.approx((pairs > 0).mean())
    ranked = poisoned[np.argsort(-scores)]
    precision = np.cumsum(ranked) / np.arange(1, 41)
    assert found.average_precision == pytest.approx(precision[ranked].mean())
    assert sklearn.metrics.roc_auc_score(poisoned, scores) == found.auroc
    with pytest.raises(ValueError, match="poisons and others"):
        metrics.detection(scores, poisoned & False)
    with pytest.raises(ValueError, match="finite"):
        metrics.detection(scores * np.nan, poisoned)
