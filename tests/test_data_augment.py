from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.data import compose, cutout, flip, pad_crop

BATCH, HEIGHT, WIDTH, CHANNELS = 16, 6, 8, 2
ALL = {
    "pad_crop": partial(pad_crop, pad=2),
    "flip": flip,
    "cutout": partial(cutout, size=3),
    "compose": compose(partial(pad_crop, pad=2), flip, partial(cutout, size=3)),
}
every = pytest.mark.parametrize("transform", ALL.values(), ids=ALL.keys())


@pytest.fixture(scope="module")
def images():
    # Distinct and nowhere 0, so that every pixel's origin can be told.
    values = np.arange(1, BATCH * HEIGHT * WIDTH * CHANNELS + 1, dtype=np.float32)
    return jnp.asarray(values.reshape(BATCH, HEIGHT, WIDTH, CHANNELS) / values.size)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), BATCH)


@every
def test_a_mask_moves_like_a_painted_channel(transform, images, keys):
    mask = (images[..., :1] * 1000 % 3 > 1).astype(jnp.float32)
    moved, moved_mask = transform(keys, images, mask)
    painted = transform(keys, jnp.concatenate([images, mask], axis=-1))
    np.testing.assert_array_equal(moved, painted[..., :CHANNELS])
    np.testing.assert_array_equal(moved_mask, painted[..., CHANNELS:])
    np.testing.assert_array_equal(moved, transform(keys, images))
    assert 0 < float(moved_mask.mean()) < 1


@every
def test_half_a_batch_with_the_same_keys_gives_the_same_rows(transform, images, keys):
    whole = transform(keys, images)
    np.testing.assert_array_equal(whole[4:12], transform(keys[4:12], images[4:12]))


@every
def test_jit_changes_nothing(transform, images, keys):
    np.testing.assert_array_equal(jax.jit(transform)(keys, images), transform(keys, images))


@every
def test_randomness_follows_the_key_and_differs_between_rows(transform, images):
    same = jnp.broadcast_to(images[:1], images.shape)
    first = transform(jax.random.key(1), same)
    np.testing.assert_array_equal(first, transform(jax.random.key(1), same))
    assert (first != transform(jax.random.key(2), same)).any()
    assert (first[0] != first).any()


@every
def test_one_key_is_shared_out_by_row(transform, images):
    rows = jax.vmap(partial(jax.random.fold_in, jax.random.key(3)))(jnp.arange(BATCH))
    np.testing.assert_array_equal(transform(jax.random.key(3), images), transform(rows, images))


def test_pad_crop_is_one_of_the_possible_shifts_and_reaches_the_extremes(images):
    same = np.asarray(jnp.broadcast_to(images[:1], (256, HEIGHT, WIDTH, CHANNELS)))
    padded = np.pad(same[0], ((2, 2), (2, 2), (0, 0)))
    possible = {
        (top, left): padded[top : top + HEIGHT, left : left + WIDTH].tobytes()
        for top in range(5)
        for left in range(5)
    }
    shifts = {content: shift for shift, content in possible.items()}
    moved = np.asarray(pad_crop(jax.random.key(0), jnp.asarray(same), pad=2))
    seen = {shifts[image.tobytes()] for image in moved}  # a KeyError is an impossible image
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(5))


def test_flip_mirrors_about_half_of_the_images(images):
    many = jnp.broadcast_to(images[:1], (1000, HEIGHT, WIDTH, CHANNELS))
    moved = np.asarray(flip(jax.random.key(0), many))
    mirrored = (moved == np.asarray(images[0, :, ::-1])).all((1, 2, 3))
    kept = (moved == np.asarray(images[0])).all((1, 2, 3))
    assert (mirrored ^ kept).all()
    assert abs(mirrored.sum() - 500) < 6 * 15.8  # six sigma of a fair coin


def test_cutout_removes_one_square_in_all_channels_and_nothing_else(images):
    same = jnp.broadcast_to(images[:1], (400, HEIGHT, WIDTH, CHANNELS))
    moved = np.asarray(cutout(jax.random.key(0), same, size=3))
    hole = moved[..., 0] == 0
    np.testing.assert_array_equal(hole, moved[..., 1] == 0)
    np.testing.assert_array_equal(moved[~hole], np.asarray(same)[~hole])
    slow = np.zeros((HEIGHT, WIDTH, HEIGHT, WIDTH), bool)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            top, left = max(0, row - 1), max(0, column - 1)
            slow[row, column, top : row + 2, left : column + 2] = True
    allowed = {one.tobytes() for one in slow.reshape(-1, HEIGHT, WIDTH)}
    assert {one.tobytes() for one in hole} == allowed


def test_zero_pad_and_zero_size_are_the_identity(images, keys):
    np.testing.assert_array_equal(pad_crop(keys, images, pad=0), images)
    np.testing.assert_array_equal(cutout(keys, images, size=0), images)
    np.testing.assert_array_equal(compose()(keys, images), images)


def test_composition_gives_each_transform_its_own_randomness(images, keys):
    # Two fair flips with the same coin would always cancel.
    twice = np.asarray(compose(flip, flip)(keys, images))
    unchanged = (twice == np.asarray(images)).all((1, 2, 3))
    assert 0 < unchanged.sum() < BATCH


def test_types_survive(images, keys):
    moved, mask = pad_crop(keys, images.astype(jnp.bfloat16), jnp.ones_like(images[..., :1]))
    assert moved.dtype == jnp.bfloat16
    assert mask.dtype == jnp.float32


def test_a_new_epoch_is_no_new_trace(images):
    traces = []

    @jax.jit
    def augment(key, x):
        traces.append(1)
        return ALL["compose"](key, x)

    for epoch in range(3):
        augment(jax.random.key(epoch), images)
    assert len(traces) == 1


def test_bad_arguments_are_refused(images, keys):
    with pytest.raises(ValueError, match="pad must be >= 0, got -1"):
        pad_crop(keys, images, pad=-1)
    with pytest.raises(ValueError, match="size must be >= 0, got -1"):
        cutout(keys, images, size=-1)
    with pytest.raises(ValueError, match=r"one per example \(16,\), got \(3,\)"):
        flip(keys[:3], images)
