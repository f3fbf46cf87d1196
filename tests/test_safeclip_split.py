"""Splitters, guards and growth; the mixture is scikit-learn's."""

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from jaxrobust import safeclip

RANDOM = np.random.default_rng(0)
TWO = np.concatenate([RANDOM.normal(0.05, 0.03, 600), RANDOM.normal(0.4, 0.05, 400)])
ONE = RANDOM.normal(0.05, 0.07, 5000)


@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_the_mixture_is_scikit_learns(covariance):
    mixture, weights = safeclip.fit_mixture(TWO, covariance=covariance)
    theirs = GaussianMixture(2, covariance_type=covariance, random_state=0).fit(TWO[:, None])
    order = np.argsort(theirs.means_[:, 0])
    np.testing.assert_allclose(mixture.means, theirs.means_[order, 0], atol=1e-6)
    np.testing.assert_allclose(mixture.shares, theirs.weights_[order], atol=1e-6)
    expected = theirs.predict_proba(TWO[:, None])[:, order[1]]
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_two_modes_are_told_from_one():
    assert safeclip.fit_mixture(TWO)[0].is_bimodal
    assert not safeclip.fit_mixture(ONE)[0].is_bimodal


def test_the_early_stop_is_kept():
    # Carried to its end the fit would call almost none of one mode safe.
    _, weights = safeclip.fit_mixture(ONE)
    assert 0.05 < (weights >= 0.9).mean() < 0.25


def test_monotone_weights_never_fall_as_the_score_rises():
    wide = np.concatenate([RANDOM.normal(0.0, 0.01, 800), RANDOM.normal(0.2, 0.2, 400)])
    plain = safeclip.gaussian_mixture()(wide)
    order = np.argsort(wide)
    # The published posterior rises again on the far left: that is what is mended.
    assert plain[order][0] > 0.5
    monotone = safeclip.gaussian_mixture(monotone=True)(wide)
    assert (np.diff(monotone[order]) >= 0).all()
    assert monotone[order][0] == 0
    right = wide > 0.05
    np.testing.assert_allclose(monotone[right], plain[right], atol=1e-12)


def test_tied_widths_need_no_mending():
    weights = safeclip.gaussian_mixture(covariance="tied")(TWO)
    assert (np.diff(weights[np.argsort(TWO)]) >= -1e-12).all()


def test_ranks_are_shares_of_the_pairs():
    weights = safeclip.by_rank(np.array([0.3, 0.1, 0.2, 0.2]))
    np.testing.assert_allclose(weights, [1.0, 0.25, 0.75, 0.75])


def test_conformal_weights_let_bad_pairs_in_no_more_often_than_promised():
    bad, alpha = RANDOM.normal(0.1, 0.05, 4000), 0.05
    scores = np.append(RANDOM.permutation(bad), 0.2)
    known = RANDOM.permutation(4000)[:2000]
    weights = safeclip.conformal(known)(scores)
    unknown = np.setdiff1d(np.arange(4000), known)
    passed = (weights[unknown] >= 1 - alpha).mean()
    assert passed < alpha + 3 * np.sqrt(alpha / 2000)
    assert passed > 0.5 * alpha
    assert (weights[known] == -1).all()
    count = np.sum(scores[known] >= 0.2)
    np.testing.assert_allclose(weights[4000], 1 - (1 + count) / 2001)


def test_pairs_that_are_known_to_be_bad_are_taken_last_whatever_is_believed():
    scores, known = np.linspace(0, 1, 40), np.array([30, 35, 39])
    weights = safeclip.conformal(known)(scores)
    for count in (0, 20, 37):
        assert not safeclip.largest(weights, scores, count)[known].any()
    split = safeclip.first_split(weights, scores, threshold=2.0, fallback=0.5)
    assert split.fallback
    assert split.safe.sum() == 20
    assert not split.safe[known].any()


def test_the_first_split_takes_what_reaches_the_threshold():
    split = safeclip.first_split(np.array([0.95, 0.2, 0.9, 0.5]), np.zeros(4))
    np.testing.assert_array_equal(split.safe, [True, False, True, False])
    assert split.fallback == ""


def test_a_narrow_upper_mode_stays_safe_to_its_end():
    scores = np.concatenate([RANDOM.normal(0, 0.3, 1000), RANDOM.normal(0.2, 0.05, 1000)])
    plain = safeclip.gaussian_mixture()(scores)
    order = np.argsort(scores)
    assert plain[order][-1] < 0.1  # the lower mode is the wider one, above too
    monotone = safeclip.gaussian_mixture(monotone=True)(scores)
    assert (np.diff(monotone[order]) >= 0).all()
    assert monotone.max() == plain.max()
    assert 0.3 < (monotone > 0.5).mean() < 0.7


@pytest.mark.parametrize("weights", [np.zeros(20), np.ones(20)])
def test_a_share_out_of_bounds_falls_back_to_the_most_similar(weights):
    scores = np.arange(20.0)
    split = safeclip.first_split(weights, scores, fallback=0.15)
    np.testing.assert_array_equal(np.flatnonzero(split.safe), [17, 18, 19])
    assert "outside (0.02, 0.5)" in split.fallback


def test_one_mode_is_not_believed_when_two_are_asked_for():
    weights = safeclip.gaussian_mixture(monotone=True)
    for scores, reason in ((TWO, ""), (ONE, "the scores do not have two modes: ")):
        split = safeclip.first_split(weights(scores), scores, bimodal=True)
        assert split.fallback.startswith(reason)
        assert bool(split.fallback) == bool(reason)
        assert not safeclip.first_split(weights(scores), scores).fallback
    np.testing.assert_array_equal(split.safe, safeclip.largest(ONE, ONE, int(0.15 * len(ONE))))


def test_the_largest_are_exactly_so_many_with_ties_settled():
    weights, scores = np.array([1, 1, 1, 0.5, 0]), np.array([0.1, 0.3, 0.3, 0.9, 0.9])
    for count, expected in ((0, []), (2, [1, 2]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4])):
        safe = safeclip.largest(weights, scores, count)
        np.testing.assert_array_equal(np.flatnonzero(safe), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: safeclip.fit_mixture(np.zeros(1)), "scores must be .n. with n >= 2"),
        (lambda: safeclip.fit_mixture(np.array([0, np.nan, 1])), "scores must be finite, got nan"),
        (lambda: safeclip.conformal(np.zeros(3)), "bad must be .m. rows with m >= 1, got array"),
        (lambda: safeclip.conformal([3, 3]), "bad must be different rows >= 0, got .3, 3."),
        (lambda: safeclip.conformal([1000])(TWO), "bad must be rows of the 1000 scores, got 1000"),
        (lambda: safeclip.fit_mixture(TWO, covariance="diag"), "covariance must be one of"),
        (lambda: safeclip.largest(TWO, TWO, 1001), "count must be in .0, 1000., got 1001"),
        (
            lambda: safeclip.first_split(TWO, TWO, bounds=(0.1, 2.0)),
            "must be shares in .0, 1., got 2.0",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
