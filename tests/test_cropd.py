"""CRoPD's objective: its terms, its attack, and what it may not depend on."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust import attacks, cropd, losses, models, parallel, training
from jaxrobust import flops as counting
from jaxrobust.cropd import Weights

SHAPE, BATCH, CODE = (4, 4, 1), 8, 6
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.random((BATCH, *SHAPE), dtype=np.float32)
LABELS = np.zeros(BATCH, np.int32)
BATCH_OF_8 = {"image": IMAGES, "label": LABELS, "index": np.arange(BATCH, dtype=np.int32)}


def tiny_autoencoder():
    """One matrix there, one back, and a code of length one: what the objective needs to see."""

    def apply(variables, x, taps=(), perturbations=None):
        params = variables["params"]
        code = losses.unit_rows(jnp.tanh(x.reshape(len(x), -1) @ params["E"]))
        image = jax.nn.sigmoid(code @ params["D"]).reshape(x.shape)
        return (image, {"latent": code}) if taps else image

    def train(variables, x, *, axis_name=None, dtype=None, taps=()):
        found = apply(variables, x, taps)
        return (found[0], {}, found[1]) if taps else (found, {})

    def init(key, shape=SHAPE):
        one, two = jax.random.split(key)
        pixels = int(np.prod(shape))
        weights = {"E": (one, (pixels, CODE)), "D": (two, (CODE, pixels))}
        return {"params": {name: jax.random.normal(*drawn) for name, drawn in weights.items()}}

    return models.Model(init, apply, train, {"name": "tiny"})


MODEL = tiny_autoencoder()
VARIABLES = MODEL.init(jax.random.key(0))
ATTACK = attacks.linf_pgd(0.1, steps=3)
KEYS = jax.random.split(jax.random.key(5), BATCH)
ALL = Weights(clean=0.5, contrast=2.0, denoising=3.0, displacement=0.7)


def context(axis_name=None, keys=KEYS):
    def apply(x, **options):
        return MODEL.apply(VARIABLES, x, **options)

    return training.Context(apply, keys, jnp.int32(0), {}, axis_name)


def forward(x, **options):
    out, *rest = MODEL.train(VARIABLES, x, **options)
    return (out, *rest)


def code_of(x):
    return np.asarray(MODEL.apply(VARIABLES, x, taps=("latent",))[1]["latent"], np.float64)


def cosines(a, b):
    length = lambda v: np.linalg.norm(v, axis=1)  # noqa: E731
    return (a @ b.T) / np.outer(length(a), length(b))


def slow_loss(x, x_adv, form, weights, t):
    clean, adversarial = code_of(x), code_of(x_adv)
    image = lambda z: np.asarray(MODEL.apply(VARIABLES, z), np.float64)  # noqa: E731
    error = lambda z: ((image(z) - x) ** 2).sum((1, 2, 3))  # noqa: E731
    own = np.diag(cosines(adversarial, clean))
    crowd = np.exp(cosines(clean, clean) / t)
    contrast = {
        "reported": -own / t + np.log(crowd.sum(1) - np.diag(crowd)),
        "info_nce": -own / t + np.log(np.exp(cosines(adversarial, clean) / t).sum(1)),
        "alignment": (1 - own) / t,
    }[form]
    moved = ((adversarial - clean) ** 2).mean(1)
    return (
        weights.clean * error(x) + weights.contrast * contrast + weights.denoising * error(x_adv)
        + weights.displacement * moved
    )  # fmt: skip


@pytest.mark.parametrize("clean", [0.5, 0.0])
@pytest.mark.parametrize("form", cropd.FORMS)
def test_the_loss_equals_a_slow_reference(form, clean):
    weights = ALL._replace(clean=clean)
    objective = cropd.robust_autoencoder(ATTACK, weights=weights, form=form, temperature=0.3)
    x_adv = np.clip(IMAGES + RANDOM.uniform(-0.1, 0.1, IMAGES.shape), 0, 1).astype(np.float32)
    got, metrics, _ = jax.jit(
        lambda x, x_adv: objective.loss(context(), forward, x, x_adv, LABELS)
    )(IMAGES, x_adv)
    np.testing.assert_allclose(got, slow_loss(IMAGES, x_adv, form, weights, 0.3), rtol=1e-4)
    own = np.diag(cosines(code_of(x_adv), code_of(IMAGES)))
    np.testing.assert_allclose(metrics["cosine"], own.mean(), rtol=1e-5)
    assert ("squared_error" in metrics) == (clean > 0)


def test_what_no_term_looks_at_costs_nothing():
    model = models.autoencoder((16, 16, 3), widths=(8,), latent_channels=4)
    optimizer = training.sgd(1e-3, momentum=0.0)
    state = jax.eval_shape(
        lambda key: training.create_state(model, optimizer, key, (16, 16, 3)), jax.random.key(0)
    )
    batch = {**BATCH_OF_8, "image": np.zeros((BATCH, 16, 16, 3), np.float32)}

    def flops(*weights):
        objective = cropd.robust_autoencoder(ATTACK, weights=Weights(*weights), form="alignment")
        step = training.train_step(model, optimizer, objective)
        return counting.count_flops(step, state, batch).matmul

    variables = model.init(jax.random.key(0))
    code = model.encode(variables, batch["image"])
    decoder = counting.count_flops(model.decode, variables, code).matmul
    # The clean image is rebuilt, and back twice, only where the loss looks at it.
    rebuilt, aligned, both = flops(0, 0, 1), flops(0, 1, 1), flops(1, 0, 1)
    assert rebuilt < aligned < flops(1, 1, 1) - 2.5 * decoder
    assert rebuilt < both - 2.5 * decoder


def perturbed(objective, rows=slice(None), axis_name=None):
    return objective.perturb(context(axis_name, KEYS[rows]), jnp.asarray(IMAGES[rows]), None)[0]


@pytest.mark.parametrize(
    "options", [{"form": "reported"}, {"form": "alignment"}, {"aim": "random"}], ids=str
)
def test_the_attack_does_not_depend_on_the_batch(options):
    objective = cropd.robust_autoencoder(ATTACK, **options)
    whole = perturbed(objective)
    for rows in ([0, 1, 2], [5], [7, 3, 1, 0]):
        np.testing.assert_array_equal(perturbed(objective, np.array(rows)), whole[np.array(rows)])


def test_nor_does_it_on_a_network_of_convolutions():
    model = models.autoencoder((8, 8, 1), widths=(8,), latent_channels=4)
    variables = model.init(jax.random.key(0))
    images = jnp.asarray(RANDOM.random((BATCH, 8, 8, 1), dtype=np.float32))
    objective = cropd.robust_autoencoder(ATTACK)

    @jax.jit
    def attacked(images, keys):
        apply = partial(model.apply, variables)
        found = training.Context(apply, keys, jnp.int32(0), {}, None)
        return objective.perturb(found, images, None)[0]

    whole = attacked(images, KEYS)
    assert np.abs(whole - images).max() > 0.05
    for rows in (np.array([5]), np.array([7, 3, 1, 0])):
        np.testing.assert_array_equal(attacked(images[rows], KEYS[rows]), whole[rows])


@pytest.mark.parametrize("form", cropd.FORMS)
def test_the_attack_and_the_training_do_not_depend_on_the_number_of_devices(form):
    objective = cropd.robust_autoencoder(ATTACK, form=form, weights=ALL)
    optimizer = training.sgd(1e-3, momentum=0.0)
    step = training.train_step(MODEL, optimizer, objective)
    found = {}
    for devices in (1, 4):
        mesh = parallel.data_mesh(devices)
        state = parallel.create(
            lambda: training.create_state(MODEL, optimizer, jax.random.key(1), SHAPE), mesh
        )
        run = parallel.data_parallel(step, mesh)
        state, metrics = run(state, parallel.shard_batch(BATCH_OF_8, mesh))
        found[devices] = jax.tree.map(np.asarray, (state.params, metrics))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)  # noqa: E731
    jax.tree.map(close, *found.values())


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_published_attack_is_the_same_to_the_bit_on_any_number_of_devices(devices):
    objective = cropd.robust_autoencoder(ATTACK)

    def attacked(variables, examples, axis_name):
        images, keys = examples
        apply = partial(MODEL.apply, variables)
        found = training.Context(apply, keys, jnp.int32(0), {}, axis_name)
        return objective.perturb(found, images, None)[0]

    run = jax.jit(parallel.map_examples(attacked, parallel.data_mesh(devices)))
    alone = jax.jit(parallel.map_examples(attacked, None))
    examples = jnp.asarray(IMAGES), KEYS
    np.testing.assert_array_equal(run(VARIABLES, examples), alone(VARIABLES, examples))


def test_the_attack_climbs_away_from_the_clean_code():
    clean = code_of(IMAGES)
    noise = RANDOM.choice([-0.1, 0.1], IMAGES.shape)
    by_chance = np.clip(IMAGES + noise, 0, 1).astype(np.float32)
    found = perturbed(cropd.robust_autoencoder(attacks.linf_pgd(0.1, steps=10)))
    assert np.abs(found - IMAGES).max() <= 0.1 + 1e-6
    closeness = lambda x: np.diag(cosines(code_of(x), clean)).mean()  # noqa: E731
    assert closeness(found) < closeness(by_chance) - 0.01


def test_an_attack_at_random_climbs_along_a_direction_of_its_own_in_each_image(monkeypatch):
    directions = RANDOM.standard_normal(IMAGES.shape).astype(np.float32)
    monkeypatch.setattr(cropd.objective, "_directions", lambda keys, shape: directions)
    objective = cropd.robust_autoencoder(
        attacks.fgsm(0.1, bounds=None), weights=Weights(0.0, 0.0, denoising=1.0), aim="random"
    )
    _, back = jax.vjp(lambda x: MODEL.apply(VARIABLES, x), jnp.asarray(IMAGES))
    expected = IMAGES + 0.1 * np.sign(back(directions)[0])
    np.testing.assert_allclose(perturbed(objective), expected, atol=1e-6)


def test_random_directions_are_standard_normal_and_those_of_the_examples_keys():
    found = cropd.objective._directions(jax.random.split(jax.random.key(2), 4000), SHAPE)
    assert found.shape == (4000, *SHAPE)
    assert abs(found.mean()) < 0.05
    assert abs(np.cov(found.reshape(4000, -1).T) - np.eye(16)).max() < 0.12
    some = cropd.objective._directions(KEYS[np.array([5, 2])], SHAPE)
    np.testing.assert_array_equal(some, cropd.objective._directions(KEYS, SHAPE)[np.array([5, 2])])


def params_after(objective, batch=None, count=2):
    optimizer = training.sgd(1e-3, momentum=0.0)
    state = training.create_state(MODEL, optimizer, jax.random.key(1), SHAPE)
    step = jax.jit(training.train_step(MODEL, optimizer, objective))
    for _ in range(count):
        state, _ = step(state, BATCH_OF_8 if batch is None else batch)
    return state.params


def plain_autoencoder():
    def loss(context, forward, images, x_adv, labels):
        rebuilt, stats = forward(images)
        return losses.squared_error(rebuilt, images) * images[0].size, {}, stats

    return training.Objective(lambda context, images, labels: (images, {}, {}), loss)


def same(tree, other):
    chex.assert_trees_all_equal(tree, other)


def test_with_lambda_zero_it_is_a_plain_autoencoder_bit_for_bit():
    objective = cropd.robust_autoencoder(ATTACK, weights=Weights(contrast=0.0))
    same(params_after(objective), params_after(plain_autoencoder()))


def test_labels_are_not_looked_at_and_there_is_no_place_for_a_foundation_model():
    objective = cropd.robust_autoencoder(ATTACK, weights=ALL)
    others = {**BATCH_OF_8, "label": np.arange(BATCH, dtype=np.int32)}
    same(params_after(objective), params_after(objective, others))
    names = set(inspect.signature(cropd.robust_autoencoder).parameters)
    names |= set(inspect.signature(training.train_step).parameters)
    assert not any(word in name for name in names for word in ("foundation", "classif", "head"))


def test_the_real_autoencoder_learns_by_the_common_step():
    model = models.autoencoder((8, 8, 1), widths=(8,), latent_channels=2, latent_norm=True)
    images = RANDOM.random((BATCH, 8, 8, 1), dtype=np.float32)
    optimizer = optax.adam(1e-2)
    objective = cropd.robust_autoencoder(attacks.linf_pgd(0.1, steps=1), weights=ALL)
    state = training.create_state(model, optimizer, jax.random.key(1), (8, 8, 1))
    step = jax.jit(training.train_step(model, optimizer, objective))
    seen = []
    for _ in range(30):
        state, metrics = step(state, {**BATCH_OF_8, "image": images})
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0] - 1


def test_held_anchors_get_no_gradient_from_the_contrastive_term():
    x_adv = jnp.clip(IMAGES + 0.1, 0, 1)
    only = Weights(clean=0.0, contrast=1.0)

    def gradient(anchor_gradient):
        objective = cropd.robust_autoencoder(
            ATTACK, weights=only, form="alignment", anchor_gradient=anchor_gradient
        )

        def loss(images):
            return objective.loss(context(), forward, images, x_adv, LABELS)[0].sum()

        return jax.jit(jax.grad(loss))(jnp.asarray(IMAGES))

    assert np.abs(gradient("both")).max() > 1e-6
    np.testing.assert_array_equal(gradient("adversarial"), 0)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("form must be one of", {"form": "triplet"}),
        ("aim must be one of", {"aim": "up"}),
        ("anchor_gradient must be one of", {"anchor_gradient": "none"}),
        ("temperature must be", {"temperature": 0.0}),
        ("weights.denoising must be", {"weights": Weights(denoising=-1.0)}),
        ("weights must not all be 0", {"weights": Weights(0.0, 0.0)}),
        ("attack must start at random", {"attack": attacks.linf_pgd(0.1, start="none")}),
    ],
)
def test_bad_arguments_are_refused_at_once(message, options):
    with pytest.raises(ValueError, match=message):
        cropd.robust_autoencoder(**{"attack": ATTACK, **options})


def test_weights_are_named_and_no_dict():
    robust_autoencoder = inspect.unwrap(cropd.robust_autoencoder)
    with pytest.raises(TypeError, match=r"weights must be cropd.Weights\(...\), got {'clean'"):
        robust_autoencoder(ATTACK, weights={"clean": 1.0})


def test_denoising_has_a_gradient_at_the_image_itself():
    objective = cropd.robust_autoencoder(
        attacks.linf_pgd(0.1, steps=2, start="none"), weights=Weights(0.0, 0.0, denoising=1.0)
    )
    assert (np.abs(perturbed(objective) - IMAGES).max((1, 2, 3)) > 0.05).all()


def test_the_recommended_step_goes_far_out_of_the_ball_and_rebuilds_the_image():
    objective = cropd.recommended(0.05, radius=4, noise=2, bounds=None)
    found = perturbed(objective)
    by_hand = cropd.robust_autoencoder(
        attacks.n_fgsm(0.2, noise=2, start="gaussian", bounds=None),
        weights=Weights(0.0, 0.0, denoising=1.0), aim="random",
    )  # fmt: skip
    np.testing.assert_array_equal(found, perturbed(by_hand))
    for name in ("eps", "radius"):
        with pytest.raises(ValueError, match=f"{name} must be > 0, got 0"):
            cropd.recommended(**{"eps": 0.1, name: 0})
    with pytest.raises(ValueError, match=r"eps must be in the unit of the images.* got 8"):
        cropd.recommended(8)
