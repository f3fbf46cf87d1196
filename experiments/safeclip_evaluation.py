"""How the SAFECLIP experiment judges a dual encoder: what it can do, and what poisons did to it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import data, models, safeclip
from jaxrobust.data.pairs import Pairs
from jaxrobust.safeclip import metrics, triggers
from jaxrobust.safeclip.manifest import Manifest, poisoned

BINS = 80


class Judge(NamedTuple):
    """Pictures that were not trained on.

    Attributes:
        pairs: for retrieval, and where target images come from.
        labelled: with classes, for the zero-shot test and for triggers.
    """

    pairs: Pairs
    labelled: Pairs


class World(NamedTuple):
    """The data and the network that all cells share.

    Attributes:
        train: clean training pairs.
        validation: what settings are chosen by.
        test: what rows are judged by.
        tokenizer: of the captions.
        prompts: sentences with a gap for a class, of the zero-shot test.
        clip: the dual encoder.
        encode_image: (variables, images) -> [b, d], compiled once.
        encode_text: (variables, tokens) -> [b, d], likewise.
        shown: the training pictures, one row each, for the linear probe; None without classes.
        style: the test pictures in another drawing style; None where there is none.
    """

    train: Pairs
    validation: Judge
    test: Judge
    tokenizer: data.Tokenizer
    prompts: tuple[str, ...]
    clip: models.Clip
    encode_image: Callable[..., jax.Array]
    encode_text: Callable[..., jax.Array]
    shown: Pairs | None = None
    style: Pairs | None = None

    def images(self, variables: dict, images: np.ndarray) -> np.ndarray:
        """[n, d] embeddings of images."""
        return metrics.embed(lambda x: self.encode_image(variables, x), images)

    def texts(self, variables: dict, texts: list[str]) -> np.ndarray:
        """[n, d] embeddings of texts."""
        return metrics.embed(
            lambda tokens: self.encode_text(variables, tokens), self.tokenizer(texts)
        )


def evaluate(
    world: World,
    judge: Judge,
    manifest: Manifest,
    variables: dict,
    unpoisoned: dict | None = None,
) -> dict[str, Any]:
    """Zero-shot accuracy, retrieval and linear probe, and the success of every poison.

    Target images count for nothing but the poisons' success.

    Args:
        world: data and network.
        judge: the pictures to judge by.
        manifest: what was planted.
        variables: of the trained network.
        unpoisoned: of a network trained on clean pairs, which errs in the attacker's favour now and
            then too: the base rate of success.
    """
    sources = [
        index
        for poison in manifest.poisons
        if poison.kind == "targeted"
        for index in poison.sources
    ]
    pairs, clean, style = (
        part and part.take(np.flatnonzero(~np.isin(part.indices, sources)))
        for part in (judge.pairs, judge.labelled, world.style if judge is world.test else None)
    )
    prototypes = prototypes_of(world, variables, clean.class_names)

    def zero_shot(pairs: Pairs) -> dict[str, float]:
        scores = world.images(variables, pairs.images) @ prototypes.T
        return metrics.zero_shot(scores, pairs.labels, ks=(1, 5))

    found = {
        "zero_shot": zero_shot(clean),
        "retrieval": metrics.retrieval(
            world.images(variables, pairs.images),
            world.texts(variables, list(pairs.captions)),
            ks=(1, 5, 10),
        ),
        "planted": sum(len(poison.indices) for poison in manifest.poisons),
    }
    if world.shown is not None:
        found |= by_name(world, clean, variables) | probe(world, clean, variables)
    if style:
        found["zero_shot_style"] = zero_shot(style)
    found |= successes(world, judge, clean, manifest, variables)
    if unpoisoned is not None and manifest.poisons:
        found["base"] = successes(world, judge, clean, manifest, unpoisoned)
    return found


def prototypes_of(world: World, variables: dict, names: Sequence[str]) -> np.ndarray:
    """[classes, d] mean embeddings of the classes' prompts."""
    return metrics.class_prototypes(
        lambda texts: world.texts(variables, texts), names, templates=world.prompts
    )


def by_name(world: World, clean: Pairs, variables: dict) -> dict[str, Any]:
    """Zero-shot among the names of the pictures that are judged."""
    labels, names = data.emoji_labels(clean.indices, "name")
    present, places = np.unique(labels, return_inverse=True)
    prototypes = prototypes_of(world, variables, [names[label] for label in present])
    scores = world.images(variables, clean.images) @ prototypes.T
    return {"zero_shot_names": metrics.zero_shot(scores, places, ks=(1, 5))}


def probe(world: World, clean: Pairs, variables: dict) -> dict[str, float]:
    """Accuracy of a linear head on the image tower, fitted to the clean training pictures."""
    accuracy = metrics.linear_probe(
        world.images(variables, world.shown.images), world.shown.labels,
        world.images(variables, clean.images), clean.labels, len(clean.class_names), decay=1e-2,
        scale="each",
    )  # fmt: skip
    return {"linear_probe": accuracy}


def successes(world, judge, clean, manifest, variables) -> dict[str, Any]:
    """What every poison achieved: the share of the targets, or of the triggered pictures."""
    names, found = list(clean.class_names), {}
    prototypes = prototypes_of(world, variables, names)
    aims = {
        poison.sources[0]: names.index(poison.target)
        for poison in manifest.poisons
        if poison.kind == "targeted"
    }
    if aims:
        rows = [int(np.flatnonzero(judge.pairs.indices == index)[0]) for index in aims]
        targets = judge.pairs.take(rows)
        scores = world.images(variables, targets.images) @ prototypes.T
        found["targeted"] = metrics.poison_success(scores, np.array(list(aims.values())))._asdict()
        if targets.labels is not None:
            right = metrics.poison_success(scores, targets.labels)
            found["targets_true_class"] = right._asdict()
    for poison in manifest.poisons:
        if poison.kind == "targeted":
            continue
        outcome = metrics.try_backdoor(
            lambda x: world.encode_image(variables, x), prototypes, clean.images, clean.labels,
            triggers.from_dict(poison.trigger), names.index(poison.target), indices=clean.indices,
        )  # fmt: skip
        found["backdoor"] = {name: share._asdict() for name, share in outcome._asdict().items()}
    return found


def caught(kept: np.ndarray, suspicion: np.ndarray | None, is_poison: np.ndarray) -> dict[str, Any]:
    """What of the poisons was kept, and how well a score finds them; nothing without any."""
    if not is_poison.any():
        return {}
    found = {} if suspicion is None else metrics.detection(suspicion, is_poison)._asdict()
    return {"leak": metrics.leak(kept, is_poison)._asdict(), **found}


class Watch(NamedTuple):
    """Called after each epoch: what of the poisons is in the safe set, and how they are scored."""

    is_poison: np.ndarray
    recipe: safeclip.Recipe

    def __call__(self, epoch: int, variables: dict, trust: safeclip.Trust) -> dict[str, Any]:
        """Numbers for the history."""
        if not self.recipe.splits(epoch):
            return {}
        found = caught(trust.safe, -trust.scores, self.is_poison)
        if epoch == self.recipe.first_mixed:
            mixture, _ = safeclip.fit_mixture(trust.scores)
            # Agreement is a sum of standard scores: no bounds are known beforehand.
            edges = np.linspace(trust.scores.min(), trust.scores.max(), BINS + 1)
            found["histogram"] = {
                "edges": edges.tolist(),
                "clean": np.histogram(trust.scores[~self.is_poison], edges)[0].tolist(),
                "poisons": np.histogram(trust.scores[self.is_poison], edges)[0].tolist(),
                "mixture": {**mixture._asdict(), "bimodal": mixture.is_bimodal},
            }
        return found


def watch(manifest: Manifest, pairs: Pairs, recipe: safeclip.Recipe) -> Watch:
    """A `Watch` over the poisons of a manifest in the pairs that are trained on."""
    return Watch(poisoned(manifest, pairs.indices), recipe)
