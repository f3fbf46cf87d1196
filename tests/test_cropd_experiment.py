"""The CRoPD experiment: attacks that know the defence meet what still stands; what tables say."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrobust as jr
from experiments import bench_cropd, cropd_evaluation, plots_cropd, records
from experiments import cropd as experiment
from experiments.cropd_settings import METHODS, PRESETS, Built, Config, Method, Problem, World
from jaxrobust import cropd, models
from jaxrobust.data import Dataset

SHAPE, CLASSES, COUNT, EPS = (8, 8, 3), 3, 10, 0.1
RANDOM = np.random.default_rng(0)
CONFIG = Config(
    methods={"ours": Method(contrast=1.0)}, attacked_images=COUNT, batch=4, suite_steps=1
)
TEST = Dataset(
    RANDOM.random((COUNT, *SHAPE), dtype=np.float32),
    (np.arange(COUNT) % CLASSES).astype(np.int32),
    np.arange(COUNT, dtype=np.int32),
    ("a", "b", "c"),
)
PROBLEM = Problem(dataset="none", eps=EPS, widths=(8,), latent_channels=2)
FOUNDATION = models.preact_resnet(stages=(1,), widths=(8,), classes=5, norm="batch")
WORLD = World(PROBLEM, TEST, TEST, FOUNDATION, {}, (8, 8, 3))
ATTACK = jr.linf_pgd(EPS, steps=2)
MESH = jr.parallel.data_mesh(2)


def built(front, seed):
    model = models.defend(front, (8, 8, 3), FOUNDATION, CLASSES)
    variables = model.init(jax.random.key(seed), SHAPE)
    features = cropd.features(model, variables, TEST.images, batch_size=COUNT)
    head = cropd.fit_head(features, TEST.labels, CLASSES, decay=1e-3)
    parts = {name: models.part(variables, name) for name in variables["params"]}
    return Built(model, models.join(**{**parts, "head": head}), {})


@pytest.fixture(scope="module")
def ours():
    return built(models.autoencoder(SHAPE, widths=(8,), latent_channels=2, latent_norm=True), 0)


@pytest.fixture(scope="module")
def near():
    return {"none": built(None, 1)}


def test_code_features_gradient_and_transfer_are_all_attacked(ours, near):
    names = [one.name for one in cropd_evaluation.adaptive(WORLD, ours, near, ATTACK, TEST)]
    assert names == [
        "features away", "features matched", "latent away", "latent matched", "bpda",
        "transfer from none",
    ]  # fmt: skip


def test_the_bare_model_has_no_code_and_no_gradient_to_go_around(near):
    found = cropd_evaluation.adaptive(WORLD, near["none"], {}, ATTACK, TEST)
    assert [one.name for one in found] == ["features away", "features matched"]


def test_every_attack_stays_in_the_ball_and_does_not_depend_on_who_else_is_there(ours, near):
    some = np.array([1, 4, 5, 8, 9])
    for one in cropd_evaluation.adaptive(WORLD, ours, near, ATTACK, TEST):
        run = lambda rows, one=one: cropd_evaluation.in_batches(  # noqa: E731
            one.run, TEST, rows, CONFIG, MESH, 3, *one.columns
        )
        x_adv = run(np.arange(COUNT))
        assert x_adv.shape == TEST.images.shape
        assert np.abs(x_adv - TEST.images).max() <= EPS + 1e-6, one.name
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        np.testing.assert_allclose(run(some), x_adv[some], atol=1e-6, err_msg=one.name)


def test_each_attack_gains_on_its_own_aim_beyond_its_random_start(ours, near):
    """Away from the code, towards another's, or up the other model's loss."""
    everyone = np.arange(COUNT)
    goal = TEST.images[cropd_evaluation.other_class(TEST.labels)]
    taps = {"features": "foundation.features", "latent": "preprocessor.latent"}

    def aim(name, x):
        kind = name.split()[0]
        if kind in taps:
            encode = cropd_evaluation.Encoder(ours.model.apply, taps[kind])
            origin = goal if name.endswith("matched") else TEST.images
            apart = encode(x, ours.variables) - encode(origin, ours.variables)
            distance = np.linalg.norm(np.asarray(apart).reshape(COUNT, -1), axis=1).mean()
            return -distance if name.endswith("matched") else distance
        logits = near["none"].model.apply(near["none"].variables, x)
        return jr.losses.cross_entropy(logits, jnp.asarray(TEST.labels)).mean()

    start = jr.linf_pgd(EPS, steps=1, step_size=0.0)
    for one, noise in zip(
        cropd_evaluation.adaptive(WORLD, ours, near, jr.linf_pgd(EPS, steps=20), TEST),
        cropd_evaluation.adaptive(WORLD, ours, near, start, TEST),
        strict=True,
    ):
        if one.name == "bpda":  # an untrained pre-processor is not what its gradient stands for
            continue
        reached, begun = (
            aim(
                one.name,
                cropd_evaluation.in_batches(it.run, TEST, everyone, CONFIG, MESH, 3, *it.columns),
            )
            for it in (one, noise)
        )
        assert reached > begun, one.name


def test_the_way_around_has_the_defended_models_loss_and_the_bare_ones_gradient(ours, near):
    bare = near["none"]
    parts = {"foundation": bare.variables, "head": ours.variables}
    own = models.join(**{name: models.part(of, name) for name, of in parts.items()})
    front = cropd_evaluation.Encoder(ours.model.apply, "preprocessed")
    around = cropd_evaluation.Through(jr.attacks.bpda(front), bare.model.apply)
    x, y = jnp.asarray(TEST.images), jnp.asarray(TEST.labels)

    def bare_loss(x):
        return jr.losses.cross_entropy(bare.model.apply(own, x), y)

    # Equal foundations make it the loss of the defended model itself.
    parts["foundation"] = ours.variables
    same = models.join(**{name: models.part(of, name) for name, of in parts.items()})
    expected = jr.losses.cross_entropy(ours.model.apply(ours.variables, x), y)
    np.testing.assert_allclose(around(x, ours.variables, same, y), expected, rtol=1e-4)
    rebuilt = front(x, ours.variables)
    np.testing.assert_allclose(
        jax.grad(lambda x: around(x, ours.variables, own, y).sum())(x),
        jax.grad(lambda x: bare_loss(x).sum())(rebuilt),
        atol=1e-6,
    )


def test_the_worst_case_is_over_the_suite_and_all_that_know_the_defence(
    ours, near, monkeypatch, tmp_path
):
    # Labelled as it answers, so that there is something to lose.
    answers = np.asarray(ours.model.apply(ours.variables, TEST.images)).argmax(1)
    test = TEST.replace(labels=answers.astype(np.int32))
    world = WORLD._replace(test=test)
    stood = np.arange(COUNT) != 2  # one that the suite broke
    threat = SimpleNamespace(
        robust=stood.tolist(), stages={"clean": 1.0, "apgd-ce": 0.9},
        checks=[SimpleNamespace(name=n, verdict=v) for n, v in (("loud", "flag"), ("fine", "ok"))],
        seconds={"apgd-ce": 1.0},
    )  # fmt: skip
    seen, original = [], cropd_evaluation.in_batches

    def in_batches(run, examples, rows, *rest):
        seen.append(rows)
        return original(run, examples, rows, *rest)

    report = SimpleNamespace(threats={"linf": threat})
    monkeypatch.setattr(cropd_evaluation.jr, "evaluate", lambda *_, **__: report)
    monkeypatch.setattr(cropd_evaluation, "in_batches", in_batches)
    tried = {"pgd": np.arange(COUNT) != 1}  # and one that PGD broke
    found = cropd_evaluation.worst_case(CONFIG, world, ours, near, ATTACK, tried, tmp_path, MESH)

    expected, rest = stood & tried["pgd"], list(seen)
    assert found["accuracy_after"]["pgd"] == expected.mean() < stood.mean()
    monkeypatch.undo()
    for number, one in enumerate(cropd_evaluation.adaptive(world, ours, near, ATTACK, test), 20):
        if expected.any():
            np.testing.assert_array_equal(rest.pop(0), np.flatnonzero(expected))
        x_adv = original(one.run, test, np.arange(COUNT), CONFIG, MESH, number, *one.columns)
        expected &= np.asarray(
            jr.evaluation.correct(
                ours.model.apply, ours.variables, x_adv, test.labels, batch_size=4
            )
        )
        assert found["accuracy_after"][one.name] == expected.mean()
    assert not rest
    assert found["robust_accuracy"] == expected.mean() < stood.mean()
    np.testing.assert_array_equal(records.unpacked(found["robust_outcomes"], COUNT)[0], expected)
    assert found["card_flags"] == ["loud"]


def test_the_next_example_of_another_class_is_the_goal():
    np.testing.assert_array_equal(
        cropd_evaluation.other_class(np.array([0, 0, 1, 0])), [2, 2, 3, 2]
    )


# ---- tables -------------------------------------------------------------------------------------


def cell(method, seed, clean, robust, **costs):
    rows = np.array([clean, robust, robust, robust], bool)
    return {
        "key": {"dataset": "emoji", "method": method, "seed": seed, "eps": 0.1},
        "metrics": {
            "images": len(clean), "outcomes": records.packed(rows),
            "clean_accuracy": float(np.mean(clean)), "grid": [0.05, 0.1, 0.2],
            "pgd50_accuracy": [float(np.mean(robust))] * 3, "nonadaptive_accuracy": 0.9,
            **costs,
        },
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """Two seeds of eight images; ours holds two more than the denoiser and loses one clean."""
    methods = {"none": Method(kind="none"), "gaussian_dae": Method(kind="denoiser"),
               "ours": Method(contrast=1.0), "aff": Method(kind="aff")}  # fmt: skip
    config = Config(problems={"emoji": PROBLEM}, methods=methods, seeds=(0, 1))
    every, first = np.ones(8), lambda count: np.arange(8) < count
    cells = []
    for seed in config.seeds:
        cells += [
            cell("none", seed, every, first(0)),
            cell("gaussian_dae", seed, first(7), first(1), train_flops=2e12, train_seconds=3.0),
            cell("ours", seed, first(7), first(3), train_flops=1e13, train_seconds=10.0),
            cell("aff", seed, every, first(4), train_flops=1e14, train_seconds=40.0),
        ]
    path = tmp_path / "cropd-laptop.json"
    record = records.Results(path, "cropd", "laptop", config)
    for one in cells:
        record.add(one["key"], one["metrics"], 1.0)
    return path


def test_the_verdict_pairs_ours_with_its_controls(results):
    header, _, line = plots_cropd.verdict(results).splitlines()
    assert "denoiser" in header
    assert "AFF" in header
    columns = [column.strip() for column in line.strip("|").split("|")]
    assert columns[0] == "ours"
    assert columns[1].startswith("+25.0 (")
    assert columns[2:4] == ["not run", "not run"]
    assert columns[4].startswith("-12.5 (")
    assert columns[5:] == ["10 %", "2 / 2"]


def test_the_worst_case_is_compared_with_the_worst_case_alone(results):
    record = json.loads(results.read_text())
    for one in record["cells"]:
        robust = {"none": 0, "gaussian_dae": 1, "ours": 2}.get(one["key"]["method"])
        if robust is not None:
            rows = (np.arange(8) < robust)[None]
            one["metrics"] |= {"robust_outcomes": records.packed(rows)}
    results.write_text(json.dumps(record))
    columns = plots_cropd.verdict(results).splitlines()[-1].split("|")
    assert [column.strip().split()[0] for column in columns[2:6]] == [
        "+25.0", "+12.5", "+25.0", "-12.5",
    ]  # fmt: skip


def test_a_larger_autoencoder_is_compared_with_the_larger_denoiser(results):
    record = json.loads(results.read_text())
    record["config"]["methods"]["ours"]["wide"] = True
    problem = {**record["config"]["problems"]["emoji"], "wide": [[8], 2]}
    record["config"]["problems"]["emoji"] = problem
    results.write_text(json.dumps(record))
    columns = plots_cropd.verdict(results).splitlines()[-1].split("|")
    assert columns[2].strip() == "not run"
    assert columns[-2].strip() == "0 / 2"
    # A problem without a larger one has no such row, and lacks none.
    record["config"]["problems"]["emoji"] = {**problem, "wide": None}
    results.write_text(json.dumps(record))
    assert "ours" not in plots_cropd.table(results)


def test_unfinished_rows_are_compared_on_the_seeds_that_they_share(results):
    record = json.loads(results.read_text())

    def without(*missing):
        left = [c for c in record["cells"] if (c["key"]["method"], c["key"]["seed"]) not in missing]
        results.write_text(json.dumps({**record, "cells": left}))
        return plots_cropd.verdict(results).splitlines()

    assert without()[-1].endswith("| 2 / 2 |")
    # Seed 0's denoiser alone may not stand for seed 1's, of which ours is left.
    line = without(("ours", 0), ("none", 0))[-1]
    assert line.endswith("| 1 / 1 |")
    assert line.split("|")[2].strip().startswith("+25.0 (")
    # A seed that the bare model lacks still counts against the denoiser.
    assert without(("none", 0))[-1].endswith("| 2 / 1 |")
    line = without(("ours", 0), ("gaussian_dae", 1))[-1]
    assert line.endswith("| 0 / 1 |")
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["not run", "not run"]


def test_the_table_says_what_was_not_run(results):
    record = json.loads(results.read_text())
    record["cells"] = [one for one in record["cells"] if one["key"]["method"] != "aff"]
    results.write_text(json.dumps(record))
    lines = plots_cropd.table(results).splitlines()
    assert lines[-1] == "| aff |" + 10 * " not run |"
    assert "37.5 ± 0.0" in lines[-2]
    rows, missing, verdict = plots_cropd.readme_table(results).split("\n\n")
    assert missing == "Not run there: aff."
    assert "37.5 ± 0.0" in rows.splitlines()[-1]
    assert verdict == plots_cropd.verdict(results)


def test_a_training_is_measured_in_epochs_of_fine_tuning():
    def timed(method, flops, seconds, epochs, per_epoch):
        figures = {"step_flops": flops, "seconds_median": seconds, "epochs": epochs}
        key = {"dataset": "emoji", "method": method}
        return {"key": key, "metrics": figures | {"steps_per_epoch": per_epoch}}

    cells = [timed("ours", 2e9, 0.1, 20, 80), timed("aff", 4e10, 1.0, None, 72)]
    ours, aff = bench_cropd.table(cells, {"emoji": 16.0}).splitlines()[2:]
    assert ours.endswith("| 20 | 1.11 | 2.22 | 14% |")
    assert aff == "| emoji | aff | 1000.0 | 40.00 | 40 |  |  |  |  |"
    assert bench_cropd.table(cells).splitlines()[2].endswith("| 20 | 1.11 | 2.22 |  |")
    # Without fine-tuning beside it there is no unit.
    assert bench_cropd.table(cells[:1]).endswith("| 20 |  |  |  |")


def test_what_a_preprocessor_adds_is_measured_against_the_bare_model():
    def timed(dataset, method, batch, seconds):
        key = {"dataset": dataset, "method": method, "batch": batch}
        return {"key": key, "metrics": {"seconds_median": seconds}}

    cells = [
        timed(dataset, method, batch, scale * batch * seconds)
        for dataset, scale in (("emoji", 1), ("digits", 2))
        for batch in (1, 64)
        for method, seconds in (("none", 1e-3), ("ours", 1.5e-3))
    ]
    lines = bench_cropd.table(cells).splitlines()
    assert lines[0] == (
        "| set | in front of the model | ms, batch 1 | added | ms, batch 64 | added |"
    )
    assert lines[2:] == [
        "| emoji | none | 1.0 |  | 64.0 |  |",
        "| emoji | ours | 1.5 | +0.5 | 96.0 | +32.0 |",
        "| digits | none | 2.0 |  | 128.0 |  |",
        "| digits | ours | 3.0 | +1.0 | 192.0 | +64.0 |",
    ]


def test_certificates_are_shown_by_radius(results):
    assert plots_cropd.certificates(results) == ""
    record = json.loads(results.read_text())
    record["config"]["methods"]["ours"]["sigma"] = 0.12
    for one in record["cells"]:
        if one["key"]["method"] == "ours":
            held = [0.8, 0.5 if one["key"]["seed"] else 0.4]
            one["metrics"] |= {"radii": [0.0, 0.1, 0.3], "certified_accuracy": [*held, 0.0]}
    results.write_text(json.dumps(record))
    lines = plots_cropd.certificates(results).splitlines()
    header = "| certified, l2 |  | sigma | radius 0, % | radius 0.1, % | radius 0.3, % |"
    assert lines[0] == header
    # 1,000 samples at sigma 0.12 tell nothing beyond 0.296.
    assert lines[2] == "| emoji | ours | 0.12 | 80.0 | 45.0 | beyond reach |"
    assert plots_cropd.readme_table(results).endswith(lines[2])


def test_the_terms_of_the_bound_are_means_over_seeds(results):
    assert plots_cropd.bound_table(results) == ""
    record = json.loads(results.read_text())
    for one in record["cells"]:
        if one["key"]["method"] == "ours":
            names = enumerate(plots_cropd.TERMS)
            one["metrics"]["bound"] = {name: n + one["key"]["seed"] for n, name in names}
    results.write_text(json.dumps(record))
    lines = plots_cropd.bound_table(results).splitlines()
    assert lines[0].startswith("| bound, in nats |  | clean loss | adversarial loss |")
    assert lines[2:] == ["| emoji | ours | 0.5 | 1.5 | 2.5 | 3.5 | 4.5 | 5.5 |"]
    assert plots_cropd.readme_table(results).endswith(lines[2])


KINDS = {
    "denoiser": Method(kind="denoiser", sigma=0.1),
    "reported": Method(contrast=1.0),
    "jpeg": METHODS["jpeg"],
    "total_variation": METHODS["total_variation"],
    "alf": METHODS["alf"],
    "aff": METHODS["aff"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_is_built_and_judged_from_nothing(kind, tmp_path):
    config = dataclasses.replace(
        CONFIG, methods={"none": METHODS["none"], "row": KINDS[kind], "ours": Method()},
        reference="ours", final=("row",), epochs=3, rival_epochs=1, ramp_epochs=1, rival_steps=1,
        batch_size=5, test_images=COUNT, pgd_steps=1, suite_targets=1, queries=2,
        certify_samples=20,
    )  # fmt: skip
    options = SimpleNamespace(
        runs=tmp_path, experiment="cropd", preset="test", devices=1, mapping="shard_map"
    )
    published = FOUNDATION.init(jax.random.key(3), WORLD.size)
    world = WORLD._replace(published=published)
    key = {"dataset": "none", "method": "row", "seed": 0, "eps": EPS}
    made = experiment.build(key, config, world, options)
    kept = models.part(made.variables, "foundation")
    moved = [
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(published), strict=True)
    ]
    assert any(moved) == (kind == "aff")
    assert ("train_flops" in made.costs) == (kind not in experiment.FILTERS)
    if kind == "alf":
        assert made.costs["parameters"] == CLASSES * 9
    near = experiment.neighbours(key, config, world, options)
    assert list(near) == ["none"]
    found = cropd_evaluation.evaluate(key, config, world, made, near, tmp_path / "suite", MESH)
    lowest = min(found["pgd1_accuracy"][1], found["nonadaptive_accuracy"])
    assert found["robust_accuracy"] <= lowest + 1e-9 <= 1
    fronted = kind not in ("alf", "aff")
    assert ("swap_in_accuracy" in found) == fronted
    if fronted:
        bare = models.part(near["none"].variables, "head")
        ours = {name: models.part(made.variables, name) for name in ("preprocessor", "foundation")}
        swapped = models.join(**ours, head=bare)
        right = jr.evaluation.correct(made.model.apply, swapped, TEST.images, TEST.labels)
        assert found["swap_in_accuracy"][0] == right.mean() >= found["swap_in_accuracy"][1]
    assert ("certified_accuracy" in found) == (kind == "denoiser")
    assert ("bound" in found) == (kind in ("denoiser", "reported"))


class Trained(Exception):
    """Training was reached, with this world."""


def test_no_preprocessor_sees_the_model_that_it_will_protect(tmp_path, monkeypatch):
    def trained(key, config, world, *_):
        raise Trained(world)

    refused = lambda *_, **__: pytest.fail("the foundation model was asked")  # noqa: E731
    monkeypatch.setattr(experiment, "trained", trained)
    world = WORLD._replace(foundation=models.Model(refused, refused, refused, {"name": "blind"}))
    key = {"dataset": "none", "method": "ours", "seed": 0, "eps": EPS}
    config = dataclasses.replace(CONFIG, reference="ours")
    options = SimpleNamespace(runs=tmp_path, experiment="cropd", preset="test")
    with pytest.raises(Trained) as found:
        experiment.build(key, config, world, options)
    (seen,) = found.value.args
    assert (seen.foundation, seen.published) == (None, None)


def test_a_rival_trains_on_what_does_not_choose_its_epoch():
    kept, held_out = experiment.without_a_tenth(WORLD)
    assert (len(kept.train.labels), len(held_out.labels)) == (COUNT - 1, 1)
    together = np.concatenate([kept.train.indices, held_out.indices])
    np.testing.assert_array_equal(together, TEST.indices)


@pytest.mark.parametrize("name", PRESETS)
def test_the_final_rows_of_a_preset_and_its_controls_are_among_its_methods(name):
    config = PRESETS[name]
    assert set(config.final) <= set(config.methods)
    assert "none" in config.methods


@pytest.mark.parametrize("name", PRESETS)
def test_the_splits_of_a_preset_are_those_of_its_sets(name):
    without_test = {"imagenette", "tiny_imagenet"}  # whose labels were never published
    for problem in PRESETS[name].problems.values():
        # What confirms was not there when settings were chosen, on the test images.
        unseen = name == "confirm" or problem.dataset in without_test
        assert problem.test_split == ("validation" if unseen else "test")
        assert problem.train_split.partition("[")[0] == "train"


@pytest.mark.parametrize(("start", "aim"), [("uniform", "loss"), ("gaussian", "random")])
def test_the_noisy_step_begins_and_goes_where_the_problem_says(start, aim, monkeypatch):
    problem = dataclasses.replace(PROBLEM, radius=3.0, start=start, spread=5.0, aim=aim)
    made = {}
    monkeypatch.setattr(
        experiment.cropd,
        "robust_autoencoder",
        lambda attack, **options: made.update(a=attack, aim=options["aim"]),
    )
    experiment.objective_of(METHODS["recommended"], problem, CONFIG, SHAPE)
    assert (made["a"].eps, made["a"].noise) == (pytest.approx(3 * EPS), 5.0)
    assert (made["a"].start, made["aim"]) == (start, aim)
    experiment.objective_of(METHODS["recommended_other_aim"], problem, CONFIG, SHAPE)
    assert {made["aim"], aim} == {"loss", "random"}
    experiment.objective_of(METHODS["recommended_eps"], problem, CONFIG, SHAPE)
    assert (made["a"].eps, made["aim"]) == (pytest.approx(EPS), aim)


def test_what_confirms_changes_nothing_but_images_seeds_and_the_input_size():
    confirm, laptop = PRESETS["confirm"], PRESETS["laptop"]
    assert not set(confirm.seeds) & set(laptop.seeds)
    for name, problem in confirm.problems.items():
        changed = {name: getattr(problem, name) for name in ("side", "test_split", "judged")}
        assert problem == dataclasses.replace(laptop.problems[problem.dataset], **changed)
        assert (problem.side == 96) == problem.judged == name.endswith("_96")
    for name, method in confirm.methods.items():
        assert method == laptop.methods[name]


def test_sweeps_are_run_for_the_first_seed_alone():
    config = PRESETS["laptop"]
    seeds = {}
    for key in experiment.keys(config):
        seeds.setdefault((key["dataset"], key["method"]), []).append(key["seed"])
    assert seeds["emoji", "recommended"] == seeds["mnist5k", "gaussian_dae"] == [0, 1, 2]
    assert seeds["emoji", "reported_lambda_1"] == seeds["cutouts", "recommended"] == [0]
    wide = [name for name, method in config.methods.items() if method.wide]
    assert len(seeds) == len(config.problems) * (len(config.methods) - len(wide)) + len(wide)
    assert seeds["mnist5k", "recommended_wide"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["autoencoder", "gaussian_dae", "reported", "recommended"])
def test_every_preprocessor_is_trained_for_the_flops_of_the_reference(name):
    config = dataclasses.replace(CONFIG, methods=METHODS)
    model = models.autoencoder(SHAPE, widths=(8,), latent_channels=2, latent_norm=True)

    def flops(name):
        objective = experiment.objective_of(METHODS[name], PROBLEM, config, SHAPE)
        return objective, experiment.flops(model, objective, config, SHAPE)

    objective, one = flops(name)
    epochs = experiment.epochs_of(model, objective, PROBLEM, config, SHAPE)
    assert epochs * one == pytest.approx(config.epochs * flops("recommended")[1], abs=one / 2)
    assert (epochs == config.epochs) == (name == "recommended")
