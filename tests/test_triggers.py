"""Triggers, against the formulas that define them."""

import json

import numpy as np
import pytest

from jaxrobust.safeclip import triggers

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.random((3, 20, 12, 3), dtype=np.float32)
IDS = np.array([7, 3, 100], np.int32)
ALL = (
    triggers.badnets(),
    triggers.badnets(0.3, pattern="checker", place=None, seed=4),
    triggers.badnets_random(0.25),
    triggers.blended(0.2, seed=3),
    triggers.blended(0.2, redrawn=True),
    triggers.wanet(),
    triggers.wanet(2.0, grid=4),
    triggers.sig(frequency=2.5),
    triggers.sig(alpha=0.2, frequency=2.5),
)


def test_a_patch_stands_where_it_is_said_to_and_nowhere_else():
    trigger = triggers.badnets(0.25, pattern="white", place=(0.5, 1))
    side = trigger.pixels(20, 12)
    found = trigger(IMAGES)
    expected = IMAGES.copy()
    expected[:, 8 : 8 + side, 12 - side :] = 1  # round(0.5 * 17) = 8
    assert side == 3
    np.testing.assert_array_equal(found, expected)


def test_a_checker_is_white_at_every_second_row_and_column():
    found = triggers.badnets(1 / 3, pattern="checker", place=(0, 0))(IMAGES)[1, :4, :4]
    expected = np.zeros((4, 4, 3))
    expected[::2, ::2] = 1
    np.testing.assert_array_equal(found, expected)


def test_a_coloured_patch_is_one_for_all_images_and_its_seed_decides():
    patch = lambda seed: triggers.badnets(0.5, place=(0, 0), seed=seed)(IMAGES)[:, :6, :6]  # noqa: E731
    first = patch(0)
    assert (first == first[0]).all()
    assert first.std() > 0.2
    assert not np.array_equal(first, patch(1))


def test_the_default_patch_is_16_pixels_from_row_9_of_224():
    zeros = np.zeros((1, 224, 224, 1), np.float32)
    rows, columns = np.nonzero(triggers.badnets(pattern="white")(zeros)[0, ..., 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 24, 9, 24)


def test_random_patches_are_noise_about_the_mean_at_places_all_over():
    trigger = triggers.badnets_random(0.25)
    images = np.full((400, 16, 16, 1), 0.5, np.float32)
    changed = (trigger(images, np.arange(400)) != images)[..., 0]
    tops = changed.any(2).argmax(1)
    lefts = changed.any(1).argmax(1)
    assert (changed.sum((1, 2)) == 16).all()
    assert set(tops) == set(lefts) == set(range(13))
    # N(0.5, 1), clipped to [0, 1]: as much above as below, a share of 0.617 on the bounds.
    values = trigger(images, np.arange(400))[changed]
    assert abs((values > 0.5).mean() - 0.5) < 0.03
    assert abs(np.isin(values, (0, 1)).mean() - 0.617) < 0.03


def test_a_blend_is_its_formula():
    black, white = np.zeros((1, 5, 4, 3), np.float32), np.ones((1, 5, 4, 3), np.float32)
    trigger = triggers.blended(0.3, seed=2)
    noise = trigger(black) / 0.3
    assert 0 <= noise.min() < 0.2
    assert 0.8 < noise.max() <= 1 + 1e-6
    np.testing.assert_allclose(trigger(white), 0.7 + 0.3 * noise, atol=1e-6)
    half = 0.25 * np.ones((1, 5, 4, 3), np.float32)
    np.testing.assert_allclose(trigger(half), 0.7 * half + 0.3 * noise, atol=1e-6)


def test_sig_is_its_formula_added_or_blended():
    column = np.arange(12)
    default = (60 / 255 * np.sin(2 * np.pi * 6 * np.arange(20) / 20))[None, None, :, None]
    uneven = (0.1 * np.sin(2 * np.pi * 1.5 * column / 12))[None, None, :, None]
    middle = 0.5 * np.ones((1, 20, 12, 3), np.float32)
    added = triggers.sig(0.1, frequency=1.5)
    np.testing.assert_allclose(added(middle), 0.5 + uneven + 0 * middle, atol=1e-6)
    wide = IMAGES.transpose(0, 2, 1, 3)
    np.testing.assert_allclose(triggers.sig()(wide), np.clip(wide + default, 0, 1), atol=1e-6)
    np.testing.assert_allclose(
        triggers.sig(0.1, frequency=1.5, alpha=0.2)(IMAGES),
        np.clip(0.8 * IMAGES + 0.2 * uneven, 0, 1),
        atol=1e-6,
    )


# torch.nn.functional.interpolate(grid, (5, 4), mode="bicubic", align_corners=True), torch 2.13
BICUBIC = [
    [0.0, 0.907407, 0.481482, -1.0],
    [0.203125, 0.68967, 0.183883, -0.984375],
    [0.5, 0.412037, -0.013889, -0.5],
    [0.796875, 0.205874, 0.205874, 0.796875],
    [1.0, 0.092593, 0.518518, 2.0],
]


def slow_warp(image, sources):
    """Bilinear interpolation at (row, column), pixel by pixel."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for r in range(height):
        for c in range(width):
            y, x = sources[:, r, c]
            for i in range(height):
                for j in range(width):
                    out[r, c] += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * image[i, j]
    return out


@pytest.mark.parametrize("grid", [None, 3])
def test_a_warp_equals_slow_interpolation(grid):
    trigger = triggers.wanet(8.0, grid=grid, seed=5)
    small = IMAGES[:2, :9, :7]
    expected = [slow_warp(image, trigger.sources(9, 7)) for image in small]
    np.testing.assert_allclose(trigger(small), expected, atol=1e-5)
    assert np.abs(trigger(small) - small).mean() > 0.1


def test_a_warp_without_strength_is_the_identity_and_else_half_a_pixel_on_average():
    np.testing.assert_array_equal(triggers.wanet(0)(IMAGES), IMAGES)
    moved = np.abs(triggers.wanet(1).sources(64, 64) - np.indices((64, 64)))
    inside = moved[:, 2:-2, 2:-2]
    assert abs(inside.mean() - 0.5 * 63 / 64) < 0.02


def test_a_grid_is_enlarged_as_pytorch_does_it():
    grid = np.array([[0.0, 1, -1], [0.5, 0.25, -0.5], [1, 0, 2]])
    found = triggers._enlarging(3, 5) @ grid @ triggers._enlarging(3, 4).T
    np.testing.assert_allclose(found, BICUBIC, atol=1e-6)


@pytest.mark.parametrize("trigger", ALL, ids=str)
def test_every_trigger_keeps_the_box_changes_something_and_leaves_its_input(trigger):
    before = IMAGES.copy()
    found = trigger(IMAGES, IDS)
    np.testing.assert_array_equal(IMAGES, before)
    assert found.dtype == np.float32
    assert found.shape == IMAGES.shape
    assert 0 <= found.min() <= found.max() <= 1
    assert (found != IMAGES).any((1, 2, 3)).all()


@pytest.mark.parametrize("trigger", ALL, ids=str)
def test_a_triggered_image_depends_on_seed_and_id_alone(trigger):
    together = trigger(IMAGES, IDS)
    for row in (2, 0):
        alone = trigger(IMAGES[row : row + 1], IDS[row : row + 1])[0]
        np.testing.assert_array_equal(alone, together[row])


@pytest.mark.parametrize("trigger", [triggers.badnets_random(0.3), triggers.blended(redrawn=True)])
def test_what_is_drawn_anew_differs_between_ids_and_asks_for_them(trigger):
    same = np.repeat(IMAGES[:1], 2, 0)
    first, second = trigger(same, np.array([0, 1]))
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="indices must be given"):
        trigger(same)


@pytest.mark.parametrize("trigger", ALL, ids=str)
def test_a_trigger_comes_back_from_json(trigger):
    text = json.dumps(triggers.as_dict(trigger))
    assert triggers.from_dict(json.loads(text)) == trigger


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("size must be > 0", lambda: triggers.badnets(0)),
        ("size must be a share", lambda: triggers.badnets(1.5)),
        ("pattern must be one of", lambda: triggers.badnets(pattern="stripes")),
        ("place must be", lambda: triggers.badnets(place=(0.0, 2.0))),
        ("alpha must lie", lambda: triggers.blended(1.2)),
        ("grid must be", lambda: triggers.wanet(grid=1)),
        ("strength must be >= 0", lambda: triggers.wanet(-1)),
        ("seed must be", lambda: triggers.wanet(seed=-1)),
        ("amplitude must be", lambda: triggers.sig(-0.1)),
        ("name must be one of", lambda: triggers.from_dict({"name": "hidden"})),
        ("parameters of sig", lambda: triggers.from_dict({"name": "sig", "beta": 1})),
        ("must be \\[b, h, w, c\\]", lambda: triggers.sig()(IMAGES[0])),
        ("must be \\[b, h, w, c\\]", lambda: triggers.sig()(np.zeros((1, 2, 2, 3), np.uint8))),
        ("must lie in \\[0, 1\\]", lambda: triggers.sig()(255 * IMAGES)),
        ("must lie in \\[0, 1\\]", lambda: triggers.sig()(np.nan * IMAGES)),
        ("indices must be whole", lambda: triggers.badnets_random()(IMAGES, IDS[:2])),
    ],
)
def test_bad_arguments_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
