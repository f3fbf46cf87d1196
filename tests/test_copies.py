"""Near copies: against connected components by scipy, and what a thinned set holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from jaxrobust.safeclip import copies

RANDOM = np.random.default_rng(7)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("cosine", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("at_once", [2**28, 70 * 9])  # in one block, and in blocks of nine
def test_groups_are_connected_components(monkeypatch, cosine, at_once):
    monkeypatch.setattr(copies, "_AT_ONCE", at_once)
    rows = unit(RANDOM.normal(size=(70, 4)))
    _, labels = connected_components(csr_matrix(rows @ rows.T >= cosine))
    groups = copies.near_copies(rows, cosine=cosine)
    np.testing.assert_array_equal(groups[:, None] == groups, labels[:, None] == labels)
    np.testing.assert_array_equal(groups, [np.flatnonzero(labels == own)[0] for own in labels])


def test_a_chain_is_one_group_whatever_its_order():
    angles = RANDOM.permutation(np.linspace(0, 1.5, 40))
    rows = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert not copies.near_copies(rows, cosine=float(np.cos(0.05))).any()
    assert len(set(copies.near_copies(rows, cosine=float(np.cos(0.03))))) == 40


def test_copies_are_alike_at_a_cosine_of_one():
    rows = unit(RANDOM.normal(size=(5, 300)))
    groups = copies.near_copies(np.concatenate([rows, rows]), cosine=1.0)
    np.testing.assert_array_equal(groups, np.tile(np.arange(5), 2))


@pytest.fixture(scope="module")
def pictures():
    coarse = RANDOM.random((12, 4, 4, 3))
    return np.repeat(np.repeat(coarse, 6, 1), 6, 2).astype(np.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: 0.5 * x + 0.3,
        lambda x: np.clip(x + 0.03 * RANDOM.normal(size=x.shape), 0, 1),
        lambda x: np.round(x * 15) / 15,
    ],
    ids=["the same", "brightness and contrast", "noise", "16 levels"],
)
def test_an_image_and_its_changed_copy_are_copies_and_others_are_not(pictures, change):
    both = np.concatenate([pictures, change(pictures)]).astype(np.float32)
    groups = copies.near_copies(copies.thumbnails(both, batch_size=7), cosine=0.9)
    np.testing.assert_array_equal(groups, np.tile(np.arange(12), 2))


def test_thumbnails_of_equal_images_are_equal_and_of_unit_length(pictures):
    rows = copies.thumbnails(pictures, batch_size=5)
    assert rows.shape == (12, 16 * 16 * 3 + 1)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(rows, copies.thumbnails(pictures), atol=1e-6)


def test_blank_images_are_copies_of_each_other_and_of_nothing_else(pictures):
    blank = np.stack([np.full((24, 24, 3), level, np.float32) for level in (0.0, 0.4, 1.0)])
    groups = copies.near_copies(copies.thumbnails(np.concatenate([pictures, blank])))
    np.testing.assert_array_equal(groups, [*range(12), 12, 12, 12])


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 4), st.integers(0, 3))
def test_a_thinned_set_holds_as_many_of_each_group_as_it_may(groups, most, seed):
    groups = np.array(groups, int)
    kept = copies.thin(groups, most, seed=seed)
    assert (np.diff(kept) > 0).all()
    for group in set(groups.tolist()):
        assert (groups[kept] == group).sum() == min(most, (groups == group).sum())


def test_which_copies_are_kept_depends_on_the_seed():
    groups = np.zeros(50, int)
    assert not np.array_equal(copies.thin(groups, 5, seed=0), copies.thin(groups, 5, seed=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: copies.near_copies(np.zeros(3)), r"rows must be \[n, d\], got shape \(3,\)"),
        (lambda: copies.near_copies(np.zeros((3, 2)), cosine=1.2), "cosine must be"),
        (lambda: copies.thin(np.zeros(3, int), 0), "most must be"),
        (lambda: copies.thumbnails(np.zeros((2, 4, 4, 3)), side=0), "side must be"),
        (lambda: copies.thumbnails(np.full((2, 4, 4, 3), 255.0)), r"images must lie in \[0, 1\]"),
        (lambda: copies.thumbnails(np.zeros((0, 4, 4, 3))), "with n >= 1"),
    ],
)
def test_what_is_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
