"""SAFECLIP: image-text pre-training under targeted poisons and backdoors, with defences beside it.

    python -m experiments.safeclip                    # quick: one poison each, one seed; minutes
    python -m experiments.safeclip --preset laptop    # all attacks and defences, 3 seeds; hours
    python -m experiments.safeclip --preset paper     # CC3M at 224 pixels, on accelerators
    python -m experiments.safeclip --preset smoke     # seconds

Captioned emoji are poisoned, a small dual encoder is trained on them by CLIP, RoCLIP and SAFECLIP,
and others are cleaned afterwards, or filtered or freed of copies before. How SAFECLIP is set is
chosen by canaries: poisons of the defender's own, planted in clean pairs, that share no class,
picture, trigger or template with the attacks; they know the attacks' number of copies. Every
attack's pairs are described by a hashed manifest beside the weights. A run that is stopped goes on.

To expect of the laptop preset: 2 minutes a row on an EPYC's core; attacks succeed in 87 to 100 % of
the cases undefended, in 2 to 8 % against the recommended setting, whose zero-shot accuracy is the
undefended network's and retrieval nine tenths of it.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, plots_safeclip, records, safeclip_evaluation
from experiments.safeclip_choice import chosen
from experiments.safeclip_evaluation import Judge, World
from experiments.safeclip_settings import (
    CANARIES,
    CHOSEN,
    NOTHING,
    PRESETS,
    UNDEFENDED,
    Config,
    Method,
)
from jaxrobust import data, processes, safeclip
from jaxrobust.data.pairs import Pairs
from jaxrobust.safeclip import density, poisons, triggers
from jaxrobust.safeclip.manifest import Manifest

NAME = "safeclip"
# Share of the classes that attacks aim at; canaries have the others.
ATTACKED = 2 / 3
# Ids of labelled pictures that are no pairs.
LABELLED_ID = 2**29


# ---- data ---------------------------------------------------------------------------------------


def world_of(config: Config) -> World:
    """Training pairs, the two sets to judge by, tokenizer and network."""
    parts = (emoji if config.data == "emoji" else table)(config)
    tower = config.tower
    tokenizer = data.bpe_tokenizer(
        parts["train"].captions, vocabulary=tower.vocabulary, length=tower.length
    )
    clip = tower.build(tokenizer.vocabulary)
    towers = {name: jax.jit(getattr(clip, name)) for name in ("encode_image", "encode_text")}
    return World(**parts, tokenizer=tokenizer, prompts=config.prompts, clip=clip, **towers)


def emoji(config: Config) -> dict[str, Any]:
    """The embedded pairs; pictures that are judged or probed have one caption."""
    load = partial(data.load_emoji_pairs, size=config.size, by=config.by)
    validation, test = (load(split, captions=1) for split in ("validation", "test"))
    style = Path(config.style)
    return {
        "train": load("train").take(slice(config.train_pairs)),
        "validation": Judge(validation, validation),
        "test": Judge(test, test),
        "shown": load("train", captions=1),
        "style": load("test", captions=1, styles=(style,)) if style.is_dir() else None,
    }


def table(config: Config) -> dict[str, Any]:
    """Pairs of a table; half of the held-out ones choose, and CIFAR-10 has the classes.

    All images stay on disk: a million at 224 pixels would take 600 GB.
    """
    train, held_out = (
        data.pair_source(path, size=config.size).pairs() for path in (config.data, config.held_out)
    )
    labelled = data.load("cifar10", "test")
    ids = (LABELLED_ID + labelled.indices).astype(np.int32)
    images = data.stored(data.source("cifar10", "test", size=config.size))
    shown = Pairs(images, ("",) * len(ids), ids, labelled.labels, labelled.class_names)
    judges = [
        Judge(held_out.take(h), shown.take(h)) for h in (slice(0, None, 2), slice(1, None, 2))
    ]
    train = train.take(slice(config.train_pairs))
    return {"train": train, "validation": judges[0], "test": judges[1]}


def plant(key: dict, config: Config, world: World) -> tuple[Pairs, Manifest]:
    """The poisoned training pairs of a cell; equal keys plant equal poisons."""
    attack, seed = config.attacks[key["attack"]], key["seed"]
    names = world.test.labelled.class_names
    random = np.random.RandomState(seed)
    aims = [names[row] for row in random.permutation(len(names))[: int(ATTACKED * len(names))]]
    trigger = attack.trigger and getattr(triggers, attack.trigger)(**attack.options)
    views = partial(data.clip_views, strength=attack.views) if attack.views else None
    captions = {"templates": None} if attack.real else {}
    if key["attack"] == CANARIES:
        known = [
            plant({**key, "attack": name}, config, world)[1]
            for name in config.attacks
            if name != CANARIES
        ]
        # The attack's classes are off limits even where a seed happens not to have drawn them.
        return safeclip.canaries(
            world.train, [name for name in names if name not in aims],
            per_target=attack.per_target, rate=attack.rate, targets=attack.targets,
            pool=world.validation.pairs, trigger=trigger or None, views=views, avoid=known,
            seed=seed, **captions,
        )  # fmt: skip
    if key["attack"] == NOTHING:
        return world.train, safeclip.manifest.record(world.train, world.train, [])
    if trigger:
        return safeclip.backdoor(
            world.train, trigger, aims[0], rate=attack.rate, style=attack.style, seed=seed,
            **captions,
        )  # fmt: skip
    pairs = world.test.pairs
    chosen = pairs.take(random.permutation(len(pairs.captions))[: attack.targets])
    wanted = [
        next(name for name in random.permutation(aims) if not poisons.belongs(chosen, row, name))
        for row in range(attack.targets)
    ]
    return safeclip.targeted(
        world.train, chosen, wanted, per_target=attack.per_target, views=views, seed=seed,
        **captions,
    )  # fmt: skip


# ---- training -----------------------------------------------------------------------------------


def method_of(key: dict, config: Config) -> Method:
    """The row's method, or the candidate's."""
    return {**config.candidates, **config.methods}[key["method"]]


def recipe_of(method: Method, config: Config) -> safeclip.Recipe:
    """The settings of a method's training."""
    base = config.cleaning if method.trainer == "cleanclip" else config.recipe
    changes = {**base, **method.settings}
    if method.trainer != "safeclip":
        changes.pop("unimodal_epochs", None)
        return safeclip.Recipe(method=method.trainer, **changes)
    if method.splitter:
        changes["splitter"] = getattr(safeclip, method.splitter)
    return safeclip.official(**changes) if method.official else safeclip.Recipe(**changes)


def trained(key: dict, config: Config, world: World, options) -> tuple[dict, dict]:
    """(variables, what training took and saw) of a cell, or of the run before that had it."""
    method, folder = method_of(key, config), records.run_folder(options, config, key)
    recipe = recipe_of(method, config)
    poisoned, manifest = plant(key, config, world)

    def make():
        pairs = poisoned
        manifest.save(folder / "manifest.json")
        taken, start = {"pairs": len(pairs.captions), "manifest": manifest.sha256}, None
        if method.copies:
            pairs, found = thinned(method, pairs, manifest, key["seed"])
            taken |= found
        if method.after:
            before = trained({**key, "method": method.after}, config, world, options)[0]
            if method.detector:
                pairs, found = filtered(method, world, pairs, manifest, before)
                taken |= found
            else:
                start, pairs = before, clean_pairs(config, world)
        fitted = safeclip.fit(
            world.clip, recipe, pairs.images, tokens_of(pairs, world, key["seed"]),
            views=views_of(method, config),
            seed=key["seed"], start=start, mesh=common.mesh_for(options, recipe.batch_size),
            mapping=options.mapping, evaluate=safeclip_evaluation.watch(manifest, pairs, recipe),
            directory=folder, save_every=config.save_every,
            label=" ".join(map(str, key.values())),
        )  # fmt: skip
        taken |= {
            "train_seconds": round(fitted.seconds, 2),
            "epoch_seconds": round(fitted.seconds / recipe.epochs, 2),
            "history": fitted.history,
        }
        return fitted.variables, taken

    variables, taken = records.kept(folder, "weights", make)
    if taken["manifest"] != manifest.sha256:
        raise SystemExit(
            f"{folder}: the network there was trained on other pairs: their manifest has SHA-256 "
            f"{taken['manifest']}, that of the pairs now is {manifest.sha256}; move it away"
        )
    return variables, taken


def views_of(method: Method, config: Config):
    """Random views of images, but for plain CLIP."""
    plain = method.trainer == "clip"
    return None if plain else partial(data.clip_views, strength=config.strength)


def clean_pairs(config: Config, world: World) -> Pairs:
    """The pairs that CleanCLIP may trust: those that settings are chosen by, all their captions."""
    if config.data != "emoji":
        return world.validation.pairs
    return data.load_emoji_pairs("validation", size=config.size, by=config.by)


def thinned(method: Method, pairs, manifest, seed: int) -> tuple[Pairs, dict]:
    """The pairs with few near copies of each image, and who of the poisons is still there."""
    groups = safeclip.near_copies(safeclip.thumbnails(pairs.images))
    keep = np.isin(np.arange(len(groups)), safeclip.thin(groups, method.copies, seed=seed))
    keep = processes.from_first_process(keep)
    is_poison = safeclip_evaluation.poisoned(manifest, pairs.indices)
    # One group that has swallowed half of the data would say that chains were followed too far.
    found = {"thinned_pairs": int(keep.sum()), "largest_group": int(np.bincount(groups).max())}
    found |= safeclip_evaluation.caught(keep, None, is_poison)
    return pairs.take(np.flatnonzero(keep)), found


def filtered(method: Method, world: World, pairs, manifest, before) -> tuple[Pairs, dict]:
    """The pairs without the outliers among a network's embeddings, and who they were."""
    embeddings = world.images(before, pairs.images)
    scores = density.detect(getattr(density, method.detector), embeddings)
    keep = processes.from_first_process(scores <= np.quantile(scores, 1 - method.dropped))
    is_poison = safeclip_evaluation.poisoned(manifest, pairs.indices)
    found = safeclip_evaluation.caught(keep, scores, is_poison)
    return pairs.take(np.flatnonzero(keep)), found


def tokens_of(pairs: Pairs, world: World, seed: int) -> np.ndarray:
    """[n, 3, t]: captions and two views of each."""
    found = data.text_views(pairs.captions, 2, seed=seed, indices=pairs.indices)
    columns = (pairs.captions, *zip(*found.variants, strict=True))
    return np.stack([world.tokenizer(column) for column in columns], 1)


# ---- the table ----------------------------------------------------------------------------------


def keys(config: Config) -> list[dict]:
    """All cells: canaries first, then the rows seed by seed, then what single settings change."""
    first = config.seeds[0]
    found = [(CANARIES, name, first) for name in config.candidates]
    found += [
        (attack, method, seed)
        for seed in config.seeds
        for attack in config.attacks
        if attack != CANARIES
        for method in config.methods
        # Where nobody attacks, what a defence costs is the question.
        if attack != NOTHING or method in (UNDEFENDED, CHOSEN)
        if seed == first or not {attack, method} & set(config.single)
    ]
    found += [
        (attack, name, first)
        for attack in config.ablated
        for name in config.candidates
        if name not in config.methods
    ]
    return [dict(zip(("attack", "method", "seed"), key, strict=True)) for key in found]


def run(key: dict, config: Config, world: World, results, options) -> dict[str, Any]:
    """The metrics of one cell."""
    is_choice, own = key["method"] == CHOSEN, {}
    if is_choice:
        own = {"setting": chosen(results.cells, config.candidates, config.limit)}
    key = {**key, "method": own.get("setting", key["method"])}
    variables, taken = trained(key, config, world, options)
    manifest = safeclip.manifest.load(records.run_folder(options, config, key) / "manifest.json")
    judge = world.validation if key["attack"] == CANARIES else world.test
    clean = None
    if NOTHING in config.attacks and UNDEFENDED in config.methods:
        clean = trained({**key, "attack": NOTHING, "method": UNDEFENDED}, config, world, options)[0]
    found = safeclip_evaluation.evaluate(world, judge, manifest, variables, clean)
    return {**own, **found, **taken}


def main(config: Config, options) -> None:
    """Runs what is missing, then draws the plots and prints the table."""
    path: Path = options.out / f"{NAME}-{options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    if not options.plot_only:
        world = world_of(config)
        tuned = [key for key in keys(config) if key["attack"] == CANARIES]

        def ready(key: dict) -> bool:
            return key["method"] != CHOSEN or all(map(results.find, tuned))

        folder = partial(records.run_folder, options, config)
        for key in results.missing(keys(config), folder, ready):
            begun = time.monotonic()
            metrics = run(key, config, world, results, options)
            results.add(key, metrics, time.monotonic() - begun)
        if jax.process_index() == 0:
            plots_safeclip.triggered(path, world.test.pairs, config)
    if jax.process_index() == 0:
        plots_safeclip.histograms(path)
        plots_safeclip.leaks(path)
        print(plots_safeclip.table(path))
        print(plots_safeclip.verdict(path))
        print(f"results: {path}")


if __name__ == "__main__":
    arguments = common.arguments(__doc__, PRESETS)
    main(PRESETS[arguments.preset], arguments)
