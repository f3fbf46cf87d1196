"""AutoAttack as its users meet it: the ledger, small worlds, interruption, and what is refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrobust as jr
from jaxrobust import attacks, balls, evaluation, parallel
from jaxrobust.attacks import scheduler
from jaxrobust.evaluation import ledger
from jaxrobust.files import CheckpointError
from tests.test_apgd import BATCH, KEY, LABELS, X, logits_fn

EPS = 0.03


# As it is called outside of the tests, without their checks of the annotations.
unchecked = inspect.unwrap(jr.auto_attack)


def small_suite(eps=EPS, norm="linf", bounds=(0.0, 1.0)):
    box = {"bounds": bounds}
    return {
        "apgd-ce": attacks.apgd_ce(norm, eps, steps=10, **box),
        "apgd-t": attacks.apgd_t(norm, eps, targets=3, steps=10, **box),
        "fab-t": attacks.fab_t(norm, eps, targets=3, steps=8, **box),
        "square": attacks.square(norm, eps, queries=60, rescale=False, **box),
    }


def run(images=X, labels=LABELS, function=logits_fn, *, eps=EPS, chosen=None, **options):
    options = {"key": KEY, "progress": False, "batch_size": 16, **options}
    return jr.auto_attack(
        function, images, labels, eps=eps, version="custom",
        attacks=small_suite(eps) if chosen is None else chosen, **options,
    )  # fmt: skip


def same(a, b):
    np.testing.assert_array_equal(a.robust, b.robust)
    np.testing.assert_array_equal(a.broken_by, b.broken_by)
    np.testing.assert_allclose(a.x_adv, b.x_adv, atol=1e-6)
    assert a.accuracy == b.accuracy


@pytest.fixture(scope="module")
def whole():
    """With every eighth label wrong, so that some are misclassified as they are."""
    labels = jnp.where(jnp.arange(BATCH) % 8 == 0, (LABELS + 1) % 5, LABELS)
    return labels, run(labels=labels)


def test_every_flag_is_what_the_returned_image_shows(whole):
    labels, result = whole
    wrong = np.asarray(logits_fn(jnp.asarray(result.x_adv)).argmax(1) != labels)
    np.testing.assert_array_equal(wrong, ~result.robust)
    clean = np.asarray(logits_fn(X).argmax(1) != labels)
    np.testing.assert_array_equal(result.broken_by == "clean", clean)
    np.testing.assert_array_equal(result.broken_by == "", result.robust)
    untouched = result.robust | clean
    np.testing.assert_array_equal(result.x_adv[untouched], np.asarray(X)[untouched])
    assert balls.norms(jnp.asarray(result.x_adv) - X, "linf").max() <= EPS + 1e-6
    assert 0 < result.robust.mean() < 1 - clean.mean()


def test_accuracy_falls_from_stage_to_stage_and_ends_at_the_robust_one(whole):
    _, result = whole
    assert list(result.accuracy) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    stages = list(result.accuracy.values())
    assert stages == sorted(stages, reverse=True)
    assert stages[-1] == result.robust.mean()
    assert set(result.seconds) == set(result.accuracy) - {"clean"}


@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_batch_size_changes_nothing(whole, batch_size):
    labels, result = whole
    same(run(labels=labels, batch_size=batch_size), result)


def test_order_and_company_change_nothing(whole):
    labels, result = whole
    order = np.random.default_rng(0).permutation(BATCH)[:30]
    part = run(X[order], labels[order], indices=order)
    np.testing.assert_array_equal(part.robust, result.robust[order])
    np.testing.assert_array_equal(part.broken_by, result.broken_by[order])
    np.testing.assert_allclose(part.x_adv, result.x_adv[order], atol=1e-6)


def test_eight_devices_give_the_same(whole):
    labels, result = whole
    same(run(labels=labels, mesh=jr.parallel.data_mesh(8)), result)


def test_killed_at_any_round_and_started_again_it_ends_the_same(whole, tmp_path, monkeypatch):
    labels, result = whole
    from jaxrobust.evaluation import ledger as module

    record, told, calls = module.Ledger.record, [], 0

    def dies(self, example, number, x_adv):
        nonlocal calls
        record(self, example, number, x_adv)
        told.append((self.current, example, number))
        calls += 1
        if calls in (5, 40, 75, 120, 160):
            self.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Ledger, "record", dies)
    state, stops = tmp_path / "state.npz", 0
    while True:
        try:
            again = run(labels=labels, state=state)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 4
    same(again, result)
    assert len(set(told)) == len(told)  # no round of any example ran twice
    before = len(told)
    same(run(labels=labels, state=state), result)
    assert len(told) == before  # a finished evaluation is only read


def test_the_state_of_another_evaluation_and_a_damaged_one_are_refused(tmp_path):
    state = tmp_path / "state.npz"
    one = {"fab-t": attacks.fab_t("linf", EPS, targets=1, steps=3)}
    run(X[:8], LABELS[:8], chosen=one, state=state)
    with pytest.raises(CheckpointError, match="another evaluation"):
        run(X[:8], LABELS[:8], chosen=one, state=state, key=jax.random.key(7))
    with pytest.raises(CheckpointError, match="another evaluation"):  # the same answers, moved
        run(X[:8], LABELS[:8], lambda x: logits_fn(x) * 1.1, chosen=one, state=state)
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="no state of an evaluation"):
        run(X[:8], LABELS[:8], chosen=one, state=state)
    assert len(state.read_bytes()) == len(content) // 2  # and not overwritten


def test_the_order_of_the_attacks_belongs_to_the_state(tmp_path):
    state = tmp_path / "state.npz"
    suite = {name: small_suite()[name] for name in ("apgd-ce", "square")}
    run(X[:8], LABELS[:8], chosen=suite, state=state)
    with pytest.raises(CheckpointError, match="another evaluation"):
        run(X[:8], LABELS[:8], chosen=dict(reversed(suite.items())), state=state)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"clean": attacks.apgd_ce("linf", EPS)}, "attacks must have names of their own"),
        ({"ddn": attacks.ddn()}, "attacks must be attacks on a classifier .* got DDN for 'ddn'"),
        (
            {"far": attacks.apgd_ce("linf", 0.9)},
            "attacks must stay within eps 0.03, got 0.9 for 'far'",
        ),
        (
            {"wide": attacks.apgd_ce("linf", EPS, bounds=(-1.0, 1.0))},
            r"attacks must have bounds \(0.0, 1.0\)",
        ),
        ({"round": attacks.apgd_ce("l2", EPS)}, "attacks must be of norm 'linf', got .* of 'l2'"),
        ({"turn": attacks.spatial()}, "attacks must be of norm 'linf', got Spatial of None"),
        ({"any": attacks.fab("linf")}, "attacks must stay within eps 0.03, got inf for 'any'"),
    ],
)
def test_attacks_beyond_the_threat_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        run(chosen=chosen)


def test_radii_are_compared_example_by_example():
    radii = np.where(np.arange(BATCH) == 7, 0.01, EPS)
    with pytest.raises(ValueError, match=r"within eps 0.01, got 0.03 for 'apgd-ce' at row 7"):
        run(eps=radii, chosen={"apgd-ce": attacks.apgd_ce("linf", EPS)})
    one = {"apgd-ce": attacks.apgd_ce("linf", radii, steps=5)}
    result = run(eps=radii, chosen=one)
    moved = balls.norms(jnp.asarray(result.x_adv) - X, "linf")
    assert (moved <= radii + 1e-6).all()
    with pytest.raises(ValueError, match=r"within eps 0.03, got 0.05 for 'map' at row 0"):
        run(
            chosen={
                "map": attacks.apgd_ce("linf", np.linspace(0, 0.05, X[0].size).reshape(X[0].shape))
            }
        )


def test_only_what_has_no_norm_may_name_another_threat():
    with pytest.raises(ValueError, match="norm must be one of"):
        run(norm="lone", chosen={"apgd-ce": attacks.apgd_ce("linf", EPS)})
    turned = run(norm="turned", eps=1.0, chosen={"turn": attacks.spatial(grid=(1, 1, 3))})
    assert turned.norm == "turned"


def test_scaling_the_logits_does_not_change_the_verdict(whole):
    labels, result = whole
    scaled_logits = lambda x, scale: scale * logits_fn(x)  # noqa: E731
    for scale in (1e-4, 1e4):
        scaled = run(labels=labels, function=scaled_logits, args=(jnp.float32(scale),))
        # One example of 48 is 2.1 points.
        assert abs(scaled.robust.mean() - result.robust.mean()) < 0.022


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_handled_and_said(classes):
    few = lambda x: logits_fn(x)[:, :classes]  # noqa: E731
    result = run(labels=few(X).argmax(1), function=few)
    wrong = few(jnp.asarray(result.x_adv)).argmax(1) != few(X).argmax(1)
    np.testing.assert_array_equal(wrong, ~result.robust)
    assert 0 < result.robust.mean() < 1
    assert any(f"{classes} classes: the targeted DLR needs 4" in note for note in result.notes)


def test_many_classes_one_image_and_images_that_are_all_misclassified():
    wide = lambda x: jnp.concatenate([logits_fn(x), jnp.full((len(x), 995), -9.0)], 1)  # noqa: E731
    one = {"apgd-t": small_suite()["apgd-t"]}
    few, many = (run(X[:3], LABELS[:3], f, chosen=one) for f in (logits_fn, wide))
    np.testing.assert_array_equal(few.robust, many.robust)
    assert run(X[:1], LABELS[:1]).robust.shape == (1,)
    result = run(X[:5], (LABELS[:5] + 1) % 5)
    assert not result.robust.any()
    np.testing.assert_array_equal(result.x_adv, X[:5])
    assert set(result.broken_by) == {"clean"}


def test_an_ulp_outside_the_box_is_tolerated_and_never_widened():
    x = jnp.where(X < 0.1, -1e-7, X)
    result = run(x, logits_fn(x).argmax(1))
    assert (result.x_adv >= np.minimum(x, 0)).all()


def test_the_standard_suite_is_the_published_one():
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    standard = evaluation.suite("standard", "linf", EPS)
    assert list(standard) == names
    assert standard["square"].queries == 5000
    assert not standard["square"].rescale
    assert standard["apgd-t"].targets == 9
    sparse = evaluation.suite("standard", "l1", 12.0)
    assert (sparse["apgd-ce"].restarts, sparse["apgd-t"].targets) == (5, 5)
    assert sparse["apgd-ce"].attack.large_radii
    plus = evaluation.suite("plus", "l2", 0.5)
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert {a.draws for a in evaluation.suite("rand", "linf", EPS).values()} == {20}


def test_a_random_classifier_is_evaluated_by_its_majority():
    def shaky(x, keys):
        noise = jax.vmap(lambda k: jax.random.normal(k, (5,)))(keys)
        return logits_fn(x) + 0.2 * noise

    chosen = {"apgd-ce": attacks.apgd_ce("linf", EPS, steps=8, draws=6)}
    result = run(function=shaky, chosen=chosen)
    steady = run(chosen={"apgd-ce": attacks.apgd_ce("linf", EPS, steps=8)})
    assert abs(result.robust.mean() - steady.robust.mean()) < 0.15
    same(run(function=shaky, chosen=chosen, batch_size=64), result)


def test_a_random_classifier_is_driven_to_where_it_is_hardly_ever_right():
    """Right in half of all draws one third of the way, and in one of ten at the end."""

    def shaky(x, keys):
        ahead = 1.0 - 30 * (x.mean((1, 2, 3)) - 0.5) / 1.0
        noise = jax.vmap(lambda key: jax.random.normal(key))(keys)
        return jnp.stack([ahead + 1.5 * noise, jnp.zeros_like(ahead)], 1)

    x, labels = jnp.full((32, 2, 2, 1), 0.5), jnp.zeros(32, int)
    weak = {"apgd-ce": attacks.apgd_ce("linf", 0.1, steps=20, draws=20)}
    result = run(x, labels, shaky, eps=0.1, chosen=weak)
    assert result.accuracy["clean"] > 0.8
    assert result.robust.mean() == 0
    assert "most of 20 draws" in result.notes[0]
    # Far beyond the first majority, which draws near 0.533 would give.
    assert result.x_adv.mean((1, 2, 3)).min() > 0.55


def test_gradients_and_answers_that_are_no_numbers_break_nothing_they_should_not():
    def rooted(x):  # an infinite gradient at 0.5, where the images are
        return jnp.stack([1 + jnp.sqrt(jnp.abs(x - 0.5)).sum((1, 2, 3)), jnp.zeros(len(x))], 1)

    x, labels = jnp.full((4, 2, 2, 1), 0.5), jnp.zeros(4, int)
    for norm in ("linf", "l2"):
        chosen = {
            "apgd-ce": attacks.apgd_ce(norm, EPS, steps=5),
            "fab-t": attacks.fab_t(norm, EPS, steps=5),
        }
        result = run(x, labels, rooted, norm=norm, chosen=chosen)
        assert result.robust.all()
        assert np.isfinite(result.x_adv).all()

    def gives_up(x):  # no answer off the middle, which argmax takes for class 0
        z = jnp.stack([jnp.ones(len(x)), jnp.zeros(len(x))], 1)
        return jnp.where((x == 0.5).all((1, 2, 3))[:, None], z, jnp.nan)

    result = run(x, labels, gives_up, chosen={"square": attacks.square("linf", EPS, queries=5)})
    assert not result.robust.any()


def test_a_second_size_of_batch_or_set_compiles_nothing_new():
    traces = []

    def counted(x):
        traces.append(x.shape)
        return logits_fn(x)

    run(function=counted, batch_size=20)
    first = len(traces)
    run(X[:40], LABELS[:40], counted, batch_size=16, eps=0.02)
    new = traces[first:]
    # How many classes there are is asked of shapes alone, once per call.
    assert len(new) <= 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": X[:0], "labels": LABELS[:0]}, ValueError, "n >= 1"),
        ({"images": X[0]}, ValueError, r"\[n, h, w, c\]"),
        ({"images": 255 * X}, ValueError, "images must lie in"),
        ({"images": np.zeros(X.shape, np.uint8)}, TypeError, "floating point"),
        ({"labels": LABELS + 9}, ValueError, "labels must lie in"),
        ({"labels": LABELS[:3]}, ValueError, "labels must be"),
        ({"eps": 8.0}, ValueError, "8 / 255, not 8"),
        ({"eps": -0.1}, ValueError, "eps must be >= 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"key": jnp.zeros(2, jnp.uint32)}, ValueError, "key must be one typed key"),
        ({"indices": np.arange(3)}, ValueError, "indices must have shape"),
        ({"function": lambda x: logits_fn(x) * jnp.nan}, ValueError, "finite logits"),
        ({"function": lambda x: logits_fn(x)[:, :1]}, ValueError, "at least 2 classes"),
        ({"chosen": {}}, ValueError, "needs attacks"),
        ({"images": X.at[3].set(jnp.nan)}, ValueError, "images must lie in .* NaN"),
        ({"indices": np.arange(BATCH) / 2}, TypeError, "indices must be whole numbers"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_attack(change, error, message):
    with pytest.raises(error, match=message):
        run(**{"chosen": small_suite(), **change})


def test_a_box_is_needed():
    with pytest.raises(ValueError, match=r"bounds must be \(low, high\), .* got None"):
        unchecked(logits_fn, X, LABELS, eps=EPS, key=KEY, bounds=None)


def test_versions_and_attacks_exclude_each_other():
    with pytest.raises(ValueError, match="for version 'custom'"):
        jr.auto_attack(logits_fn, X, LABELS, eps=EPS, attacks=small_suite(), key=KEY)
    with pytest.raises(ValueError, match="version must be one of"):
        jr.auto_attack(logits_fn, X, LABELS, eps=EPS, version="strong", key=KEY)


def flagged(function):
    chosen = {name: small_suite()[name] for name in ("apgd-ce", "square")}
    labels = logits_fn(X).argmax(1)
    return {note.partition(":")[0] for note in run(X, labels, function, chosen=chosen).notes}


def test_autoattacks_own_flags_are_raised_and_only_where_they_apply():
    draw = np.random.default_rng(0)
    noisy = lambda x: logits_fn(x) + draw.normal(size=5).astype(np.float32)  # noqa: E731
    assert not flagged(logits_fn)
    assert flagged(lambda x: jax.nn.softmax(logits_fn(x))) == {"probabilities"}
    assert "repeatable" in flagged(noisy)
    found = flagged(lambda x: jax.lax.stop_gradient(logits_fn(x)))
    assert found == {"zero gradient", "black box"}


def test_a_result_says_of_which_question_it_is_the_answer(whole):
    _, result = whole
    assert (result.norm, result.eps, list(result.attacks)) == ("linf", EPS, list(small_suite()))
    assert jax.random.wrap_key_data(result.key) == KEY


def test_what_is_no_classifier_is_named():
    model = jr.models.small_cnn(channels=(2,), strides=(2,), kernel=3, dense=(5,))
    variables = model.init(KEY, X.shape[1:])
    for function, error, message in (
        (model, TypeError, "logits_fn must be a function .* got Model: pass lambda x, variables"),
        (model.apply, TypeError, "logits_fn must take .* got one that takes x last"),
        (lambda x, _: (logits_fn(x), x), ValueError, r"one array .* got a tuple"),
        (lambda x, _: logits_fn(x, x), TypeError, "positional argument"),
        (None, TypeError, "logits_fn must be a function .* got NoneType$"),
    ):
        with pytest.raises(error, match=message):
            unchecked(function, X, LABELS, eps=EPS, key=KEY, args=(variables,), progress=False)
    with pytest.raises(TypeError, match=r"args must be a tuple, such as \(labels,\), got dict"):
        unchecked(lambda x, _: logits_fn(x), X, LABELS, eps=EPS, key=KEY, args=variables)


def test_counts_may_be_numpys_and_no_bools():
    chosen = {"apgd-ce": small_suite()["apgd-ce"]}
    settings = {"eps": EPS, "version": "custom", "attacks": chosen, "key": KEY, "progress": False}
    result = unchecked(logits_fn, X, LABELS, batch_size=np.int64(16), **settings)
    same(result, run(chosen=chosen))
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got True"):
        unchecked(logits_fn, X, LABELS, batch_size=True, **settings)


def test_slots_are_refilled_while_others_go_on():
    """Twenty examples through four slots: every round ends once, the broken ones early."""
    search = attacks.apgd_ce("linf", EPS, steps=10).search(5)
    targets = jnp.zeros((BATCH, 1), jnp.int32)
    eps = np.full((BATCH, 1, 1, 1), EPS, np.float32)
    data = (np.asarray(X), np.asarray(LABELS), np.asarray(targets), eps)
    problem = scheduler.Problem(*data, jax.random.split(KEY, BATCH))
    ended = []
    scheduler.run(
        search, logits_fn, problem, [(i, 0) for i in range(20)],
        lambda example, number, broken, x_adv: ended.append((example, number, broken)), slots=4,
    )  # fmt: skip
    assert sorted(example for example, _, _ in ended) == list(range(20))
    assert {number for _, number, _ in ended} == {0}
    flags = {example: broken for example, _, broken in ended}
    alone = attacks.apgd_ce("linf", EPS, steps=10)(
        logits_fn, X, LABELS, jax.random.split(KEY, BATCH)
    )
    moved = np.asarray((alone != X).any((1, 2, 3)))
    assert [flags[i] for i in range(20)] == moved[:20].tolist()


def test_an_evaluation_with_rounded_products_says_so(monkeypatch):
    chosen = {"apgd-ce": small_suite()["apgd-ce"]}

    def notes():
        return run(chosen=chosen).notes

    assert not [note for note in notes() if "rounded" in note]
    monkeypatch.setattr(parallel, "exact_products", lambda: False)
    assert [note for note in notes() if 'default_matmul_precision("highest")' in note]


def test_logits_of_rounded_products_may_differ_more(monkeypatch):
    ours = np.array([[1.0, -2.0], [0.5, 3.0]])
    assert ledger.same_logits(ours * (1 + 1e-4), ours)
    assert not ledger.same_logits(ours * (1 + 5e-3), ours)
    monkeypatch.setattr(parallel, "exact_products", lambda: False)
    assert ledger.same_logits(ours * (1 + 5e-3), ours)
    assert not ledger.same_logits(ours * 1.1, ours)
