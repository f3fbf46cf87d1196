"""AutoAttack on the networks of the first experiment, and on an ImageNet network: what is left.

    python -m experiments.autoattack_benchmark                   # quick: one seed, linf, minutes
    python -m experiments.autoattack_benchmark --preset laptop   # three seeds, both threats, hours
    python -m experiments.autoattack_benchmark --preset smoke    # seconds

Networks are those that the same preset of `experiments.adversarial_training` left, or, where it was
not run, trained as it trains them. Each is evaluated by `jr.evaluate`: the standard suite,
per-example worst case, and the gradient-masking report card, whose alarms stand beside the figure.
EfficientNet-lite0 is the published network, attacked on foolbox's twenty ImageNet photographs. A
run that is stopped goes on where it was, inside an attack too.
"""

import argparse
import dataclasses
import functools
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrobust as jr
from experiments import adversarial_training as base
from experiments import common, plots, records

NAME = "autoattack_benchmark"
PHOTOS = "efficientnet_lite0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One preset; a cell is one network under one threat."""

    training: base.Config = dataclasses.field(default_factory=base.Config)
    queries: int = 5000
    steps: int = 100
    targets: int = 9
    test_images: int = 1000
    card_images: int = 200
    batch_size: int = 256
    # EfficientNet-lite0 on photographs: radius by norm; none leaves it out.
    photos: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"linf": 1 / 255, "l2": 0.5}
    )
    photo_queries: int = 1000
    photo_images: int = 20


SMALL = dataclasses.replace(base.PRESETS["smoke"], methods=("pgd_at",), threats={"linf": 0.3})
PRESETS = {
    "smoke": Config(
        training=SMALL, queries=50, steps=5, targets=2, test_images=24, card_images=16,
        batch_size=16, photos={},
    ),
    "quick": Config(training=base.PRESETS["quick"], test_images=500, photos={}),
    "laptop": Config(),
}  # fmt: skip


# Built once: equal models of different cells share what is compiled.
build = functools.cache(jr.models.build)


def network(key: dict, config: Config, sets: dict, options) -> tuple[jr.models.Model, Any]:
    """A network of the first experiment with its weights: what that one left, or trained now."""
    first = argparse.Namespace(**{**vars(options), "experiment": base.NAME})
    same = ("method", "threat", "eps", "seed")
    wanted = next(
        theirs for theirs in base.keys(config.training) if all(theirs[n] == key[n] for n in same)
    )
    model = build(wanted["model"])
    path = records.run_folder(first, config.training, wanted) / "weights.safetensors"
    with records.alone(path.parent):
        if not path.exists():
            fitted = base.train(wanted, config.training, sets, first, model)
            jr.checkpoint.save_weights(path, jax.tree.map(np.asarray, fitted.variables))
    return model, jr.checkpoint.load_weights(path)


def cell(key: dict, config: Config, sets: dict, options) -> dict[str, Any]:
    """The figures of one network under one threat."""
    if key["method"] == PHOTOS:
        model, variables = jr.models.load_efficientnet_lite0()
        photos = jr.data.foolbox_photos("imagenet")
        images, labels = photos.images, photos.labels
        rows = slice(0, config.photo_images)
        images, labels = images[rows], labels[rows]
    else:
        model, variables = network(key, config, sets, options)
        images, labels = sets["test"].images, sets["test"].labels
        images, labels = images[: config.test_images], labels[: config.test_images]
    # Every process evaluates on its own devices, to the same numbers.
    mesh = jr.parallel.data_mesh(jax.local_devices()[: options.devices])
    placed = jr.parallel.create(lambda: jax.tree.map(jnp.asarray, variables), mesh)
    report = jr.evaluate(
        common.LogitsOf(model.apply),
        images,
        labels,
        threats={key["threat"]: key["eps"]},
        suite=common.suite_of(key["queries"], config.steps, config.targets),
        key=jax.random.key(key["seed"]),
        args=(placed,),
        card_images=config.card_images,
        curve_images=config.card_images,
        batch_size=config.photo_images if key["method"] == PHOTOS else config.batch_size,
        mesh=mesh,
        out=records.run_folder(options, config, key),
    )
    threat = report.threats[key["threat"]]
    return {
        "clean_accuracy": report.clean[0],
        "robust_accuracy": report.worst_case[0],
        "robust_interval": report.worst_case[1:],
        "accuracy_after": threat.stages,
        "attack_flops": sum(threat.flops.values()),
        "attack_seconds": sum(threat.seconds.values()),
        "alarms": list(report.alarms),
    }


def keys(config: Config) -> list[dict]:
    """All cells, seed by seed."""
    training = config.training
    found = [
        {
            "method": method, "dataset": training.dataset, "threat": threat, "eps": eps,
            "seed": seed, "suite": "standard", "queries": config.queries,
            "images": config.test_images,
        }
        for seed in training.seeds
        for threat, eps in training.threats.items()
        for method in training.methods
    ]  # fmt: skip
    found += [
        {
            "method": PHOTOS, "dataset": "foolbox_imagenet", "threat": threat, "eps": eps,
            "seed": 0, "suite": "standard", "queries": config.photo_queries,
            "images": config.photo_images,
        }
        for threat, eps in config.photos.items()
    ]  # fmt: skip
    return found


def table(path: Path) -> str:
    """Clean and robust accuracy per method and threat, with the alarms that were raised."""
    rows = defaultdict(list)
    for found in plots.read(path)["cells"]:
        key = found["key"]
        rows[f"{key['threat']} {key['eps']:.3g}", key["method"]].append(found["metrics"])
    header = ["threat", "method", "clean %", "AutoAttack %", "seeds", "alarms of the report card"]
    lines = []
    for (threat, method), cells in rows.items():
        names = sorted({alarm.split(": ")[1] for c in cells for alarm in c["alarms"]})
        lines.append(
            [
                threat,
                plots.NAMES.get(method, method),
                plots.spread([c["clean_accuracy"] for c in cells]),
                plots.spread([c["robust_accuracy"] for c in cells]),
                str(len(cells)),
                ", ".join(names) or "none",
            ]
        )
    return common.markdown(header, lines)


def main(config: Config, options) -> None:
    """Evaluates what is missing and prints the table."""
    path = options.out / f"{NAME}-{options.preset}.json"
    results = records.Results(path, NAME, options.preset, config)
    if not options.plot_only:
        sets = base.load(config.training)
        for key in results.missing(
            keys(config), functools.partial(records.run_folder, options, config)
        ):
            begun = time.monotonic()
            metrics = cell(key, config, sets, options)
            results.add(key, metrics, time.monotonic() - begun)
    print(table(path))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS)
    main(PRESETS[chosen.preset], chosen)
