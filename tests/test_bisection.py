"""Thresholds without sorting, against sorts and a loop over the entries."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import bisection

SHAPE = (3, 7)
sizes = hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 0.25, 1.0, 1.5, 3e8, 1e-30]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_smallest_number_is_found_to_the_last_bit(dtype):
    wanted = jnp.asarray([0, 1e-3, 0.3, 1, 2.5e3, jnp.inf], dtype)
    found = bisection.smallest(lambda t: t >= wanted, len(wanted), dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted)


def test_a_condition_that_never_holds_gives_infinity():
    found = bisection.smallest(lambda t: t < 0, 2, jnp.float32)
    np.testing.assert_array_equal(found, np.inf)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    values=hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 1e9, width=32)) | sizes,
    k=hnp.arrays(np.int32, SHAPE[:1], elements=st.integers(1, SHAPE[1])),
)
def test_the_kth_largest_is_that_of_a_sort(values, k):
    # XLA's CPU backend takes numbers below the smallest normal one for 0.
    values = np.where(values < np.finfo(np.float32).tiny, 0, values)
    expected = np.sort(values, 1)[np.arange(len(k)), SHAPE[1] - k]
    np.testing.assert_array_equal(
        bisection.kth_largest(jnp.asarray(values), jnp.asarray(k)), expected
    )


def spent(order, room, budget):
    """One row, entry by entry."""
    move = np.zeros_like(room)
    for i in sorted(range(len(order)), key=lambda i: (-order[i], i)):
        move[i] = min(room[i], budget) if order[i] > 0 else 0
        budget -= move[i]
    return move


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    order=sizes,
    room=hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    budget=hnp.arrays(np.float32, SHAPE[:1], elements=st.sampled_from([0.0, 0.125, 1.0, 2.25, 99])),
)
def test_a_budget_is_spent_on_the_steepest_first(order, room, budget):
    # Eighths add up without rounding: the loop and the sweeps must agree exactly.
    expected = [spent(*row) for row in zip(order, room, budget, strict=True)]
    np.testing.assert_array_equal(
        bisection.fill(*map(jnp.asarray, (order, room, budget))), expected
    )
