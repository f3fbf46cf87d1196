"""Random views: crops, colours and blurs against slow implementations, and their composition."""

import colorsys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxrobust.data import colours, resampling, views
from jaxrobust.data.colours import color_jitter, grayscale
from jaxrobust.data.resampling import gaussian_blur, random_resized_crop
from jaxrobust.data.views import blur_for, clip_views

BATCH, HEIGHT, WIDTH = 12, 10, 12
ALL = {
    "crop": random_resized_crop,
    "jitter": color_jitter,
    "grey": partial(grayscale, probability=0.5),
    "blur": gaussian_blur,
    "clip": clip_views,
}
every = pytest.mark.parametrize("transform", ALL.values(), ids=ALL.keys())


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return jnp.asarray(random.random((BATCH, HEIGHT, WIDTH, 3), np.float32))


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), BATCH)


@every
def test_a_row_depends_on_its_own_key_alone(transform, images, keys):
    whole = transform(keys, images)
    part = transform(keys[5:8], images[5:8])
    # Products of other batch sizes may sum in another order.
    np.testing.assert_allclose(whole[5:8], part, atol=1e-6)


@every
def test_views_stay_in_range_keep_shape_and_follow_the_key(transform, images, keys):
    first = transform(keys, images)
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1 + 1e-6
    np.testing.assert_array_equal(first, transform(keys, images))
    assert (first != transform(jax.random.key(1), images)).any()


@every
def test_one_key_is_shared_out_by_row(transform, images):
    rows = jax.vmap(partial(jax.random.fold_in, jax.random.key(3)))(jnp.arange(BATCH))
    one = transform(jax.random.key(3), images)
    np.testing.assert_array_equal(one, transform(rows, images))


@every
def test_a_wrong_number_of_keys_is_refused(transform, images, keys):
    with pytest.raises(ValueError, match=r"one per example \(12,\), got \(3,\)"):
        transform(keys[:3], images)


# Crops


def slow_crop(image, box):
    """Bilinear samples at the centres of a grid over the box; the border is continued."""
    top, left, tall, wide = (float(value) for value in box)
    height, width = image.shape[:2]
    rows = top + (np.arange(height) + 0.5) * tall / height - 0.5
    columns = left + (np.arange(width) + 0.5) * wide / width - 0.5
    places = np.meshgrid(rows, columns, indexing="ij")
    sample = partial(scipy.ndimage.map_coordinates, order=1, mode="nearest")
    return np.stack([sample(channel, places) for channel in np.moveaxis(image, -1, 0)], -1)


def test_crops_equal_slow_bilinear_sampling(images, keys):
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    found = random_resized_crop(keys, images)
    for key, image, own in zip(keys, np.asarray(images, np.float64), found, strict=True):
        box = resampling.crop_box(key, HEIGHT, WIDTH, scale, ratio)
        np.testing.assert_allclose(own, slow_crop(image, box), atol=2e-6)


def test_boxes_fit_and_have_the_asked_areas_and_ratios():
    keys = jax.random.split(jax.random.key(1), 500)
    box = partial(resampling.crop_box, height=20, width=30, scale=(0.2, 0.6), ratio=(0.5, 2.0))
    top, left, tall, wide = np.asarray(jax.vmap(box)(keys)).T
    assert min(top.min(), left.min()) >= 0
    assert (top + tall).max() <= 20 + 1e-4
    assert (left + wide).max() <= 30 + 1e-4
    share, ratio = tall * wide / 600, wide / tall
    assert 0.2 - 1e-5 <= share.min() < 0.23
    assert 0.55 < share.max() <= 0.6 + 1e-5
    assert 0.5 - 1e-5 <= ratio.min() < 0.6
    assert 1.7 < ratio.max() <= 2 + 1e-5


def test_a_box_that_never_fits_becomes_the_largest_central_one():
    # A square of the whole area does not fit into 10 x 40.
    box = resampling.crop_box(jax.random.key(0), 10, 40, (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_allclose(box, [0, 15, 10, 10], atol=1e-5)


def test_a_crop_of_everything_is_the_identity(images, keys):
    square = images[:, :, :HEIGHT]
    same = random_resized_crop(keys, square, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_allclose(same, square, atol=1e-6)


def test_a_mask_is_cropped_with_its_image(images, keys):
    mask = (images[..., :1] > 0.5).astype(jnp.float32)
    moved, moved_mask = random_resized_crop(keys, images, mask)
    painted = random_resized_crop(keys, jnp.concatenate([images, mask], -1))
    np.testing.assert_allclose(moved, painted[..., :3], atol=1e-6)
    np.testing.assert_allclose(moved_mask, painted[..., 3:], atol=1e-6)


def test_shrinking_weights_average_the_merged_pixels():
    weights = resampling.bilinear_weights(jnp.float32(0), jnp.float32(8), 8, 2)
    # Triangles of half-width 4 around 1.5 and 5.5, the parts outside cut off.
    triangles = 1 - np.abs(np.arange(8) - np.array([[1.5], [5.5]])) / 4
    expected = np.maximum(triangles, 0)
    np.testing.assert_allclose(weights, expected / expected.sum(1, keepdims=True), atol=1e-6)


# Blur


@pytest.mark.parametrize("radius", [1, 4, 9])
def test_blurs_equal_scipys(images, keys, radius):
    sigma = (0.3, 2.0)
    found = gaussian_blur(keys, images, sigma=sigma, radius=radius)
    for key, image, own in zip(keys, np.asarray(images, np.float64), found, strict=True):
        drawn = float(jax.random.uniform(key, minval=sigma[0], maxval=sigma[1]))
        taps = np.exp(-((np.arange(-radius, radius + 1) / drawn) ** 2) / 2)
        slow = image
        for axis in (0, 1):
            slow = scipy.ndimage.convolve1d(slow, taps / taps.sum(), axis, mode="mirror")
        np.testing.assert_allclose(own, slow, atol=2e-6)


def test_the_blur_of_224_pixels_is_the_official_one_and_small_images_get_less():
    assert blur_for(224) == ((0.1, 2.0), 10)
    assert blur_for(32) == ((0.1, 0.5), 2)
    (low, high), radius = blur_for(72)
    assert (low, radius) == (0.1, 3)
    np.testing.assert_allclose(high, 2 * 72 / 224)


# Colours


def test_hue_shifts_equal_colorsys():
    random = np.random.default_rng(1)
    image = random.random((5, 6, 3), np.float32)
    image[0, 0], image[0, 1], image[0, 2] = 0, 0.5, [1, 0, 0]
    for turn in (-0.3, 0.0, 0.1, 1 / 3):
        planes = [jnp.asarray(image[..., channel]) for channel in range(3)]
        shifted = np.stack(colours.shift_hue(planes, jnp.float32(turn)), -1)
        for pixel, own in zip(image.reshape(-1, 3), shifted.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
            np.testing.assert_allclose(own, colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=2e-6)


def slow_jitter(image, factors, order, turn):
    def grey(x):
        return x @ np.array([[0.299], [0.587], [0.114]])

    for number in order:
        if number == 3:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3)]
            image = np.array([colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv])
            image = image.reshape(HEIGHT, WIDTH, 3)
            continue
        base = (0, grey(image).mean(), grey(image))[number]
        image = np.clip(factors[number] * image + (1 - factors[number]) * base, 0, 1)
    return image


def test_jitter_is_the_four_changes_in_the_drawn_order(images, keys):
    found = color_jitter(keys, images, probability=1.0)
    orders = set()
    for key, image, own in zip(keys, np.asarray(images, np.float64), found, strict=True):
        draws = np.asarray(jax.random.uniform(key, (9,)))
        factors, turn = 1 + 0.5 * (2 * draws[1:4] - 1), 0.1 * (2 * draws[8] - 1)
        order = np.argsort(draws[4:8])
        np.testing.assert_allclose(own, slow_jitter(image, factors, order, turn), atol=5e-6)
        orders.add(tuple(order))
    assert len({order.index(3) for order in orders}) >= 3


def test_jitter_without_amounts_is_the_identity(images, keys):
    none = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    same = color_jitter(keys, images, **none, probability=1.0)
    np.testing.assert_array_equal(same, images)


def test_about_the_asked_share_of_images_is_changed(images):
    many = jnp.broadcast_to(images[:1], (1000, HEIGHT, WIDTH, 3))
    for transform, share in ((partial(color_jitter, hue=0.0), 0.8), (grayscale, 0.2)):
        changed = (transform(jax.random.key(0), many) != many).any((1, 2, 3)).sum()
        assert abs(float(changed) - 1000 * share) < 6 * 12.7  # six sigma of a 0.8 coin


def test_grey_images_have_equal_channels_of_the_right_brightness(images, keys):
    grey = np.asarray(grayscale(keys, images, probability=1.0))
    expected = np.asarray(images) @ np.float32([0.299, 0.587, 0.114])
    for channel in range(3):
        np.testing.assert_allclose(grey[..., channel], expected, atol=1e-6)
    one = images[..., :1]
    np.testing.assert_array_equal(grayscale(keys, one, probability=1.0), one)


# The composition


def test_zero_strength_is_the_identity(images, keys):
    np.testing.assert_array_equal(clip_views(keys, images, strength=0.0), images)


def test_a_mask_follows_flip_and_crop_and_no_colours(images, keys):
    mask = jnp.broadcast_to((jnp.arange(WIDTH) < 6).astype(jnp.float32), (BATCH, HEIGHT, WIDTH))
    view, moved = clip_views(keys, images, mask[..., None])
    np.testing.assert_allclose(view, clip_views(keys, images), atol=1e-6)
    assert moved.shape == (*mask.shape, 1)
    # An image of the mask itself, through flip and crop alone, with the keys of the composition.
    alone = views.compose(views.flip, random_resized_crop)(keys, mask[..., None])
    np.testing.assert_allclose(moved, alone, atol=1e-6)


def test_little_strength_changes_little_and_without_mirror_nothing_is_flipped():
    ramp = jnp.broadcast_to(jnp.linspace(0.2, 0.8, 16)[:, None], (200, 16, 16, 1))
    view = clip_views(jax.random.key(0), ramp, strength=0.05, mirror=False)
    assert 0 < float(jnp.abs(view - ramp).max()) < 0.06


def test_types_survive(images, keys):
    half = images.astype(jnp.bfloat16)
    for transform in (random_resized_crop, grayscale, gaussian_blur):
        assert transform(keys, half).dtype == jnp.bfloat16


def test_a_new_key_is_no_new_trace(images):
    traces = []

    @jax.jit
    def view(key, x):
        traces.append(1)
        return random_resized_crop(key, x)

    for epoch in range(3):
        view(jax.random.key(epoch), images)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            partial(random_resized_crop, scale=(0.0, 1.0)),
            r"scale must be \(low, high\) .* got \(0",
        ),
        (partial(random_resized_crop, ratio=(2.0, 1.0)), r"ratio must be .*\(2.0, 1.0\)"),
        (partial(color_jitter, brightness=1.5), r"brightness must be in \[0, 1.0\], got 1.5"),
        (partial(color_jitter, hue=0.6), r"hue must be in \[0, 0.5\], got 0.6"),
        (partial(color_jitter, probability=-0.1), "probability must be .* got -0.1"),
        (partial(grayscale, probability=2.0), "probability must be .* got 2.0"),
        (partial(gaussian_blur, sigma=(0.0, 1.0)), "sigma must be"),
        (partial(gaussian_blur, radius=10), r"radius must be in \[0, 9\], .* got 10"),
        (partial(clip_views, strength=1.1), r"strength must be in \[0, 1.0\], got 1.1"),
    ],
)
def test_bad_arguments_are_refused(images, keys, call, message):
    with pytest.raises(ValueError, match=message):
        call(keys, images)


def test_images_of_two_channels_are_refused(images, keys):
    for transform in (color_jitter, grayscale, clip_views):
        with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
            transform(keys, images[..., :2])
