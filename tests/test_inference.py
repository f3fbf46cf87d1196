"""A function over a whole set gives, row by row, what it gives on the set at once."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import inference, parallel

X = np.arange(22, dtype=np.float32).reshape(11, 2)
KEYS = jax.random.split(jax.random.key(0), 11)


def scaled(shared, examples, axis_name):
    x, keys = examples
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    return {"sum": shared * x.sum(1), "noisy": x + noise}


def read(rows):
    return X[rows], KEYS[rows]


@pytest.mark.parametrize("devices", [None, 1, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_batches_and_devices_change_nothing(batch_size, devices):
    mesh = devices and parallel.data_mesh(devices)
    found = inference.over_set(
        scaled, jnp.float32(3), read, len(X), batch_size=batch_size, mesh=mesh
    )
    assert all(isinstance(leaf, np.ndarray) for leaf in found.values())
    np.testing.assert_array_equal(found["sum"], 3 * X.sum(1))
    np.testing.assert_allclose(found["noisy"], scaled(1, (X, KEYS), None)["noisy"], rtol=1e-6)


def test_all_batches_have_one_shape_and_are_compiled_for_once():
    shapes = []

    def look(shared, x, axis_name):
        shapes.append(x.shape)
        return shared * x

    for factor in (1, 2):
        found = inference.over_set(look, np.float32(factor), X.__getitem__, 11, batch_size=4)
        np.testing.assert_array_equal(found, factor * X)
    assert shapes == [(4, 2)]


def test_processes_share_the_rows(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(inference.own_rows(11))
    # As many for each: the last row is there for want of a twelfth.
    np.testing.assert_array_equal(np.concatenate(shares), [*range(11), 10])
    assert {len(share) for share in shares} == {4}


def test_what_reading_raises_is_raised():
    def broken(rows):
        raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):
        inference.over_set(scaled, 1, broken, 11, batch_size=4)


def test_reading_ahead_ends_when_the_function_fails():
    before = threading.active_count()

    def failing(shared, x, axis_name):
        raise ArithmeticError("no such product")

    with pytest.raises(ArithmeticError, match="no such product") as kept:
        inference.over_set(failing, 1, X.__getitem__, 11, batch_size=1)
    assert kept.traceback  # which still holds the generator
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("count", "batch_size", "message"),
    [
        (11, 0, "batch_size must be a whole number >= 1, got 0"),
        (0, 4, "the number of examples must be a whole number >= 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(count, batch_size, message):
    with pytest.raises(ValueError, match=message):
        inference.over_set(scaled, 1, pytest.fail, count, batch_size=batch_size)
