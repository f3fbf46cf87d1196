"""JPEG against Pillow, total variation against a direct minimisation, and what they do to PGD."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.optimize

from jaxrobust import attacks, data, models, parallel
from jaxrobust.models.filters import quantisation

MESH = parallel.data_mesh(2)
PHOTOS = data.foolbox_photos("cifar10").images[:4]


def by_pillow(image, quality):
    grey = image.shape[2] == 1
    stream = io.BytesIO()
    pixels = np.round(255 * image).astype(np.uint8)
    picture = PIL.Image.fromarray(pixels[..., 0] if grey else pixels)
    picture.save(stream, "JPEG", quality=quality, subsampling=0)
    found = np.asarray(PIL.Image.open(stream), np.float32) / 255
    return found[..., None] if grey else found


def test_steps_are_libjpegs_at_every_quality():
    for quality in range(1, 101):
        stream = io.BytesIO()
        PIL.Image.new("RGB", (8, 8)).save(stream, "JPEG", quality=quality)
        expected = PIL.Image.open(stream).quantization
        for place, table in enumerate(quantisation(quality)):
            np.testing.assert_array_equal(table.ravel(), expected[place], err_msg=f"{quality}")


@pytest.mark.parametrize("quality", [20, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_but_for_its_integer_arithmetic(quality, channels):
    images = PHOTOS[:, :29, :27, :channels]  # sides that eight does not divide
    ours = np.asarray(models.jpeg(quality).apply({}, images))
    assert ours.shape == images.shape
    theirs = np.stack([by_pillow(image, quality) for image in images])
    away = 255 * np.abs(ours - theirs)
    assert away.mean() < 0.6
    assert np.quantile(away, 0.99) < 6
    # And far closer than what compression itself changes.
    assert away.mean() < 0.3 * 255 * np.abs(images - theirs).mean()


def test_jpeg_has_no_gradient_and_bpda_gives_it_one():
    model = models.jpeg(50)
    score = lambda f: jax.grad(lambda x: jnp.square(f(x)).sum())(jnp.asarray(PHOTOS))  # noqa: E731
    plain = score(lambda x: model.apply({}, x))
    np.testing.assert_array_equal(plain, 0)
    assert (np.asarray(score(attacks.bpda(lambda x: model.apply({}, x)))) != 0).any()


def smoothed_objective(z, x, weight):
    z = z.reshape(x.shape)
    down = np.pad(z[1:] - z[:-1], ((0, 1), (0, 0)))
    right = np.pad(z[:, 1:] - z[:, :-1], ((0, 0), (0, 1)))
    return ((z - x) ** 2).sum() / 2 + weight * np.sqrt(down**2 + right**2 + 1e-12).sum()


@pytest.mark.parametrize("model", [models.jpeg(50), models.total_variation(0.1)])
def test_filters_run_on_many_devices(model):
    run = jax.jit(parallel.map_examples(lambda _, x, axis: model.apply({}, x), MESH))
    np.testing.assert_allclose(run({}, PHOTOS), model.apply({}, PHOTOS), atol=1e-6)


def test_total_variation_reaches_the_minimum():
    x = np.random.default_rng(0).random((5, 4))
    best = scipy.optimize.minimize(
        smoothed_objective, x.ravel(), (x, 0.1), method="Powell",
        options={"maxiter": 100_000, "xtol": 1e-8, "ftol": 1e-12},
    )  # fmt: skip
    model = models.total_variation(0.1, steps=500)
    found = np.asarray(model.apply({}, jnp.float32(x)[None, :, :, None]))[0, :, :, 0]
    assert smoothed_objective(found, x, 0.1) <= best.fun + 1e-3
    few = np.asarray(
        models.total_variation(0.1, steps=2).apply({}, jnp.float32(x)[None, ..., None])
    )
    assert smoothed_objective(few[0, ..., 0], x, 0.1) > best.fun


def test_total_variation_leaves_constants_alone_and_has_a_gradient():
    flat = np.full((1, 6, 6, 3), 0.3, np.float32)
    model = models.total_variation(0.2, steps=20)
    np.testing.assert_allclose(model.apply({}, flat), flat, atol=1e-6)
    np.testing.assert_array_equal(models.total_variation(0.0).apply({}, PHOTOS), PHOTOS)
    gradient = jax.grad(lambda x: jnp.square(model.apply({}, x)).sum())(jnp.asarray(PHOTOS))
    assert (np.asarray(gradient) != 0).mean() > 0.9


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("quality must be", lambda: models.jpeg(0)),
        ("quality must be <= 100", lambda: models.jpeg(101)),
        ("x must have 1 or 3", lambda: models.jpeg(50).apply({}, np.zeros((1, 8, 8, 2)))),
        ("weight must be", lambda: models.total_variation(-0.1)),
        ("steps must be", lambda: models.total_variation(0.1, 0)),
        ("weight must be", lambda: models.total_variation(float("inf"))),
        ("has no activations", lambda: models.jpeg(50).apply({}, PHOTOS, taps=("latent",))),
        ("has no activations", lambda: models.jpeg(50).train({}, PHOTOS, taps=("latent",))),
    ],
)
def test_bad_arguments_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
