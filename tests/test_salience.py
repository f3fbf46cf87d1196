"""Salience methods against closed forms and slow references."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrobust import models, parallel, salience
from jaxrobust.salience.activations import token_grid
from jaxrobust.salience.perturbation import rise_mask

BATCH, HEIGHT, WIDTH, CHANNELS, CLASSES = 4, 4, 6, 2, 3
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.uniform(0.1, 0.9, (BATCH, HEIGHT, WIDTH, CHANNELS)), jnp.float32)
LABELS = jnp.asarray([0, 1, 2, 1], jnp.int32)
W = jnp.asarray(RANDOM.normal(size=(HEIGHT * WIDTH * CHANNELS, CLASSES)), jnp.float32)
KEYS = jax.random.split(jax.random.key(3), BATCH)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def linear(x):
    return x.reshape(len(x), -1) @ W


def curved(x):
    return jnp.tanh(linear(x)) * 3 + linear(jnp.square(x))


def weights_of(labels):
    return np.asarray(W).T[np.asarray(labels)].reshape(-1, HEIGHT, WIDTH, CHANNELS)


def picked(logits):
    return np.asarray(logits)[np.arange(BATCH), np.asarray(LABELS)]


def test_gradient_of_a_linear_net_is_its_weights_summed_over_channels():
    scores = salience.gradient(linear, X, LABELS)
    expected = np.abs(weights_of(LABELS)).sum(-1, keepdims=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_smooth_grad_of_a_linear_net_is_its_gradient():
    scores = salience.smooth_grad(linear, X, LABELS, KEYS, samples=5, sigma=0.3)
    np.testing.assert_allclose(scores, salience.gradient(linear, X, LABELS), rtol=1e-5)


def test_smooth_grad_averages_before_it_takes_the_magnitude():
    quadratic = lambda x: linear(jnp.square(x))  # noqa: E731
    noise = [
        jax.random.normal(jax.random.fold_in(key, j), X.shape[1:]) for key in KEYS for j in range(4)
    ]
    mean = np.mean(np.reshape(noise, (BATCH, 4, *X.shape[1:])), axis=1)
    expected = np.abs(2 * weights_of(LABELS) * (X + 0.5 * mean)).sum(-1, keepdims=True)
    scores = salience.smooth_grad(quadratic, X, LABELS, KEYS, samples=4, sigma=0.5)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_integrated_gradients_add_up_to_the_difference_of_the_logits(baseline):
    attributions = salience.integrated_attributions(curved, X, LABELS, steps=200, baseline=baseline)
    difference = picked(curved(X)) - picked(curved(jnp.full_like(X, baseline)))
    # The midpoint rule's error falls with 1 / steps^2.
    np.testing.assert_allclose(attributions.sum((1, 2, 3)), difference, atol=2e-2)


def test_integrated_gradients_of_a_linear_net_are_weight_times_pixel():
    scores = salience.integrated_gradients(linear, X, LABELS, steps=3)
    expected = np.abs(weights_of(LABELS) * X).sum(-1, keepdims=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def cnn():
    model = models.small_cnn(channels=(3, 5), strides=(1, 1), kernel=3, dense=(), classes=CLASSES)
    variables = model.init(jax.random.key(1), X.shape[1:])
    return partial(model.apply, variables), variables


def activation_and_gradient(apply, variables):
    """The second convolution's output, and d z_y / d it, by hand: relu, flatten, dense."""
    activation = np.asarray(apply(X, taps=("conv2",))[1]["conv2"])
    kernel = np.asarray(variables["params"]["logits"]["kernel"]).T[np.asarray(LABELS)]
    return activation, kernel.reshape(activation.shape) * (activation > 0)


def test_grad_cam_agrees_with_numpy(cnn):
    activation, gradient = activation_and_gradient(*cnn)
    expected = np.zeros((BATCH, HEIGHT, WIDTH, 1))
    for i in range(BATCH):
        for k in range(activation.shape[-1]):
            expected[i, ..., 0] += gradient[i, ..., k].mean() * activation[i, ..., k]
    scores = salience.grad_cam(cnn[0], X, LABELS, tap="conv2")
    np.testing.assert_allclose(scores, np.maximum(expected, 0), atol=1e-5)
    assert (scores > 0).any()


def test_layer_cam_agrees_with_numpy(cnn):
    activation, gradient = activation_and_gradient(*cnn)
    expected = np.maximum((np.maximum(gradient, 0) * activation).sum(-1, keepdims=True), 0)
    scores = salience.layer_cam(cnn[0], X, LABELS, tap="conv2")
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (scores > 0).any()


def test_cams_of_a_smaller_layer_come_in_the_images_size():
    model = models.small_cnn(channels=(3,), strides=(2,), kernel=3, dense=(), classes=CLASSES)
    apply = partial(model.apply, model.init(jax.random.key(1), X.shape[1:]))
    for method in (salience.grad_cam, salience.layer_cam):
        assert method(apply, X, LABELS, tap="conv1").shape == (BATCH, HEIGHT, WIDTH, 1)


def test_a_tap_without_positions_is_refused(cnn):
    with pytest.raises(ValueError, match="tap must have positions"):
        salience.grad_cam(cnn[0], X, LABELS, tap="logits")
    with pytest.raises(ValueError, match="taps must be among conv1, conv2, features, logits"):
        salience.grad_cam(cnn[0], X, LABELS, tap="conv9")


@pytest.fixture(scope="module", params=["cls", "mean"])
def vit(request):
    model = models.vit(2, 8, 2, 2, classes=CLASSES, pool=request.param)
    apply = partial(model.apply, model.init(jax.random.key(1), X.shape[1:]))
    return apply, request.param == "cls"


def test_attention_rollout_agrees_with_numpy(vit):
    apply, has_class_token = vit
    _, maps = apply(X, taps=("blocks.0.attn.maps", "blocks.1.attn.maps"))
    first, second = (np.asarray(m).mean(1) for m in maps.values())
    for i in range(BATCH):
        eye = np.eye(first.shape[-1])
        rollout = (second[i] + eye) / 2 @ ((first[i] + eye) / 2)
        row = rollout[0, 1:] if has_class_token else rollout.mean(0)
        grid = jax.image.resize(row.reshape(2, 3), (HEIGHT, WIDTH), "bilinear")
        scores = salience.attention_rollout(apply, X, LABELS, blocks=2)
        np.testing.assert_allclose(scores[i, ..., 0], grid, atol=1e-6)


def test_grad_cam_reads_the_tokens_of_a_vit(vit):
    method = jax.jit(partial(salience.grad_cam, vit[0], tap="blocks.0"))
    scores = method(X, LABELS)
    assert scores.shape == (BATCH, HEIGHT, WIDTH, 1)
    assert (scores > 0).any()


@pytest.mark.parametrize(
    ("tokens", "height", "width", "expected"),
    [
        (6, 4, 6, (0, 2, 3)),
        (7, 4, 6, (1, 2, 3)),
        (197, 224, 224, (1, 14, 14)),
        (1, 8, 8, (0, 1, 1)),
    ],
)
def test_tokens_are_laid_out_as_patches(tokens, height, width, expected):
    assert token_grid(tokens, height, width) == expected


def test_tokens_that_tile_nothing_are_refused():
    with pytest.raises(ValueError, match="5 tokens do not tile an image of 4x6"):
        token_grid(5, 4, 6)


def test_rise_agrees_with_a_loop():
    expected = np.zeros((BATCH, HEIGHT, WIDTH, 1))
    draw = jax.jit(lambda key, j: rise_mask(jax.random.fold_in(key, j), (HEIGHT, WIDTH), 3, 0.4))
    for i, key in enumerate(KEYS):
        for j in range(5):
            mask = np.asarray(draw(key, j))
            p = jax.nn.softmax(linear(X[i : i + 1] * mask))[0, LABELS[i]]
            expected[i] += p * mask / (5 * 0.4)
    scores = salience.rise(linear, X, LABELS, KEYS, samples=5, cells=3, keep=0.4)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_rise_masks_show_what_they_should_on_average():
    keys = jax.random.split(jax.random.key(0), 4000)
    masks = jax.jit(jax.vmap(lambda key: rise_mask(key, (5, 7), 3, 0.3)))(keys)
    assert masks.min() >= 0
    assert masks.max() <= 1
    # Standard error at most 0.5 / sqrt(4000).
    np.testing.assert_allclose(masks.mean(0), 0.3, atol=0.03)


def test_occlusion_agrees_with_a_loop():
    total, count = np.zeros((BATCH, HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH))
    clear = picked(jax.nn.softmax(linear(X)))
    for top in (0, 1):  # a square of 3 in 4 rows: the last one ends at the border
        for left in (0, 2, 3):
            covered = np.array(X)
            covered[:, top : top + 3, left : left + 3] = 0.25
            fall = clear - picked(jax.nn.softmax(linear(jnp.asarray(covered))))
            total[:, top : top + 3, left : left + 3] += fall[:, None, None]
            count[top : top + 3, left : left + 3] += 1
    scores = salience.occlusion(linear, X, LABELS, size=3, stride=2, fill=0.25)
    np.testing.assert_allclose(scores[..., 0], total / count, atol=1e-5)


METHODS = {
    "gradient": salience.gradient,
    "smooth_grad": partial(salience.smooth_grad, samples=2),
    "integrated_gradients": partial(salience.integrated_gradients, steps=2),
    "grad_cam": partial(salience.grad_cam, tap="conv1"),
    "rise": partial(salience.rise, samples=3, cells=2),
    "occlusion": partial(salience.occlusion, size=2),
}
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@every
def test_devices_see_what_one_sees(method, cnn):
    apply = cnn[0]
    mesh = parallel.data_mesh(2)
    run = jax.shard_map(
        lambda x, labels, keys: method(apply, x, labels, keys),
        mesh=mesh,
        in_specs=P(parallel.AXIS),
        out_specs=P(parallel.AXIS),
    )
    np.testing.assert_allclose(
        jax.jit(run)(X, LABELS, KEYS), method(apply, X, LABELS, KEYS), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("batch_size", "devices"), [(3, None), (4, None), (100, None), (3, 2)])
def test_all_images_are_worked_through_in_batches(batch_size, devices):
    apply = lambda w, x, **options: x.reshape(len(x), -1) @ w  # noqa: E731
    method = partial(salience.rise, samples=2, cells=2)
    scores = salience.compute(
        method, apply, W, X, LABELS, key=KEYS, batch_size=batch_size,
        mesh=devices and parallel.data_mesh(devices),
    )  # fmt: skip
    expected = method(linear, X, LABELS, KEYS)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_random_map_belongs_to_its_example_and_not_to_its_row():
    apply = lambda w, x, **options: x.reshape(len(x), -1) @ w  # noqa: E731
    method = partial(salience.rise, samples=2, cells=2)
    ids, key = np.asarray([5, 9, 2, 7]), jax.random.key(4)
    scores = salience.compute(method, apply, W, X, LABELS, key=key, indices=ids)
    last = salience.compute(method, apply, W, X[2:], LABELS[2:], key=key, indices=ids[2:])
    np.testing.assert_allclose(scores[2:], last, rtol=1e-5)


def test_new_weights_compile_nothing():
    traces = []

    def apply(w, x, **options):
        traces.append(1)
        return x.reshape(len(x), -1) @ w

    salience.compute(salience.gradient, apply, W, X, LABELS)
    first = len(traces)
    second = salience.compute(salience.gradient, apply, 2 * W, X, LABELS)
    assert len(traces) == first
    np.testing.assert_allclose(second, 2 * salience.gradient(linear, X, LABELS), rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (partial(salience.smooth_grad, samples=0), "samples must be a whole number >= 1, got 0"),
        (partial(salience.smooth_grad, sigma=-1.0), "sigma must be >= 0, got -1"),
        (partial(salience.integrated_gradients, steps=0), "steps must be a whole number >= 1"),
        (partial(salience.rise, keep=0.0), r"keep must be in \(0, 1\], got 0.0"),
        (partial(salience.rise, cells=0), "cells must be a whole number >= 1, got 0"),
        (partial(salience.occlusion, size=5), "size must be at most the image's 4x6 pixels, got 5"),
        (partial(salience.occlusion, size=2, stride=3), "stride must be at most size = 2, got 3"),
        (partial(salience.attention_rollout, blocks=0), "blocks must be a whole number >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(linear, X, LABELS, KEYS)


@pytest.mark.parametrize("method", [salience.rise, salience.smooth_grad])
def test_methods_that_draw_need_keys(method):
    apply = lambda w, x, **options: x.reshape(len(x), -1) @ w  # noqa: E731
    with pytest.raises(TypeError, match="key must be typed"):
        salience.compute(method, apply, W, X, LABELS)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[n, h, w, c\] with labels \[n\]"):
        salience.compute(salience.gradient, lambda w, x: x, W, X, LABELS[:2])
