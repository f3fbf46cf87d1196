"""A defended model is its parts in a row; its head is an optimum; its bound holds."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression

from jaxrobust import attacks, checkpoint, cropd, losses, models, parallel, training
from jaxrobust.training import linear_head

SHAPE, CLASSES, BATCH = (8, 8, 1), 3, 6
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.random((BATCH, *SHAPE), dtype=np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)
PREPROCESSOR = models.autoencoder(SHAPE, widths=(8,), latent_channels=2, latent_norm=True)
FOUNDATION = models.preact_resnet(stages=(1,), widths=(8,), classes=5, norm="batch")
SIZE = (12, 10, 3)
DEFENDED = models.defend(PREPROCESSOR, SIZE, FOUNDATION, CLASSES)


def drawn():
    made = DEFENDED.init(jax.random.key(0), SHAPE)
    shape = made["params"]["head"]["kernel"].shape
    made["params"]["head"]["kernel"] = jax.random.normal(jax.random.key(1), shape)
    return made


@pytest.fixture(scope="module")
def variables():
    return drawn()


def by_hand(variables, x):
    x = PREPROCESSOR.apply(models.part(variables, "preprocessor"), x)
    x = jax.image.resize(x, (len(x), *SIZE[:2], 1), "bilinear")
    x = jnp.concatenate([x] * 3, 3)
    theirs = models.part(variables, "foundation")
    answer, taps = FOUNDATION.apply(theirs, x, taps=("features",))
    head = variables["params"]["head"]
    return x, taps["features"], taps["features"] @ head["kernel"] + head["bias"], answer


def test_the_composition_is_its_parts_in_a_row(variables):
    taps = ("resized", "foundation.features", "preprocessor.latent")
    logits, found = DEFENDED.apply(variables, IMAGES, taps=taps)
    resized, features, expected, _ = by_hand(variables, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["resized"], resized, atol=1e-6)
    np.testing.assert_allclose(found["foundation.features"], features, rtol=1e-4, atol=1e-6)
    code = PREPROCESSOR.encode(models.part(variables, "preprocessor"), IMAGES)
    np.testing.assert_allclose(found["preprocessor.latent"], code, rtol=1e-5, atol=1e-6)


def test_swapped_in_the_foundation_keeps_its_own_answer(variables):
    swapped = models.defend(PREPROCESSOR, SIZE, FOUNDATION)
    parts = {name: models.part(variables, name) for name in ("preprocessor", "foundation")}
    logits = swapped.apply(models.join(**parts), IMAGES)
    np.testing.assert_allclose(logits, by_hand(variables, IMAGES)[3], rtol=1e-4, atol=1e-5)
    alone = models.defend(None, (*SIZE[:2], 3), FOUNDATION)
    found = alone.apply(models.join(foundation=parts["foundation"]), IMAGES)
    assert found.shape == (BATCH, 5)


def test_a_latent_of_the_preprocessor_can_be_nudged(variables):
    shape = (BATCH, 4 * 4 * 2)
    nudge = lambda d: DEFENDED.apply(  # noqa: E731
        variables, IMAGES, perturbations={"preprocessor.latent": d}
    )
    np.testing.assert_array_equal(nudge(jnp.zeros(shape)), DEFENDED.apply(variables, IMAGES))
    assert (np.asarray(jax.grad(lambda d: nudge(d)[:, 0].sum())(jnp.zeros(shape))) != 0).any()


def test_frozen_parts_stand_still_and_the_others_learn(variables):
    batch = {"image": IMAGES, "label": LABELS, "index": np.arange(BATCH, dtype=np.int32)}

    def moved(frozen):
        model = models.defend(PREPROCESSOR, SIZE, FOUNDATION, CLASSES, frozen=frozen)
        # Decay moves whatever has no gradient.
        optimizer = optax.adamw(1e-2, weight_decay=0.1)
        state = training.create_state(model, optimizer, jax.random.key(0), SHAPE)
        state = state._replace(
            params=variables["params"], batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(variables["params"]),
        )  # fmt: skip
        step = jax.jit(training.train_step(model, optimizer, training.standard()))
        after, _ = step(state, batch)
        after = after.variables()
        changed = lambda kind, name: any(  # noqa: E731
            (np.asarray(a) != np.asarray(b)).any()
            for a, b in zip(
                jax.tree.leaves(after[kind].get(name)),
                jax.tree.leaves(variables[kind].get(name)),
                strict=True,
            )
        )
        names = ("preprocessor", "foundation", "head")
        return [changed("params", name) for name in names], changed("batch_stats", "foundation")

    assert moved(("preprocessor", "foundation")) == ([False, False, True], False)
    assert moved(("preprocessor",)) == ([False, True, True], True)
    assert moved(()) == ([True, True, True], True)


def test_a_saved_configuration_makes_the_same_model_again(variables):
    again = models.build(**json.loads(json.dumps(DEFENDED.config)))
    same = again.apply(variables, IMAGES)
    np.testing.assert_array_equal(same, DEFENDED.apply(variables, IMAGES))


def test_weights_behind_a_filter_that_has_none_come_back_from_their_file(tmp_path):
    path, model = tmp_path / "weights.safetensors", models.defend(models.jpeg(75), None, FOUNDATION)
    made = model.init(jax.random.key(0), SHAPE)
    checkpoint.save_weights(path, made)
    loaded = checkpoint.load_weights(path)
    np.testing.assert_array_equal(model.apply(loaded, IMAGES), model.apply(made, IMAGES))
    np.testing.assert_array_equal(model.train(loaded, IMAGES)[0], model.train(made, IMAGES)[0])
    with pytest.raises(ValueError, match="variables must hold a preprocessor, got foundation"):
        models.defend(PREPROCESSOR, None, FOUNDATION).apply(loaded, IMAGES)


def with_features(variables, count):
    head = variables["params"]["head"]
    own = {"params": {**head, "kernel": np.resize(head["kernel"], (count, CLASSES))}}
    parts = {name: models.part(variables, name) for name in ("preprocessor", "foundation")}
    return models.join(**parts, head=own)


def without_head(variables):
    parts = {name: models.part(variables, name) for name in ("preprocessor", "foundation")}
    return models.join(**parts)


def with_classes(variables, count):
    own = jax.tree.map(
        lambda a: np.resize(a, (*a.shape[:-1], count)), models.part(variables, "head")
    )
    parts = {name: models.part(variables, name) for name in ("preprocessor", "foundation")}
    return models.join(**parts, head=own)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("resize must be", lambda v: models.defend(None, (3,), FOUNDATION)),
        ("resize.0. must be", lambda v: models.defend(None, 0, FOUNDATION)),
        ("head must be an integer", lambda v: models.defend(None, None, FOUNDATION, 0)),
        ("frozen must be one of", lambda v: models.defend(None, None, FOUNDATION, frozen=("F",))),
        ("parts must be one of", lambda v: models.join(backbone={})),
        (
            "head must be variables, .* got a dict of kernel, bias",
            lambda v: models.join(head=v["params"]["head"]),
        ),
        (
            r"head must have a kernel .8, 3. for the features 'features', got .7, 3.",
            lambda v: DEFENDED.apply(with_features(v, 7), IMAGES),
        ),
        (
            "variables must hold a F, got head: models.join",
            lambda v: models.part(models.join(head={"params": {}}), "F"),
        ),
        ("taps must be among", lambda v: DEFENDED.apply(v, IMAGES, taps=("foundation.nothing",))),
        ("taps must be one of", lambda v: DEFENDED.apply(v, IMAGES, taps=("nothing",))),
        ("taps must be a tuple", lambda v: DEFENDED.apply(v, IMAGES, taps="resized")),
        (
            "perturbations must name activations inside preprocessor or foundation",
            lambda v: DEFENDED.apply(v, IMAGES, perturbations={"latent": 0.0}),
        ),
        (
            "inside foundation, such as 'foundation.features', got 'preprocessor.latent'",
            lambda v: models.defend(None, SIZE, FOUNDATION).apply(
                v, IMAGES, perturbations={"preprocessor.latent": 0.0}
            ),
        ),
        (
            "got 'foundation'",
            lambda v: DEFENDED.apply(v, IMAGES, perturbations={"foundation": 0.0}),
        ),
        ("x must be float", lambda v: DEFENDED.apply(v, np.zeros((1, 8, 8, 1), np.uint8))),
        ("x must be \\[b, 8, 8, 1\\]", lambda v: DEFENDED.apply(v, np.zeros((1, 9, 8, 1)))),
        (
            "x must have 1 or 3 channels",
            lambda v: models.defend(None, SIZE, FOUNDATION).apply(
                models.join(foundation=models.part(v, "foundation")), np.zeros((1, 8, 8, 2))
            ),
        ),
        ("made by models.defend", lambda v: cropd.features(FOUNDATION, v, IMAGES)),
        ("variables must hold a head", lambda v: DEFENDED.apply(without_head(v), IMAGES)),
        ("head must have 3 classes, got 7", lambda v: DEFENDED.apply(with_classes(v, 7), IMAGES)),
        (
            "variables hold a preprocessor, and the model was made without one",
            lambda v: models.defend(None, SIZE, FOUNDATION, 3).apply(v, IMAGES),
        ),
        (
            r"of a \w+ for inputs of shape \(12, 10, 1\): For parameter .kernel. in ./\w+",
            lambda v: models.defend(None, SIZE[:2], FOUNDATION, 3).apply(
                models.join(foundation=models.part(v, "foundation"), head=models.part(v, "head")),
                IMAGES,
            ),
        ),
    ],
)
def test_bad_arguments_are_refused(message, call, variables):
    with pytest.raises(ValueError, match=message):
        call(variables)


def test_parts_that_are_no_models_are_refused():
    defend = inspect.unwrap(models.defend)
    with pytest.raises(TypeError, match=r"foundation must be a Model, such as models.from_linen"):
        defend(None, None, lambda x: x)
    with pytest.raises(TypeError, match="preprocessor must be a Model"):
        defend(lambda x: x, None, FOUNDATION)


def test_one_number_resizes_to_squares_and_a_model_shows_its_settings():
    square = models.defend(None, 8, FOUNDATION)
    of_numpy = inspect.unwrap(models.defend)(None, np.int64(8), FOUNDATION, np.int64(3))
    assert json.loads(json.dumps(of_numpy.config))["resize"] == [8, 8]
    assert square.config == models.defend(None, (8, 8), FOUNDATION).config
    assert repr(square).startswith("Model(name='defended', preprocessor=None, resize=[8, 8]")


# ---- heads --------------------------------------------------------------------------------------


def test_features_are_what_the_head_sees_in_batches_of_any_size(variables):
    features = by_hand(variables, IMAGES)[1]
    for size in (2, 4, 100):
        found = cropd.features(DEFENDED, without_head(variables), IMAGES, batch_size=size)
        np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_features_are_the_same_on_any_number_of_devices(variables, devices):
    # As they come from training: on one device.
    committed = jax.device_put(variables, jax.devices()[0])
    mesh = parallel.data_mesh(devices)
    found = cropd.features(DEFENDED, committed, IMAGES, batch_size=4, mesh=mesh)
    np.testing.assert_allclose(found, by_hand(variables, IMAGES)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["all", "each"])
def test_the_fitted_head_is_the_optimum_that_scikit_learn_finds(scale):
    drawn = RANDOM.normal(size=(90, 5))
    features = drawn * [1, 10, 0.1, 1, 0] + 3
    labels = (drawn[:, :3] + RANDOM.normal(size=(90, 3))).argmax(1)
    decay = 1e-2
    head = cropd.fit_head(features, labels, 3, decay=decay, scale=scale)["params"]
    spread = features.std(0)
    spread = np.where(spread > 0, spread, 1) if scale == "each" else np.sqrt((spread**2).mean())
    scaled = (features - features.mean(0)) / spread
    theirs = LogisticRegression(C=1 / (len(labels) * decay), tol=1e-8, max_iter=5000)
    theirs.fit(scaled, labels)
    p = jax.nn.softmax(np.float32(features) @ head["kernel"] + head["bias"])
    np.testing.assert_allclose(p, theirs.predict_proba(scaled), atol=2e-3)


@pytest.mark.parametrize("scale", ["all", "each"])
@pytest.mark.parametrize("value", [3.0, 0.1, 1e-3])
def test_a_constant_feature_has_no_weight_to_speak_of(scale, value):
    features = RANDOM.normal(size=(90, 3))
    labels = features.argmax(1)
    features[:, 2] = value
    kernel = cropd.fit_head(features, labels, 3, decay=1e-2, scale=scale)["params"]["kernel"]
    assert np.abs(kernel[2]).max() < 1e-3 < np.abs(kernel[0]).max()


def test_a_feature_that_moved_once_gets_no_weight_of_its_own_unless_asked():
    features = RANDOM.normal(size=(90, 3))
    labels = features.argmax(1)
    features[:, 2] = 0
    features[np.flatnonzero(labels == 2)[0], 2] = 1e-4
    size = {
        scale: np.abs(cropd.fit_head(features, labels, 3, scale=scale)["params"]["kernel"][2]).max()
        for scale in ("all", "each")
    }
    assert size["all"] < 1 < 100 < size["each"]


def test_the_unit_of_all_features_does_not_matter():
    features = RANDOM.normal(size=(60, 4))
    labels = features[:, :3].argmax(1)
    one, two = (cropd.fit_head(features * unit, labels, 3)["params"] for unit in (1, 1000))
    np.testing.assert_allclose(one["kernel"], 1000 * two["kernel"], rtol=1e-2, atol=1e-3)


def test_a_head_is_refused_what_does_not_fit():
    good = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    for message, arguments in (
        ("features must be", (good[0], good[1][:3], 2)),
        ("labels must lie in", (*good, 1)),
        ("decay must be", (*good, 2)),
        ("features must be finite, 8 are not", (good[0] + np.nan, good[1], 2)),
        ("classes must be", (*good, 0)),
        ("scale must be one of", (*good, 2)),
    ):
        options = {"decay": 0.0} if "decay" in message else {}
        options |= {"scale": "none"} if "scale" in message else {}
        with pytest.raises(ValueError, match=message):
            cropd.fit_head(*arguments, **options)


def test_a_head_that_is_not_at_its_optimum_says_so_and_another_compiles_nothing():
    features = RANDOM.normal(size=(40, 3))
    labels = features[:, 0] > 0
    with pytest.warns(UserWarning, match="not at its optimum after 1 iterations"):
        cropd.fit_head(features, np.int32(labels), 2, iterations=1)
    before = linear_head._value_and_gradient._cache_size()
    cropd.fit_head(features + 1, np.int32(~labels), 2, decay=0.3)
    assert linear_head._value_and_gradient._cache_size() == before


# ---- the bound, on a network whose constants are known ------------------------------------------


def linear_world(pixels=6, code=4, width=5, seed=3):
    """A pre-processor, a foundation model and variables, all linear but for the normalised code."""
    draw = np.random.default_rng(seed).normal
    names = {"E": (pixels, code), "D": (code, pixels), "F": (pixels, width)}
    w = {name: draw(size=shape).astype(np.float32) for name, shape in names.items()}

    def preprocess(variables, x, taps=(), perturbations=None):
        unit = losses.unit_rows(x.reshape(len(x), -1) @ w["E"])
        image = (unit @ w["D"]).reshape(x.shape)
        return (image, {"latent": unit}) if taps else image

    def classify(variables, x, taps=(), perturbations=None):
        features = x.reshape(len(x), -1) @ w["F"]
        return (features, {"features": features}) if taps else features

    model = lambda apply: models.Model(  # noqa: E731
        init=lambda key, shape: {"params": {}}, apply=apply, train=None, config={"name": "linear"}
    )
    defended = models.defend(model(preprocess), None, model(classify), CLASSES)
    head = {"kernel": draw(size=(width, CLASSES)).astype(np.float32), "bias": np.zeros(CLASSES)}
    variables = models.join(
        preprocessor={"params": {}}, foundation={"params": {}}, head={"params": head}
    )
    return defended, variables, float(np.linalg.norm(w["D"] @ w["F"], 2))


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_with_exact_constants_and_its_terms_are_right(seed):
    defended, variables, lipschitz = linear_world(seed=seed)
    x = np.random.default_rng(seed).random((40, 2, 3, 1), dtype=np.float32)
    labels = np.arange(40) % CLASSES
    report = cropd.bound_report(
        defended, variables, x, labels, attack=attacks.linf_pgd(0.3, steps=10),
        key=jax.random.key(0), lipschitz=lipschitz, batch_size=16,
    )  # fmt: skip
    assert (report.adversarial_loss <= report.bound + 1e-5).all()
    assert (report.adversarial_loss > report.clean_loss).mean() > 0.9
    np.testing.assert_allclose(report.displacement**2 / 2, 1 - report.cosine, atol=1e-6)
    logits = np.asarray(defended.apply(variables, x), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(report.clean_loss, -log_p[np.arange(40), labels], atol=1e-4)
    kernel = variables["params"]["head"]["kernel"]
    widest = [np.linalg.norm(kernel - kernel[:, [y]], axis=0).max() for y in labels]
    np.testing.assert_allclose(report.head, widest, rtol=1e-5)
    assert report.means["holds"] == 1


def test_the_bound_is_the_same_on_any_number_of_devices():
    defended, variables, _ = linear_world()
    variables = jax.device_put(variables, jax.devices()[0])
    x = np.random.default_rng(1).random((20, 2, 3, 1), dtype=np.float32)

    def report(**options):
        return cropd.bound_report(
            defended, variables, x, np.zeros(20, np.int32), attack=attacks.linf_pgd(0.2, steps=3),
            key=jax.random.key(0), **options,
        )  # fmt: skip

    alone, many = report(), report(batch_size=5, mesh=parallel.data_mesh(8))
    for ours, theirs in zip(many, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_displacements_that_a_cosine_in_float32_does_not_show_are_measured():
    defended, variables, lipschitz = linear_world()
    x = np.random.default_rng(1).random((20, 2, 3, 1), dtype=np.float32)
    report = cropd.bound_report(
        defended, variables, x, np.zeros(20, np.int32), attack=attacks.linf_pgd(1e-4, steps=3),
        key=jax.random.key(0),
    )  # fmt: skip
    assert (report.displacement > 1e-6).all()
    assert (report.displacement < 1e-3).all()
    assert report.lipschitz.max() <= lipschitz * 1.05
    still = cropd.bound_report(
        defended, variables, x, np.zeros(20, np.int32), attack=attacks.linf_pgd(0.0, steps=1),
        key=jax.random.key(0),
    )  # fmt: skip
    assert not still.displacement.any()
    assert not still.lipschitz.any()
    np.testing.assert_allclose(still.bound, still.clean_loss)


def test_measured_along_the_attack_the_lipschitz_constant_is_below_the_true_one():
    defended, variables, lipschitz = linear_world()
    x = np.random.default_rng(1).random((20, 2, 3, 1), dtype=np.float32)
    report = cropd.bound_report(
        defended, variables, x, np.zeros(20, np.int32), attack=attacks.linf_pgd(0.2, steps=5),
        key=jax.random.key(0),
    )  # fmt: skip
    assert 0 < report.means["largest_lipschitz"] <= lipschitz * (1 + 1e-3)
    assert report.means["holds"] == 1


def test_a_bound_needs_a_preprocessor_and_a_head():
    with pytest.raises(ValueError, match="a preprocessor and a head"):
        cropd.bound_report(
            models.defend(None, None, FOUNDATION), {}, IMAGES, LABELS,
            attack=attacks.linf_pgd(0.1), key=jax.random.key(0),
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"lipschitz": -1.0}])
def test_a_bound_of_bad_numbers_is_refused(options, variables):
    with pytest.raises(ValueError, match=next(iter(options))):
        cropd.bound_report(
            DEFENDED, variables, IMAGES, LABELS,
            attack=attacks.linf_pgd(0.1), key=jax.random.key(0), **options,
        )  # fmt: skip


def test_a_foundation_of_another_input_size_is_named():
    foundation = models.vit(4, 8, 1, 2, classes=3)
    fitting = models.defend(None, (8, 8), foundation)
    built = fitting.init(jax.random.key(0), SHAPE)
    fitting.apply(built, IMAGES)
    other = models.defend(None, (12, 12), foundation)
    with pytest.raises(ValueError, match="gives 5 positions, got 10 from 9 patches"):
        other.apply(built, IMAGES)


def test_features_of_images_in_another_range_are_refused(variables):
    with pytest.raises(ValueError, match=r"images must lie in .0, 1., got values from 0"):
        cropd.features(DEFENDED, variables, 255 * IMAGES)


def test_saved_weights_with_missing_or_surplus_entries_are_named(variables, tmp_path):
    path, whole = tmp_path / "weights.safetensors", jax.tree.map(np.asarray, variables)
    head = whole["params"]["head"]
    for changed, name in (
        ({"kernel": head["kernel"]}, "head.bias"),
        ({**head, "scale": head["bias"]}, "head.scale"),
    ):
        params = {**whole["params"], "head": changed}
        checkpoint.save_weights(path, {**whole, "params": params})
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.load_weights(path, whole)
