"""Density detectors, against a slow second implementation and scikit-learn's neighbours."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from jaxrobust.safeclip import density

RANDOM = np.random.default_rng(4)
METHODS = (density.k_distance, density.slof, density.dao)


def some_embeddings(count=60, width=8):
    rows = RANDOM.normal(size=(count, width)) + 3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def slow(x, k):
    """k-distance, SLOF and DAO, row by row in float64."""
    x = x.astype(np.float64)
    distances, places = NearestNeighbors(n_neighbors=k).fit(x).kneighbors()
    furthest = distances[:, -1]
    ratio, lids = [], []
    for row in distances:
        spread = -np.mean([np.log(near / row[-1]) for near in row])
        lids.append(1 / max(spread, 1 / x.shape[1]))
    lids = np.array(lids)
    for row, near in enumerate(places):
        ratio.append([furthest[row] / furthest[other] for other in near])
    ratio = np.array(ratio)
    return furthest, ratio.mean(1), (lids[places] * np.log(ratio)).mean(1)


@pytest.mark.parametrize("k", [1, 5])
def test_scores_equal_a_slow_count(k):
    x = some_embeddings()
    for method, expected in zip(METHODS, slow(x, k), strict=True):
        np.testing.assert_allclose(method(x, k), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_outlier_has_the_highest_score(method):
    x = some_embeddings()
    x[17] *= -1
    scores = np.asarray(method(x, 5))
    assert scores.argmax() == 17
    assert np.isfinite(scores).all()


def test_scores_of_ratios_do_not_depend_on_the_scale():
    x = some_embeddings()
    for method in METHODS[1:]:
        np.testing.assert_allclose(method(100 * x, 5), method(x, 5), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_copies_have_finite_and_equal_scores(method):
    x = some_embeddings(20)
    x[:8] = x[0]
    scores = np.asarray(method(x, 5))
    assert np.isfinite(scores).all()
    # Inside a heap of copies everything is as dense as its neighbours.
    expected = {"k_distance": 0, "slof": 1, "dao": 0}[method.__name__]
    np.testing.assert_allclose(scores[:8], expected, atol=1e-5)


def test_near_copies_are_told_apart():
    x = some_embeddings(30)
    x[1:6] = x[0] + 1e-4 * RANDOM.normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_allclose(density.k_distance(x, 4), slow(x, 4)[0], rtol=1e-3)


def test_a_set_is_scored_in_batches_each_row_once():
    x = some_embeddings(50)
    whole = density.detect(density.slof, x, k=5, batch_size=50)
    np.testing.assert_allclose(whole, density.slof(x, 5), rtol=1e-4)
    sizes = []

    def method(batch, k):
        sizes.append(len(batch))
        assert len(np.unique(batch, axis=0)) == len(batch)
        return np.asarray(batch)[:, 0]

    np.testing.assert_array_equal(density.detect(method, x, k=5, batch_size=20), x[:, 0])
    assert sizes == [20, 20, 20]


def test_the_seed_decides_about_the_batches():
    x = some_embeddings(40)
    run = lambda seed: density.detect(density.dao, x, k=3, batch_size=20, seed=seed)  # noqa: E731
    np.testing.assert_array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="b > k = 5"):
        density.slof(some_embeddings(5), 5)
    with pytest.raises(ValueError, match="k must be"):
        density.slof(some_embeddings(5), 0)
    with pytest.raises(ValueError, match="batch_size must be"):
        density.detect(density.slof, some_embeddings(5), batch_size=0)
