import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrobust.data import Dataset, batches, epoch_order, prefetch, steps_per_epoch, stream


def numbered(count):
    """A data set whose images, labels and indices all tell which example they are."""
    ids = np.arange(count)
    images = np.broadcast_to(ids[:, None, None, None] / 1024, (count, 2, 2, 1))
    return Dataset(
        images.astype(np.float32),
        (ids % 10).astype(np.int32),
        (ids + 7).astype(np.int32),
        tuple("0123456789"),
    )


def ids(batch):
    """The example numbers of a batch, after checking that its three arrays agree on them."""
    found = batch["index"] - 7
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], np.float32(found / 1024))
    np.testing.assert_array_equal(batch["label"], found % 10)
    return found


def equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    first = epoch_order(100, seed=3, epoch=5)
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    np.testing.assert_array_equal(first, epoch_order(100, seed=3, epoch=5))
    others = [epoch_order(100, seed=s, epoch=e) for s, e in ((3, 6), (4, 5), (5, 3))]
    assert all((first != other).any() for other in others)


def test_order_is_the_one_that_older_runs_were_saved_with():
    # A stored value: changing the generator would silently change what a resumed run sees.
    np.testing.assert_array_equal(epoch_order(8, seed=1, epoch=2), ORDER_OF_SEED_1_EPOCH_2)


ORDER_OF_SEED_1_EPOCH_2 = [5, 6, 3, 2, 1, 0, 4, 7]


def test_every_position_of_an_order_is_equally_likely():
    # 2000 epochs of 10 examples: a cell holds 200 +- 13.4; six sigma.
    orders = np.stack([epoch_order(10, seed=0, epoch=epoch) for epoch in range(2000)])
    counts = np.stack([(orders == example).sum(0) for example in range(10)])
    assert np.abs(counts - 200).max() < 6 * 13.4


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 60),
    local=st.integers(1, 6),
    processes=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
    pad=st.booleans(),
    data=st.data(),
)
def test_shards_concatenate_to_the_global_batch_and_resume_anywhere(
    count, local, processes, seed, epoch, shuffle, pad, data
):
    dataset, size = numbered(count), local * processes
    options = {"seed": seed, "epoch": epoch, "shuffle": shuffle, "pad": pad}
    if size > count and not pad:
        with pytest.raises(ValueError, match="batch_size must be <="):
            batches(dataset, size, **options)
        return
    whole = list(batches(dataset, size, **options))
    assert len(whole) == steps_per_epoch(dataset, size, drop_remainder=not pad)
    start = data.draw(st.integers(0, len(whole)))
    shares = [
        batches(dataset, size, **options, process_index=p, process_count=processes, start=start)
        for p in range(processes)
    ]
    for expected, parts in itertools.zip_longest(whole[start:], zip(*shares, strict=True)):
        assert all(len(part["label"]) == local for part in parts)
        equal(expected, {name: np.concatenate([p[name] for p in parts]) for name in expected})


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 60), size=st.integers(1, 20), pad=st.booleans())
def test_an_epoch_visits_every_example_exactly_once(count, size, pad):
    visited = []
    for batch in batches(numbered(count), size, seed=1, pad=pad, drop_remainder=False):
        real = batch["weight"] == 1 if pad else np.ones(len(batch["label"]), bool)
        assert not pad or len(real) == size
        visited += list(ids(batch)[real])
    assert sorted(visited) == list(range(count))


def test_unshuffled_batches_keep_the_order():
    got = [ids(b).tolist() for b in batches(numbered(7), 3, shuffle=False, drop_remainder=False)]
    assert got == [[0, 1, 2], [3, 4, 5], [6]]


def test_padding_repeats_an_example_at_weight_zero():
    *_, last = batches(numbered(5), 4, shuffle=False, pad=True)
    assert ids(last).tolist() == [4, 0, 0, 0]
    assert last["weight"].tolist() == [1, 0, 0, 0]
    assert last["weight"].dtype == np.float32


def test_batches_have_the_types_of_the_contract():
    batch = next(batches(numbered(4), 2))
    assert {k: v.dtype for k, v in batch.items()} == {
        "image": np.float32,
        "label": np.int32,
        "index": np.int32,
    }


def test_changing_a_batch_leaves_the_data_set_alone():
    dataset = numbered(4)
    next(batches(dataset, 4, shuffle=False))["image"][:] = 9
    assert dataset.images.max() < 1


def test_stream_crosses_epochs_and_resumes_at_any_step():
    dataset = numbered(10)
    unbroken = list(itertools.islice(stream(dataset, 3, seed=4), 11))
    by_epoch = [b for e in range(4) for b in batches(dataset, 3, seed=4, epoch=e)]
    for expected, got in zip(by_epoch, unbroken, strict=False):
        equal(expected, got)
    for start in range(9):
        equal(unbroken[start], next(stream(dataset, 3, seed=4, start=start)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": 6, "process_count": 4}, "divisible by process_count 4, got 6"),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in \[0, 2\), got 2"),
        ({"process_count": 0}, "process_count must be >= 1, got 0"),
        ({"batch_size": 11}, "batch_size must be <= 10, .* got 11"),
        ({"start": 6}, r"start must be in \[0, 5\], .* got 6"),
        ({"start": -1}, "start must be"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"epoch": -1}, "epoch must be >= 0, got -1"),
        (
            {"batch_size": 4, "process_count": 4, "drop_remainder": False},
            "last batch of 2 examples is not divisible by process_count 4",
        ),
    ],
)
def test_bad_numbers_are_refused_before_the_first_batch(arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(numbered(10), **{"batch_size": 2, **arguments})


def test_stream_refuses_a_negative_start():
    with pytest.raises(ValueError, match="start must be >= 0, got -2"):
        stream(numbered(4), 2, seed=0, start=-2)


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "jaxrobust-prefetch"]


def test_prefetch_gives_every_item_in_order_through_put():
    assert list(prefetch(range(20), put=lambda i: i * i, size=3)) == [i * i for i in range(20)]
    assert not prefetch_threads()


def test_prefetch_reads_ahead_by_size_and_no_further():
    moved = []
    items = prefetch(itertools.count(), put=lambda i: moved.append(i) or i, size=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(moved) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # long enough for a thread that read too far to be caught
    assert moved == [0, 1, 2]
    items.close()


def test_prefetch_raises_the_producers_error_at_its_place():
    def broken():
        yield 1
        yield 2
        raise OSError("disk gone")

    items = prefetch(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(items)
    assert not prefetch_threads()


def test_prefetch_raises_the_error_of_put():
    with pytest.raises(ZeroDivisionError):
        list(prefetch([2, 1, 0], put=lambda i: 1 // i))


def test_prefetch_stops_its_thread_and_the_iterator_when_the_consumer_leaves():
    closed = threading.Event()

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = prefetch(endless(), size=1)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    items.close()
    assert closed.is_set()
    assert not prefetch_threads()


def test_prefetch_refuses_size_zero():
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        prefetch([], size=0)


def test_a_data_set_of_ones_own_arrays_reads_like_one():
    images = np.random.default_rng(0).random((6, 4, 5, 1))
    data = Dataset.of(images, [0, 1, 2, 0, 1, 2])
    assert len(data) == 6
    assert data.class_names == ("0", "1", "2")
    assert repr(data) == "Dataset(6 images 4x5x1, 3 classes)"
    assert data.images.dtype == np.float32
    some = data[1:3]
    np.testing.assert_array_equal(some.images, data.images[1:3])
    assert some.indices.tolist() == [1, 2]
    one = data[-1]
    assert (one["label"], one["index"]) == (2, 5)
    np.testing.assert_array_equal(one["image"], data.images[5])
    assert [example["index"] for example in data] == list(range(6))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
        Dataset.of(images, [0, 1, 2, 0, 1, 2], ("a", "b"))
    with pytest.raises(ValueError, match=r"labels must be numbers of classes .* got 2147483648"):
        Dataset.of(images, [0, 1, 2, 0, 1, 2**31])
    for labels, kind in ((list("abcabc"), "<U1"), ([0.0, 1, 2, 0, 1, np.nan], "float64")):
        with pytest.raises(TypeError, match=f"labels must be whole numbers, got {kind}"):
            Dataset.of(images, labels)
