"""The pool of neighbours against a list, and its order of asking and filling."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import losses, safeclip


def rows(seed, count, width=3):
    return losses.unit_rows(jax.random.normal(jax.random.key(seed), (count, width)))


@pytest.mark.parametrize(("size", "count"), [(7, 3), (6, 3), (4, 4)])
def test_the_pool_holds_the_last_rows_like_a_queue(size, count):
    pool, queue = safeclip.empty_pool(size, 3), collections.deque(maxlen=size)
    for step in range(6):
        new = rows(step, count)
        pool = safeclip.push(pool, new)
        queue.extend(np.asarray(new))
        held = np.asarray(pool.rows)[: int(pool.filled)]
        assert len(held) == len(queue)
        assert {row.tobytes() for row in held} == {row.tobytes() for row in queue}


def test_the_nearest_row_is_that_of_a_slow_search():
    pool, queries = safeclip.push(safeclip.empty_pool(9, 3), rows(0, 6)), rows(1, 4)
    found, some = safeclip.nearest(pool, queries)
    held = np.asarray(rows(0, 6))
    expected = [held[np.argmax([query @ row for row in held])] for query in np.asarray(queries)]
    assert some
    np.testing.assert_array_equal(found, expected)


def test_rows_that_were_never_written_are_no_neighbours():
    # The only row points away from the query: a zero row would be nearer.
    pool = safeclip.push(safeclip.empty_pool(5, 2), jnp.array([[-1.0, 0.0]]))
    found, _ = safeclip.nearest(pool, jnp.array([[1.0, 0.0]]))
    np.testing.assert_array_equal(found, [[-1.0, 0.0]])


def test_an_empty_pool_gives_the_queries_back():
    queries = rows(2, 4)
    found, some = safeclip.nearest(safeclip.empty_pool(5, 3), queries)
    assert not some
    np.testing.assert_array_equal(found, queries)


def test_no_gradient_goes_through_the_search_or_the_pool():
    pool = safeclip.push(safeclip.empty_pool(9, 3), rows(0, 6))

    def search(queries):
        return safeclip.nearest(pool, queries)[0].sum()

    def fill(queries):
        return safeclip.push(pool, queries).rows.sum()

    for run in (search, fill):
        assert not np.any(jax.grad(run)(rows(1, 4)))


def test_more_rows_than_the_pool_has_are_refused():
    with pytest.raises(ValueError, match="rows must be at most 3, the pool's size, got 4"):
        safeclip.push(safeclip.empty_pool(3, 3), rows(0, 4))
