"""`evaluate`: its figures are those of its parts, its alarms stay, and it goes on where it was."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrobust as jr
from jaxrobust import evaluation, metrics
from jaxrobust.files import CheckpointError
from tests.test_apgd import BATCH, KEY, LABELS, X, logits_fn
from tests.test_auto_attack import small_suite

# As it is called outside of the tests, without their checks of the annotations.
unchecked = inspect.unwrap(jr.evaluate)
THREATS = {"linf": 0.03, "l2": 0.12}


def short(norm, eps, bounds):
    return small_suite(eps, norm, bounds)


LABELLED = jnp.where(jnp.arange(BATCH) % 8 == 0, (LABELS + 1) % 5, LABELS)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, jr.evaluate(
        logits_fn,
        X,
        LABELLED,
        threats=THREATS,
        suite=short,
        key=KEY,
        batch_size=32,
        out=folder,
        progress=False,
    )


def test_the_worst_case_is_taken_example_by_example_over_all_threats(found):
    _, report = found
    both = report.threats["linf"].robust & report.threats["l2"].robust
    assert report.worst_case == tuple(metrics.wilson_interval(int(both.sum()), BATCH))
    assert report.clean[0] == 1 - 6 / BATCH
    for threat in report.threats.values():
        assert report.worst_case[0] <= threat.accuracy[0] <= report.clean[0]
        assert threat.accuracy[1] < threat.accuracy[0] < threat.accuracy[2]


def test_classes_curve_time_and_work_are_told(found):
    _, report = found
    threat = report.threats["linf"]
    robust, labels = threat.robust, np.asarray(LABELLED)
    for c, accuracy in enumerate(threat.per_class):
        assert accuracy == pytest.approx(robust[labels == c].mean())
    assert threat.curve["eps"][4] == THREATS["linf"]
    accuracy = threat.curve["accuracy"]
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[0] == report.clean[0]
    assert accuracy[4] >= threat.accuracy[0]  # PGD-20 is the weaker attack
    assert set(threat.seconds) == set(threat.flops) == {"apgd-ce", "apgd-t", "fab-t", "square"}
    # Two dense layers, forward and backward to the input: 40 x 24 and 24 x 5 products each.
    gradient = 2 * 2 * (40 * 24 + 24 * 5)
    assert threat.flops["apgd-ce"] % gradient == 0
    assert threat.flops["apgd-ce"] >= gradient * 11 * report.images * report.clean[0] / 2


def test_the_json_holds_every_figure_and_robustbench_names_where_they_are_meant(found):
    folder, report = found
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert "clean_acc" not in stored  # two threats
    alone = dataclasses.replace(report, threats={"l2": report.threats["l2"]})
    assert alone.to_dict()["clean_acc"] == f"{100 * report.clean[0]:.2f}"
    assert alone.to_dict()["threat_model"] == "L2"
    assert "autoattack_acc" not in alone.to_dict()  # a suite of one's own
    standard = dataclasses.replace(alone, suite="standard").to_dict()
    assert standard["autoattack_acc"] == f"{100 * report.worst_case[0]:.2f}"
    assert stored["threats"]["l2"]["broken_by"] == report.threats["l2"].broken_by.tolist()
    x_adv = np.load(folder / "linf-x_adv.npy")
    wrong = np.asarray(logits_fn(jnp.asarray(x_adv)).argmax(1) != LABELLED)
    np.testing.assert_array_equal(wrong, ~report.threats["linf"].robust)


def test_the_table_names_attacks_threats_and_alarms(found):
    _, report = found
    text = str(report)
    for word in ("clean", "apgd-t", "square", "linf 0.03", "l2 0.12", "worst case", "TFLOP"):
        assert word in text
    assert ("ALARM" in text) == bool(report.alarms)


def test_a_second_call_reads_what_is_there(found, monkeypatch):
    folder, report = found

    def refuse(*_, **__):
        raise AssertionError("an attack ran again")

    monkeypatch.setattr("jaxrobust.attacks.scheduler.run", refuse)
    monkeypatch.setattr(jr.attacks.PGD, "__call__", refuse)
    monkeypatch.setattr("jaxrobust.evaluation.probes.ascend", refuse)
    again = jr.evaluate(
        logits_fn,
        X,
        LABELLED,
        threats=THREATS,
        suite=short,
        key=KEY,
        batch_size=32,
        out=folder,
        progress=False,
    )
    np.testing.assert_array_equal(again.threats["l2"].robust, report.threats["l2"].robust)
    assert again.worst_case == report.worst_case
    assert again.to_dict() == report.to_dict()


def test_what_was_found_of_another_model_is_refused(found):
    folder, _ = found
    settings = {"suite": short, "key": KEY, "batch_size": 32, "out": folder, "progress": False}
    state = (folder / "linf.npz").read_bytes()
    (folder / "linf.npz").unlink()
    with pytest.raises(CheckpointError, match=r"linf-card.json: the state of another evaluation"):
        jr.evaluate(lambda x: -logits_fn(x), X, LABELLED, threats={"linf": 0.03}, **settings)
    (folder / "linf.npz").write_bytes(state)


def test_a_report_says_what_it_takes_to_get_it_again(found):
    folder, _ = found
    stored = json.loads((folder / "report.json").read_text())
    key = jax.random.wrap_key_data(
        np.asarray(stored["key"]["data"], np.uint32), impl=stored["key"]["impl"]
    )
    assert key == KEY
    assert stored["bounds"] == [0.0, 1.0]
    assert stored["versions"]["jax"] == jax.__version__
    assert stored["versions"]["jaxrobust"] == jr.__version__
    assert "cpu" in stored["device"]
    assert stored["precision"] == "default"
    suite = short("l2", THREATS["l2"], (0.0, 1.0))
    assert stored["threats"]["l2"]["attacks"] == {name: repr(a) for name, a in suite.items()}


def test_order_and_company_change_no_flag(found):
    _, report = found
    order = np.random.default_rng(0).permutation(BATCH)[:40]
    part = jr.evaluate(
        logits_fn, X[order], LABELLED[order], threats={"linf": THREATS["linf"]}, suite=short,
        key=KEY, batch_size=32, indices=order, curve_images=32, card_images=32, progress=False,
    )  # fmt: skip
    some, every = part.threats["linf"], report.threats["linf"]
    np.testing.assert_array_equal(some.robust, every.robust[order])
    np.testing.assert_array_equal(some.broken_by, every.broken_by[order])


def test_few_images_give_no_all_clear(found):
    _, report = found
    assert not report.alarms
    threat = report.threats["linf"]
    assert f"10 of 13 checks of the gradients applied, on {BATCH} images" in str(report)
    assert "no sign of masked gradients" not in str(report)
    enough = dataclasses.replace(threat, card_images=100)
    clear = dataclasses.replace(report, threats={"linf": enough})
    assert "no sign of masked gradients" in str(clear)


def test_an_alarm_cannot_be_kept_out_of_the_report(found):
    _, report = found
    flag = evaluation.Check("jump", 1.0, 0.1, False, "It jumps.")
    threat = dataclasses.replace(report.threats["linf"], checks=(flag,))
    loud = dataclasses.replace(report, threats={"linf": threat})
    assert "ALARM linf: jump: It jumps." in str(loud)
    assert loud.to_dict()["alarms"] == ["linf: jump: It jumps."]


def test_a_threat_may_be_an_attack_and_counts_in_the_worst_case(tmp_path):
    threats = {"turned": jr.spatial(grid=(1, 1, 3)), "patch": jr.patch(1, eps=0.2, steps=5)}
    report = jr.evaluate(
        logits_fn, X, LABELLED, threats=threats, key=KEY, batch_size=32, out=tmp_path,
        progress=False,
    )  # fmt: skip
    turned = report.threats["turned"]
    assert set(turned.stages) == {"clean", "turned"}
    assert (turned.eps, turned.curve, turned.checks) == (1.0, {}, ())
    assert turned.attacks == {"turned": repr(threats["turned"])}
    assert "turned 1" not in str(report)
    held = np.logical_and.reduce([threat.robust for threat in report.threats.values()])
    assert report.worst_case[0] == held.mean()
    assert held.mean() < turned.robust.mean() < report.clean[0]
    assert not report.alarms
    assert "masked" not in str(report)  # no report card, no reassurance
    moved = np.load(tmp_path / "turned-x_adv.npy")
    np.testing.assert_array_equal((moved != X).any((1, 2, 3)), turned.broken_by == "turned")


def test_without_an_attack_by_queries_in_the_suite_the_report_card_runs_one():
    only = lambda norm, eps, bounds: {"apgd-ce": small_suite(eps)["apgd-ce"]}  # noqa: E731
    # Gradients of zero: white-box attacks see nothing, Square does.
    stopped = lambda x: jax.lax.stop_gradient(logits_fn(x))  # noqa: E731
    report = jr.evaluate(
        stopped, X, LABELS, threats={"linf": 0.1}, suite=only, key=KEY, batch_size=32,
        card_images=24, curve_images=8, progress=False,
    )  # fmt: skip
    by_name = {check.name: check for check in report.threats["linf"].checks}
    assert by_name["black box"].verdict == "flag"


def test_corruptions_are_told_and_drawn_beside_the_attacks(found, tmp_path):
    _, report = found
    seen = {"fog": [0.9, 0.8, 0.7, 0.6, 0.5], "snow": [0.5, 0.4, 0.3, 0.2, 0.1]}
    whole = dataclasses.replace(report, corruptions=seen)
    assert whole.corruption_accuracy == pytest.approx(0.5)
    assert whole.to_dict()["corruptions"] == seen
    assert "fog" in str(whole)
    assert report.corruption_accuracy is None
    without, with_them = tmp_path / "without.png", tmp_path / "with.png"
    report.plot(without)
    whole.plot(with_them)
    sizes = [int.from_bytes(path.read_bytes()[16:20], "big") for path in (without, with_them)]
    assert sizes[1] > sizes[0] > 500  # pixels across: a panel more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threats": {"patch": "5x5"}}, "threats must hold radii by norm or attacks"),
        ({"threats": {}}, "threats must name"),
        ({"threats": {"l3": 0.1}}, "norm must be one of"),
        ({"threats": {"linf": 0.0}}, r"threats\[.linf.\] must be > 0, got 0"),
        ({"card_images": 0}, "card_images must be a whole number >= 1"),
        ({"curve_images": 0}, "curve_images must be a whole number >= 1"),
        ({"suite": "rand"}, "suite must be"),
        ({"key": jnp.zeros(2, jnp.uint32)}, "key must be one typed key"),
        ({"threats": {"linf": jr.spatial()}}, "attacks must be of norm 'linf', got Spatial"),
        ({"threats": {"l2": jr.apgd_ce("linf", 0.1)}}, "attacks must be of norm 'l2'"),
        (
            {"threats": {"l2": 0.1}, "suite": lambda norm, eps, bounds: small_suite(eps)},
            "attacks must be of norm 'l2', got ClassifierAPGD of 'linf' for 'apgd-ce'",
        ),
        ({"threats": 0.1}, r"threats must be radii by norm .* got 0.1"),
        ({"indices": np.arange(3)}, "indices must have shape"),
        ({"bounds": None}, r"bounds must be \(low, high\)"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        unchecked(logits_fn, X, LABELS, **{"threats": THREATS, "key": jax.random.key(0), **change})


def test_radii_may_be_arrays_and_attacks_have_names_of_ones_own():
    one = {"apgd-ce": small_suite()["apgd-ce"]}
    settings = {
        "suite": lambda norm, eps, bounds: one, "key": KEY, "batch_size": 32, "progress": False,
        "curve_images": 32, "card_images": 32,
    }  # fmt: skip
    threats = {"linf": jnp.float32(0.03), "mine": one["apgd-ce"]}
    report = jr.evaluate(logits_fn, X, LABELLED, threats=threats, **settings)
    assert report.threats["linf"].eps == pytest.approx(0.03)
    assert report.threats["mine"].accuracy[0] < report.clean[0]


def test_a_data_set_in_place_of_images_is_named():
    digits = jr.data.Dataset(np.asarray(X), np.asarray(LABELS), np.arange(BATCH), ("a",) * 5)
    with pytest.raises(TypeError, match=r"images must be an array \[n, h, w, c\], got Dataset"):
        jr.evaluate(logits_fn, digits, LABELS, threats=THREATS, key=KEY)


def test_images_of_another_box_are_evaluated_to_the_end():
    half = lambda x: logits_fn((x + 1) / 2)  # noqa: E731
    one = {"linf": 0.06}
    settings = {"suite": short, "key": KEY, "batch_size": 32, "progress": False}
    scaled = jr.evaluate(half, 2 * X - 1, LABELLED, threats=one, bounds=(-1.0, 1.0), **settings)
    assert len(scaled.threats["linf"].curve["accuracy"]) > 1
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], got values from -"):
        evaluation.correct(lambda _, x: half(x), {}, 2 * X - 1, LABELLED)


def test_square_before_a_white_box_attack_gives_no_verdict_on_white_box_attacks():
    def reordered(norm, eps, bounds):
        suite = small_suite(eps, norm, bounds)
        assert list(suite)[-1] == "square"
        return {"square": suite.pop("square"), **suite}

    settings = {"key": KEY, "batch_size": 32, "progress": False, "card_images": 32}
    report = jr.evaluate(
        logits_fn, X, LABELLED, threats={"linf": 0.03}, suite=reordered, **settings
    )
    names = {check.name: check for check in report.threats["linf"].checks}
    # Square broke images that the gradient attacks, coming later, would have broken too.
    broken = (report.threats["linf"].broken_by == "square").sum()
    assert broken > 0
    assert names["black box"].figure < broken / BATCH
