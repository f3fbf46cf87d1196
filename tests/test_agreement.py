"""Agreement with neighbours: against a slow count, and on pairs of which some are wrong."""

import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jaxrobust import parallel
from jaxrobust.safeclip import agreement

RANDOM = np.random.default_rng(11)


def unit(x):
    x = x - x.mean(0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def slow(images, captions, k, alike):
    """Pair by pair, in float64."""
    near, told = unit(images.astype(np.float64)), unit(captions.astype(np.float64))
    columns = []
    for one, other in ((near, told), (told, near)):
        column = []
        for row in one:
            closeness = one @ row
            place = len(column)
            order = [j for j in np.argsort(-closeness) if j != place and closeness[j] <= alike][:k]
            column.append(np.mean([other[j] @ other[place] for j in order]))
        columns.append(np.array(column))
    a, b = ((c - c.mean()) / c.std() for c in columns)
    return (a + b) / 2


def clusters(count=200, wrong=20, spread=0.3):
    """Images and captions of ten things; the first captions are of another thing."""
    things = np.arange(count) % 10
    told = np.where(np.arange(count) < wrong, (things + 5) % 10, things)
    centres = RANDOM.normal(size=(2, 10, 16))
    noise = spread * RANDOM.normal(size=(2, count, 16))
    return centres[0][things] + noise[0], centres[1][told] + noise[1]


@pytest.mark.parametrize(("k", "alike"), [(1, 0.999), (5, 1.0), (8, 0.8)])
@pytest.mark.parametrize("at_once", [2**28, 60 * 7])
def test_scores_equal_a_slow_count(monkeypatch, k, alike, at_once):
    monkeypatch.setattr(sys.modules[agreement.__module__], "_AT_ONCE", at_once)
    images, captions = RANDOM.normal(size=(2, 60, 6))
    found = agreement(images, captions, neighbours=k, alike=alike)
    np.testing.assert_allclose(found, slow(images, captions, k, alike), atol=2e-4)


@pytest.mark.parametrize("count", [60, 61])
@pytest.mark.parametrize("at_once", [2**28, 60 * 4])
def test_eight_devices_give_the_scores_of_one(monkeypatch, count, at_once):
    monkeypatch.setattr(sys.modules[agreement.__module__], "_AT_ONCE", at_once)
    images, captions = RANDOM.normal(size=(2, count, 6))
    found = agreement(images, captions, mesh=parallel.data_mesh(8))
    np.testing.assert_allclose(found, agreement(images, captions), atol=1e-5)


def test_at_one_copies_are_asked_too():
    images, captions = RANDOM.normal(size=(2, 60, 6))
    images[30:] = images[:30]
    captions[30:] = captions[:30][::-1]
    # Rounding puts a copy's cosine above 1 now and then.
    expected = slow(images, captions, 3, 1.001)
    found = agreement(images, captions, neighbours=3, alike=1.0)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(agreement(images, captions, neighbours=3) - expected).max() > 0.1


def test_wrong_captions_agree_least():
    images, captions = clusters()
    scores = agreement(images, captions)
    assert roc_auc_score(np.arange(200) >= 20, scores) > 0.99
    assert abs(scores.mean()) < 1e-9


def test_copies_do_not_vouch_for_each_other():
    images, captions = clusters()
    images[:20] = images[0] + 1e-4 * RANDOM.normal(size=(20, 16))
    captions[:20] = captions[0] + 0.05 * RANDOM.normal(size=(20, 16))
    clean = np.arange(200) >= 20
    assert roc_auc_score(clean, agreement(images, captions)) > 0.99
    # Were they asked, they would be the safest of all.
    assert roc_auc_score(clean, agreement(images, captions, alike=1.0)) < 0.5


def test_order_length_and_place_of_the_embeddings_do_not_matter():
    images, captions = clusters()
    scores = agreement(images, captions)
    order = RANDOM.permutation(200)
    np.testing.assert_allclose(agreement(images[order], captions[order]), scores[order], atol=1e-4)
    moved = agreement(3 * images + 5, 0.1 * captions - 2)
    # Rounding may change who is the last that is asked.
    assert np.quantile(np.abs(moved - scores), 0.97) < 1e-3


def test_a_pair_of_which_all_are_copies_does_not_agree():
    # All embeddings of one kind are alike: nobody is left to ask.
    images = np.repeat([[1.0, 0.0], [0.0, 1.0]], 10, 0)
    captions = RANDOM.normal(size=(20, 4))
    assert np.isfinite(agreement(images, captions, neighbours=12)).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((4, 2)), np.zeros((5, 2))), {}, "of one length"),
        ((np.zeros(4), np.zeros(4)), {}, r"must be \[n, d\]"),
        ((np.zeros((8, 2)), np.zeros((8, 2))), {}, "fewer than the 8 pairs, got 8"),
        ((np.zeros((9, 2)), np.zeros((9, 2))), {"neighbours": 0}, "neighbours must be"),
        ((np.zeros((9, 2)), np.zeros((9, 2))), {"alike": 0.0}, r"alike must be in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        agreement(*arguments, **options)
