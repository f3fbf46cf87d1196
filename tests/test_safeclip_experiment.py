"""The SAFECLIP experiment: whose setting is chosen, what the tables say, what is planted."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import (
    plots_safeclip,
    records,
    safeclip,
    safeclip_choice,
    safeclip_evaluation,
)
from experiments.safeclip_evaluation import Judge, Watch
from experiments.safeclip_settings import (
    CANARIES,
    CHOSEN,
    NOTHING,
    PRESETS,
    UNDEFENDED,
    Attack,
    Config,
    Method,
)
from jaxrobust import data, models
from jaxrobust import safeclip as library
from jaxrobust.data.pairs import Pairs
from tests.test_stored_images import write_table

NAMES = ("apple", "bird", "cloud", "drum", "eagle", "flag")


def share(successes, n):
    return {"successes": successes, "n": n, "estimate": successes / n, "low": 0.0, "high": 1.0}


def metrics(targeted=None, backdoor=None, top1=0.5, recall=0.4):
    found = {
        "planted": 4,
        "zero_shot": {"top1": top1, "top5": 0.9},
        "retrieval": {"image_to_text_r5": recall, "text_to_image_r5": recall},
        "epoch_seconds": 2.0,
    }
    if targeted is not None:
        found["targeted"] = share(targeted, 16)
    if backdoor is not None:
        found["backdoor"] = {"success": share(backdoor, 100), "accuracy": share(30, 100)}
    return found


def results(**by_method):
    cells = [
        {"key": {"attack": CANARIES, "method": name, "seed": 0}, "metrics": found}
        for name, found in by_method.items()
    ]
    return cells


def choose(cells):
    return safeclip_choice.chosen(cells, Config().candidates, Config().limit)


def test_the_most_useful_setting_that_stops_the_canaries_is_chosen():
    found = results(
        safeclip_fixed=metrics(1, 5, top1=0.4),
        growth_0=metrics(0, 10, top1=0.45),
        growth_5=metrics(2, 0, top1=0.9),  # lets 12.5 % of the targets by
        slow_rate_30=metrics(0, 11, top1=0.9),
    )
    assert choose(found) == "growth_0"


def test_every_pair_of_attack_and_method_is_a_cell_but_for_those_of_one_seed_or_without_an_attack():
    config = dataclasses.replace(Config(), seeds=(3, 4))
    found = {tuple(key.values()) for key in safeclip.keys(config)}
    assert len(found) == len(safeclip.keys(config))
    assert {key for key in found if key[0] == CANARIES} == {
        (CANARIES, name, 3) for name in config.candidates
    }
    judged = {key[:2] for key in found if key[0] != CANARIES}
    unattacked = {(NOTHING, UNDEFENDED), (NOTHING, CHOSEN)}
    attacks = set(config.attacks) - {CANARIES, NOTHING}
    assert judged == unattacked | {(a, m) for a in attacks for m in config.methods}
    once = {key[:2] for key in found if key[2] == 3} - {key[:2] for key in found if key[2] == 4}
    assert once == {(a, m) for a, m in judged if {a, m} & set(config.single)} | {
        (CANARIES, name) for name in config.candidates
    }


def test_without_a_setting_that_stops_them_the_one_that_lets_by_the_least_is_chosen():
    found = results(safeclip_fixed=metrics(8, 0), growth_0=metrics(3, 20), growth_5=metrics(4, 0))
    assert choose(found) == "growth_0"


def test_the_attacks_on_which_it_is_judged_do_not_choose():
    found = results(safeclip_fixed=metrics(0, 0, top1=0.3), growth_0=metrics(0, 0, top1=0.2))
    found.append(
        {"key": {"attack": "targeted", "method": "growth_5", "seed": 0}, "metrics": metrics(0, 0)}
    )
    assert choose(found) == "safeclip_fixed"


def pictures(count, start):
    random = np.random.RandomState(start)
    labels = (np.arange(count) % len(NAMES)).astype(np.int32)
    return Pairs(
        random.rand(count, 8, 8, 3).astype(np.float32),
        tuple(f"number {start + row}, {NAMES[label]}" for row, label in enumerate(labels)),
        np.arange(start, start + count, dtype=np.int32),
        labels,
        NAMES,
    )


@pytest.fixture(scope="module")
def world():
    test, validation = pictures(30, 1000), pictures(30, 2000)
    return SimpleNamespace(
        train=pictures(60, 0), test=Judge(test, test), validation=Judge(validation, validation)
    )


CONFIG = Config(
    attacks={
        NOTHING: Attack(),
        "targeted": Attack(targets=4, per_target=3),
        "badnets": Attack(trigger="badnets", options={"size": 0.25}, rate=10),
        CANARIES: Attack(targets=3, per_target=2, rate=5),
    }
)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_planted_is_found_again_and_canaries_share_nothing_with_it(world, seed):
    manifests = {}
    for attack in CONFIG.attacks:
        key = {"attack": attack, "seed": seed}
        pairs, manifests[attack] = safeclip.plant(key, CONFIG, world)
        again, same = safeclip.plant(key, CONFIG, world)
        assert same.sha256 == manifests[attack].sha256
        assert again.captions == pairs.captions
    canaries = manifests.pop(CANARIES)
    attacked = [poison for found in manifests.values() for poison in found.poisons]
    assert {p.target for p in canaries.poisons}.isdisjoint(p.target for p in attacked)
    assert {i for p in canaries.poisons for i in p.sources}.isdisjoint(
        i for p in attacked for i in p.sources
    )
    for poison in manifests["targeted"].poisons:
        row = np.flatnonzero(world.test.pairs.indices == poison.sources[0])[0]
        assert NAMES[world.test.pairs.labels[row]] != poison.target


@pytest.mark.parametrize("attack", ["targeted", "badnets"])
def test_poisons_have_captions_of_their_class_from_the_data_or_sentences(world, attack):
    for real in (True, False):
        attacks = {**CONFIG.attacks, attack: dataclasses.replace(CONFIG.attacks[attack], real=real)}
        _, manifest = safeclip.plant(
            {"attack": attack, "seed": 0},
            dataclasses.replace(CONFIG, attacks=attacks),
            world,
        )
        for poison in manifest.poisons:
            assert (set(poison.captions) <= set(world.train.captions)) == real
            assert all(poison.target in caption for caption in poison.captions)


def test_the_watch_counts_poisons_in_the_safe_set_from_the_split_on():
    recipe = library.Recipe(epochs=4, unimodal_epochs=1, slow_epochs=1)
    is_poison = np.array([False] * 8 + [True] * 2)
    scores = np.r_[np.linspace(0.1, 0.9, 8), -2.5, 0.95]
    safe = scores > 0.5
    trust = library.Trust(scores, scores, safe)
    watch = Watch(is_poison, recipe)
    assert watch(2, {}, trust) == {}
    found = watch(3, {}, trust)
    assert (found["leak"]["successes"], found["leak"]["n"]) == (1, 2)
    assert found["auroc"] == 0.5
    histogram = found["histogram"]
    assert sum(histogram["clean"]) == 8
    assert sum(histogram["poisons"]) == 2
    assert "histogram" not in watch(4, {}, trust)


def write(path, cells, candidates=("growth_0",)):
    config = {
        "attacks": {name: {} for name in (NOTHING, "targeted", "badnets", CANARIES)},
        "methods": {name: {} for name in ("clip_augmented", "safeclip_fixed", "roclip")},
        "candidates": {name: {} for name in candidates},
        "limit": 0.1,
        "ablated": ["targeted"],
    }
    cells = [
        {"key": {"attack": attack, "method": method, "seed": seed}, "metrics": found}
        for (attack, method, seed), found in cells.items()
    ]
    path.write_text(json.dumps({"config": config, "cells": cells}))
    return path


def test_a_defence_counts_only_where_the_attack_works_without_it(tmp_path):
    path = write(
        tmp_path / "safeclip-test.json",
        {
            ("targeted", "clip_augmented", 0): metrics(13),
            ("targeted", "clip_augmented", 1): metrics(12),  # 75 %: too weak
            ("targeted", "safeclip_fixed", 0): metrics(0, recall=0.37),
            ("badnets", "clip_augmented", 0): metrics(backdoor=90),
            ("badnets", "safeclip_fixed", 0): metrics(backdoor=11, recall=0.35),
        },
    )
    lines = plots_safeclip.verdict(path).split("\n\n")[0].splitlines()[2:]
    shown = [line.strip("| ").split(" | ") for line in lines]
    first = ["0.0", "0.0", "19.4", "yes", "100 / 92", "not run", "yes", "1"]
    second = ["11.0", "11.0", "18.6", "no", "100 / 87", "not run", "no", "1"]
    assert shown == [
        ["targeted", "**no**", "safeclip_fixed", *first],
        ["badnets", "yes", "safeclip_fixed", *second],
    ]


def test_usefulness_is_judged_by_the_network_that_met_no_poison(tmp_path):
    path = write(
        tmp_path / "safeclip-test.json",
        {
            (NOTHING, "clip_augmented", 0): metrics(top1=0.6, recall=0.5),
            ("targeted", "clip_augmented", 0): metrics(16, top1=0.2),
            ("targeted", "safeclip_fixed", 0): metrics(0, top1=0.5),
        },
    )
    line = plots_safeclip.verdict(path).splitlines()[-1]
    assert line.strip("| ").split(" | ")[-4:] == ["250 / 100", "83 / 80", "no", "1"]


def two_attacks(backdoor=90):
    cells = {}
    for seed in (0, 1):
        cells |= {
            (NOTHING, "clip_augmented", seed): metrics(top1=0.5, recall=0.5),
            ("targeted", "clip_augmented", seed): metrics(16, top1=0.5, recall=0.4),
            ("targeted", "safeclip_fixed", seed): metrics(4, top1=0.6, recall=0.2 + 0.2 * seed),
            ("badnets", "clip_augmented", seed): metrics(backdoor=backdoor, top1=0.5, recall=0.4),
            ("badnets", "safeclip_fixed", seed): metrics(backdoor=5, top1=0.4, recall=0.3),
            ("badnets", "roclip", seed): metrics(backdoor=5),
        }
    return cells


def test_attacks_are_taken_together_over_all_trainings(tmp_path):
    path = write(tmp_path / "safeclip-test.json", two_attacks())
    _, together = plots_safeclip.verdict(path).split("\n\n")
    shown = [line.strip("| ").split(" | ") for line in together.splitlines()[2:]]
    # Seed 0 under the first attack has the least, seed 1 the most.
    undefended, unpoisoned = (
        ("100 (80 to 120)", "75 (50 to 100)"),
        ("100 (80 to 120)", "60 (40 to 80)"),
    )
    assert shown == [["safeclip_fixed", "targeted, badnets", "15.0", *undefended, *unpoisoned]]


def test_an_attack_that_fails_undefended_is_not_taken_together_with_others(tmp_path):
    path = write(tmp_path / "safeclip-test.json", two_attacks(backdoor=50))
    assert "\n\n" not in plots_safeclip.verdict(path)


def test_one_seed_bounds_nothing():
    trainings = [{0: ((0.5, 0.5), (0.5, 0.4))}, {0: ((0.4, 0.5), (0.5, 0.4))}]
    assert plots_safeclip.usefulness(*trainings) == pytest.approx([0.9, 1.25])
    assert np.isnan(plots_safeclip.usefulness_interval(trainings)).all()


def test_usefulness_is_compared_on_the_seeds_that_both_rows_have(tmp_path):
    path = write(
        tmp_path / "safeclip-test.json",
        {
            (NOTHING, "clip_augmented", 0): metrics(top1=0.9, recall=0.9),
            (NOTHING, "clip_augmented", 1): metrics(top1=0.5, recall=0.5),
            ("targeted", "clip_augmented", 0): metrics(16, top1=0.9, recall=0.9),
            ("targeted", "safeclip_fixed", 1): metrics(0, top1=0.45, recall=0.5),
            ("targeted", "safeclip_fixed", 2): metrics(0, top1=0.1, recall=0.1),
        },
    )
    line = plots_safeclip.verdict(path).splitlines()[-1]
    assert line.strip("| ").split(" | ")[-4:] == ["not run", "90 / 100", "yes", "2"]


def test_what_an_unpoisoned_network_errs_by_is_no_success_of_a_canary():
    found = results(safeclip_fixed=metrics(3, 5, top1=0.4), growth_0=metrics(1, 5, top1=0.3))
    assert choose(found) == "growth_0"
    for cell in found:
        cell["metrics"]["base"] = metrics(3, 2)
    assert choose(found) == "safeclip_fixed"


def test_one_bar_holds_for_all_candidates():
    # Their unpoisoned networks differ by machine; the mean, 2.5 targets, is everybody's bar.
    found = results(safeclip_fixed=metrics(3, 0, top1=0.9), growth_0=metrics(2, 0, top1=0.3))
    for cell, errs in zip(found, (4, 1), strict=True):
        cell["metrics"]["base"] = metrics(errs, 2)
    assert choose(found) == "growth_0"


def test_nobody_is_chosen_before_the_canaries_were_met():
    assert choose([]) is None


def test_the_choice_is_shown_and_rows_of_another_setting_are_told(tmp_path):
    cells = {
        (CANARIES, "growth_0", 0): metrics(0, 4, top1=0.3, recall=0.1),
        (CANARIES, "growth_5", 0): metrics(4, 0, top1=0.9),
        ("targeted", CHOSEN, 0): {**metrics(0), "setting": "growth_5"},
    }
    path = write(tmp_path / "safeclip-test.json", cells, ("growth_0", "growth_5", "faster"))
    shown, warning = plots_safeclip.choice(path).split("\n\n")
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines()]
    assert rows[0][2] == "at most 10.0 / 10.0"
    assert rows[2:] == [
        ["**growth_0**", "0.0 / 4.0", "yes", "30.0", "10.0", "20.0"],
        ["growth_5", "25.0 / 0.0", "no", "90.0", "40.0", "65.0"],
        ["faster", *["not run"] * 5],
    ]
    assert warning == "**Rows of safeclip_recommended were trained as growth_5, not as growth_0.**"
    cells["targeted", CHOSEN, 0]["setting"] = "growth_0"
    write(path, cells, ("growth_0", "growth_5"))
    assert "\n\n" not in plots_safeclip.choice(path)


def test_weights_of_other_pairs_are_refused(tmp_path, world, monkeypatch):
    key = {"attack": "badnets", "method": "clip", "seed": 0}
    options = SimpleNamespace(runs=tmp_path, experiment="safeclip", preset="test")
    _, other = safeclip.plant({**key, "seed": 1}, CONFIG, world)
    monkeypatch.setattr(records, "kept", lambda *_: ({}, {"manifest": other.sha256}))
    with pytest.raises(SystemExit, match=f"was trained on other pairs: .*{other.sha256}"):
        safeclip.trained(key, CONFIG, world, options)
    assert safeclip.trained({**key, "seed": 1}, CONFIG, world, options)[0] == {}


def test_the_table_pools_counts_over_seeds_and_says_what_was_not_run(tmp_path):
    path = write(
        tmp_path / "safeclip-test.json",
        {
            ("targeted", "clip_augmented", 0): metrics(16),
            ("targeted", "clip_augmented", 1): metrics(12),
            (CANARIES, "growth_0", 0): metrics(0, 4),
        },
    )
    first, second, third = plots_safeclip.table(path).split("\n\n")
    row = next(line for line in first.splitlines() if line.startswith("| targeted |"))
    assert row.strip("| ").split(" | ")[:4] == [
        "targeted",
        "clip_augmented",
        "87.5 ± 17.7",
        "71.9 to 95.0",
    ]
    assert "| badnets | roclip | not run |" in first
    assert "| canaries | growth_0 | 0.0 / 4.0 |" in second
    assert "| targeted | growth_0 | not run |" in third
    quoted = plots_safeclip.readme_table(path)
    assert "| targeted | clip_augmented | 87.5 ± 17.7 | 71.9 to 95.0 |" in quoted
    assert "| **growth_0** | 0.0 / 4.0 | yes |" in quoted
    assert "Not run against targeted: safeclip_fixed, roclip." in quoted


def test_poisons_kept_are_those_in_the_last_safe_set_of_all_that_were_planted(tmp_path):
    history = [{"epoch": 3, "safe_share": 0.2, "leak": share(1, 2), "auroc": 0.75}]
    thinned = {**metrics(0), "leak": share(2, 4), "history": history}
    path = write(tmp_path / "safeclip-test.json", {("targeted", "safeclip_fixed", 0): thinned})
    table = plots_safeclip.table(path).splitlines()
    line = next(line for line in table if "| safeclip_fixed | 0" in line)
    assert line.strip("| ").split(" | ")[-4:] == ["25.0", "0.75", "2.0", "1"]


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_the_triggers_of_a_preset_exist_and_the_canaries_can_avoid_them(preset):
    attacks = PRESETS[preset].attacks
    made = {
        name: getattr(library.triggers, attack.trigger)(**attack.options)
        for name, attack in attacks.items()
        if attack.trigger
    }
    kinds = {type(trigger) for name, trigger in made.items() if name != CANARIES}
    own = made.get(CANARIES)
    assert own not in [trigger for name, trigger in made.items() if name != CANARIES]
    assert own or len(kinds) < 4


@pytest.mark.parametrize("preset", PRESETS)
def test_the_tower_of_a_preset_can_be_built(preset):
    tower = PRESETS[preset].tower
    model = models.build(**tower.model)
    size = PRESETS[preset].size
    variables = jax.eval_shape(lambda key: model.init(key, (size, size, 3)), jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    assert jax.eval_shape(model.apply, variables, image).shape == (1, tower.dim)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_of_a_preset_has_a_valid_recipe(preset):
    config = PRESETS[preset]
    for method in {**config.candidates, **config.methods}.values():
        recipe = safeclip.recipe_of(method, config)
        assert recipe.method == method.trainer
        assert not method.after or method.after in config.methods


def test_the_papers_pairs_stay_on_disk(tmp_path, monkeypatch):
    train, held_out = write_table(tmp_path, 9, 0), write_table(tmp_path, 5, 100)
    cifar = data.pair_source(held_out, size=12).source
    labelled = data.Dataset(
        np.zeros((5, 8, 8, 3), np.float32), np.int32([0, 1, 0, 1, 1]), np.arange(5), ("cat", "dog")
    )
    monkeypatch.setattr(data, "load", lambda *_: labelled)
    monkeypatch.setattr(data, "source", lambda *_, size: dataclasses.replace(cifar, size=size))
    config = Config(data=str(train), held_out=str(held_out), size=12, train_pairs=7)
    found, validation, test = safeclip.table(config).values()
    parts = (found, validation.pairs, test.pairs, validation.labelled, test.labelled)
    assert [len(part.captions) for part in parts] == [7, 3, 2, 3, 2]
    assert all(isinstance(part.images, data.StoredImages) for part in parts)
    assert {part.images.shape[1:] for part in parts} == {(12, 12, 3)}
    assert set(validation.labelled.indices).isdisjoint(found.indices)
    assert validation.labelled.class_names == ("cat", "dog")


def test_copies_beyond_the_allowed_are_taken_out_and_counted(world):
    pairs, manifest = safeclip.plant({"attack": "targeted", "seed": 0}, CONFIG, world)
    kept, found = safeclip.thinned(Method(copies=2), pairs, manifest, 0)
    assert found["thinned_pairs"] == len(kept.captions) == len(pairs.captions) - 4
    assert (found["leak"]["successes"], found["leak"]["n"]) == (8, 12)
    assert kept.captions[:60] == world.train.captions


def test_without_an_attack_the_pairs_are_the_clean_ones_and_nothing_is_counted(world):
    pairs, manifest = safeclip.plant({"attack": NOTHING, "seed": 0}, CONFIG, world)
    assert pairs is world.train
    assert (manifest.clean, manifest.poisons) == (manifest.poisoned, ())
    recipe = library.Recipe(epochs=4, unimodal_epochs=1, slow_epochs=1)
    scores = np.linspace(0, 1, len(pairs.captions))
    trust = library.Trust(scores, scores, scores > 0.5)
    watch = safeclip_evaluation.watch(manifest, pairs, recipe)
    assert watch(4, {}, trust) == {}
    assert sum(watch(3, {}, trust)["histogram"]["clean"]) == len(scores)


def test_plots_and_tables_leave_out_what_nobody_attacked(tmp_path):
    history = [{"epoch": epoch, "safe_share": 0.2} for epoch in (3, 4)]
    leaking = [{**entry, "leak": share(1, 4)} for entry in history]
    path = write(
        tmp_path / "safeclip-test.json",
        {
            (NOTHING, "clip_augmented", 0): metrics(),
            (NOTHING, "safeclip_fixed", 0): {**metrics(), "history": history},
            ("targeted", "clip_augmented", 0): metrics(16),
            ("targeted", "safeclip_fixed", 0): {**metrics(0), "history": leaking},
        },
    )
    row = plots_safeclip.table(path).splitlines()[2].strip("| ").split(" | ")
    assert row[:3] == ["none", "clip_augmented", ""]
    assert len(plots_safeclip.verdict(path).splitlines()) == 3
    plots_safeclip.leaks(path)
    assert (tmp_path / "safeclip-test-leak.png").exists()
