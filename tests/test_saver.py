"""When a training loop saves, and what a run that goes on is told."""

import time

import jax
import numpy as np
import pytest

from jaxrobust import checkpoint, processes
from jaxrobust.training import saver as module
from jaxrobust.training.saver import Saver

RUN = {"seed": 3}
TREE = (np.arange(4.0, dtype=np.float32), {"w": np.ones((2, 3), np.float32)})


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are added."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_run_that_goes_on_has_its_numbers_its_loop_and_its_seconds(tmp_path, clock):
    first = Saver(tmp_path, RUN, every=30.0)
    tree, loop = first.restored(TREE, {"epoch": 1})
    assert tree is TREE
    assert loop == {"epoch": 1}
    assert not first.resumed
    clock[0] += 7
    first.save(5, tree, {"epoch": 2})
    second = Saver(tmp_path, RUN, every=30.0)
    (numbers, weights), loop = second.restored(jax.tree.map(np.zeros_like, TREE), {"epoch": 1})
    np.testing.assert_array_equal(numbers, TREE[0])
    np.testing.assert_array_equal(weights["w"], TREE[1]["w"])
    assert loop["epoch"] == 2
    assert second.resumed
    clock[0] += 2
    assert second.seconds == 9
    with pytest.raises(checkpoint.CheckpointError, match="seed"):
        Saver(tmp_path, {"seed": 4}, every=30.0).restored(TREE, {})


def test_it_saves_by_the_clock_but_not_for_more_than_its_share(tmp_path, clock, monkeypatch):
    saver = Saver(tmp_path, RUN, every=10.0)
    saver.restored(TREE, {})
    clock[0] += 10
    assert not saver.is_due(1)
    clock[0] += 1
    assert saver.is_due(2)

    def slow(*args, **kwargs):
        clock[0] += 3

    monkeypatch.setattr(checkpoint, "save", slow)
    saver.save(2, TREE, {})
    clock[0] += 59
    assert not saver.is_due(3)
    clock[0] += 2  # now the three seconds are less than a twentieth
    assert saver.is_due(4)


def test_it_saves_by_steps(tmp_path, clock):
    saver = Saver(tmp_path, RUN, every=0.0, steps=4)
    clock[0] += 1e6
    assert [step for step in range(13) if saver.is_due(step)] == [4, 8, 12]  # nothing to save at 0


def test_a_step_that_is_there_is_not_saved_again(tmp_path, monkeypatch):
    saver = Saver(tmp_path, RUN, every=30.0)
    saver.save(5, TREE, {})
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: pytest.fail("it was saved again"))
    saver.save(5, TREE, {})


def test_without_a_folder_nothing_is_due(clock):
    saver = Saver(None, RUN, every=0.0, steps=1)
    assert saver.restored(TREE, {"epoch": 1}) == (TREE, {"epoch": 1})
    clock[0] += 1e6
    assert not saver.is_due(1)
    saver.save(1, TREE, {})


def test_processes_ask_each_other_seldom_and_at_the_same_steps(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(module, "_ASK_EVERY", 9)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "agreed", lambda value: value)
    saver = Saver(tmp_path, RUN, every=10.0)
    clock[0] += 11
    # Where a pass begins does not matter: it may be shorter than that.
    assert [step for step in range(5, 30) if saver.is_due(step)] == [9, 18, 27]
