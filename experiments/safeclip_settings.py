"""What the SAFECLIP experiment compares: attacks, trainers, defences, data, presets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrobust import models
from jaxrobust.safeclip.templates import PROMPTS

# The attack by which settings are chosen: poisons that the defender plants.
CANARIES = "canaries"
NOTHING = "none"  # clean pairs: what a defence costs where nobody attacks
CHOSEN = "safeclip_recommended"
UNDEFENDED = "clip_augmented"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """One way to poison the training pairs; `targets` images, or a trigger, or both as canaries."""

    targets: int = 0
    per_target: int = 0
    views: float = 0.0  # strength of the random views that take the place of exact copies
    trigger: str | None = None  # a function of `safeclip.triggers`
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate: int = 0  # triggered pairs
    style: str = "dirty"
    real: bool = True  # captions of the class from the data; otherwise sentences with its name


ATTACKS = {
    NOTHING: Attack(),
    "targeted": Attack(targets=16, per_target=30),
    # Knows that copies are looked for.
    "targeted_views": Attack(targets=16, per_target=30, views=0.5),
    "badnets": Attack(trigger="badnets", options={"size": 8 / 32}, rate=300),
    "blended": Attack(trigger="blended", options={"alpha": 0.4}, rate=300),
    "wanet": Attack(trigger="wanet", options={"strength": 4.0}, rate=450),
    CANARIES: Attack(targets=16, per_target=30, rate=300),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One row: a trainer, and what is done before or after it."""

    trainer: str = "safeclip"  # as of `safeclip.Recipe`
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    official: bool = False  # the authors' schedule, scoring and mixture
    splitter: str | None = None  # a function of `safeclip` in place of the mixture
    copies: int | None = None  # near copies of one image that are trained on, at most
    # Fine-tuning of this method's network on clean pairs, or training without what looks like an
    # outlier to it.
    after: str | None = None
    detector: str | None = None  # of `safeclip.density`
    dropped: float = 0.1  # share of the pairs that the detector takes out


METHODS = {
    "clip": Method(trainer="clip"),
    "clip_augmented": Method(trainer="clip_augmented"),
    "clip_thinned": Method(trainer="clip_augmented", copies=5),
    "roclip": Method(trainer="roclip"),
    "safeclip_official": Method(official=True),
    "safeclip_fixed": Method(),
    # As far in the slow epoch, rate times steps, as the authors went on CC1M, COCO and VG.
    "safeclip_scaled": Method(settings={"slow_rate": 6e-4}),
    CHOSEN: Method(),
    "cleanclip": Method(trainer="cleanclip", after="clip_augmented"),
    "density_filter": Method(trainer="clip_augmented", after="clip_augmented", detector="dao"),
}


def agreeing(
    share: float, *, copies: int | None = None, growth: float = 0.01, **settings: Any
) -> Method:
    """SAFECLIP that splits by agreement with neighbours, before any image has met a text."""
    settings = {
        "scoring": "agreement", "slow_epochs": 0, "threshold": 1 - share, "growth": growth,
        "bounds": (0.0, 1.0), **settings,
    }  # fmt: skip
    return Method(settings=settings, splitter="by_rank", copies=copies)


def candidates(
    *, slow_rate: float, fast_rate: float, epochs: int, copies: int
) -> dict[str, Method]:
    """Settings of SAFECLIP that canaries choose from: single changes, and those that helped.

    Args:
        slow_rate: of the slow epochs, as published.
        fast_rate: of slow epochs that are not so slow.
        epochs: of the preset's recipe.
        copies: near copies of an image that are kept, about as many as are honest.
    """
    faster = {"slow_rate": fast_rate, "growth": 0.05}
    early = {"growth": 0.07, "unimodal_epochs": 3, "cap": 0.9}
    soon = {"growth": 0.1, "unimodal_epochs": 2}
    # The pairs that are not trusted are left out, and epochs added until it costs as much again.
    long = {"growth": 0.05, "unimodal_epochs": 3, "cap": 0.9, "train_risky": False}
    return {
        "safeclip_fixed": Method(),
        f"slow_rate_{fast_rate / slow_rate:.0f}": Method(settings={"slow_rate": fast_rate}),
        "slow_epochs_3": Method(settings={"slow_epochs": 3}),
        "threshold_50": Method(settings={"threshold": 0.5}),
        "growth_0": Method(settings={"growth": 0.0}),
        "growth_5": Method(settings={"growth": 0.05}),
        "faster": Method(settings=faster),
        "faster_thinned": Method(settings=faster, copies=copies),
        "agreement_50": agreeing(0.5),
        "agreement_50_growth_5": agreeing(0.5, growth=0.05),
        "agreement_50_early": agreeing(0.5, **early),
        "agreement_50_thinned": agreeing(0.5, copies=copies, growth=0.03),
        "agreement_50_early_thinned": agreeing(0.5, copies=copies, **early),
        # Without the copies an epoch is shorter: these take about as many steps as all pairs do.
        "agreement_50_full_thinned": agreeing(
            0.5, copies=copies, epochs=round(1.15 * epochs), **early
        ),
        "agreement_50_wide_thinned": agreeing(0.5, copies=copies, **{**early, "cap": 0.97}),
        "agreement_50_soon_thinned": agreeing(0.5, copies=copies, cap=0.95, **soon),
        "agreement_50_long_thinned": agreeing(
            0.5, copies=copies, epochs=round(1.2 * epochs), **long
        ),
        "agreement_70_early_thinned": agreeing(
            0.7, copies=copies, growth=0.03, unimodal_epochs=3, cap=0.95
        ),
        "agreement_70_capped_thinned": agreeing(
            0.7, copies=copies, growth=0.05, unimodal_epochs=3, cap=0.9
        ),
        "agreement_60_soon_thinned": agreeing(0.6, copies=copies, cap=0.9, **soon),
    }


# Five captions of a picture are honest in the embedded set.
CANDIDATES = candidates(slow_rate=1e-5, fast_rate=3e-4, epochs=20, copies=5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """The dual encoder: the image tower's arguments, and the size of the text transformer."""

    model: Mapping[str, Any]
    dim: int
    projection: bool
    vocabulary: int
    length: int
    width: int
    depth: int
    heads: int

    def build(self, vocabulary: int | None = None) -> models.Clip:
        """The dual encoder, for the number of tokens that a tokenizer came to have."""
        return models.clip(
            models.build(**self.model), vocabulary=vocabulary or self.vocabulary, dim=self.dim,
            projection=self.projection, length=self.length, width=self.width, depth=self.depth,
            heads=self.heads,
        )  # fmt: skip


SMALL = Tower(
    model={
        "name": "small_cnn", "channels": (32, 64, 128), "strides": (2, 2, 2), "kernel": 3,
        "dense": (), "classes": 128, "norm": "group",
    },
    dim=128, projection=False, vocabulary=1000, length=20, width=64, depth=2, heads=2,
)  # fmt: skip
RESNET = Tower(
    model={"name": "clip_resnet", "projection": 1024}, dim=1024, projection=False,
    vocabulary=49_408, length=77, width=512, depth=12, heads=8,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One preset; a cell is one (attack, method, seed)."""

    data: str = "emoji"  # or a table of image and caption, as `data.load_pairs` reads
    held_out: str = ""  # likewise, where `data` is a table
    size: int = 32
    train_pairs: int | None = None
    by: str = "group"  # classes of attack and zero-shot test
    # Another drawing style for the test pictures: a folder that
    # `npm install --no-save emoji-datasource-google` brings; without it there are no such figures.
    style: str = "node_modules/emoji-datasource-google/img/google/64"
    tower: Tower = SMALL
    # In the words of the captions: a text tower that never met "photo" hears nothing else in it.
    prompts: tuple[str, ...] = ("{}", "an emoji of {}", "{} emoji", "a drawing of {}")
    strength: float = 0.5  # of the views: crops at full strength lose a corner of 32 pixels
    attacks: Mapping[str, Attack] = dataclasses.field(default_factory=lambda: ATTACKS)
    methods: Mapping[str, Method] = dataclasses.field(default_factory=lambda: METHODS)
    candidates: Mapping[str, Method] = dataclasses.field(default_factory=lambda: CANDIDATES)
    ablated: tuple[str, ...] = ()  # attacks that candidates meet too, on one seed
    single: tuple[str, ...] = ("targeted_views", "clip_thinned")  # rows of the first seed alone
    seeds: tuple[int, ...] = (0, 1, 2)
    # Settings of every trainer; `Recipe` says what they mean.
    recipe: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "epochs": 20, "batch_size": 256, "peak": 1e-3, "slow_rate": 1e-5, "warmup": 50,
            "pool": 512,
        }
    )  # fmt: skip
    cleaning: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "epochs": 10, "batch_size": 64, "peak": 1e-4, "warmup": 50, "pool": 64
        }
    )  # fmt: skip
    limit: float = 0.1  # success of the canaries that a setting may leave
    save_every: float = 30.0


PRESETS = {
    "smoke": Config(
        train_pairs=200,
        tower=dataclasses.replace(SMALL, width=32, depth=1),
        attacks={
            # The first pairs have the caption that names no group.
            "badnets": dataclasses.replace(ATTACKS["badnets"], rate=8, real=False),
            CANARIES: Attack(targets=2, per_target=4, rate=8, real=False),
        },
        methods={name: METHODS[name] for name in ("clip_augmented", CHOSEN)},
        candidates={"safeclip_fixed": CANDIDATES["safeclip_fixed"]},
        seeds=(0,),
        recipe={
            "epochs": 3, "unimodal_epochs": 1, "batch_size": 32, "peak": 1e-3, "slow_rate": 1e-5,
            "warmup": 5, "pool": 64,
        },
    ),
    "quick": Config(
        attacks={name: ATTACKS[name] for name in ("targeted", "badnets")},
        methods={name: METHODS[name] for name in ("clip_augmented", "safeclip_fixed")},
        candidates={}, seeds=(0,),
    ),
    "laptop": Config(),
    "paper": Config(
        data="cc3m/train.tsv", held_out="cc3m/validation.tsv", size=224, train_pairs=1_000_000,
        tower=RESNET, prompts=PROMPTS, strength=1.0,
        attacks={
            NOTHING: Attack(),
            # As many as the authors plant among a million.
            "targeted": Attack(targets=16, per_target=500),
            "badnets": Attack(trigger="badnets", rate=500),
            **{name: Attack(trigger=name, rate=1500) for name in ("blended", "wanet", "sig")},
            "label_consistent": Attack(trigger="badnets", rate=1500, style="consistent"),
            # Every other kind of trigger is among the attacks.
            CANARIES: Attack(
                targets=16, per_target=500, rate=500, trigger="badnets",
                options={"size": 0.1, "pattern": "checker", "place": (0.9, 0.1)},
            ),
        },
        # At ten times the slow rate the authors' own splits still held, at twenty not; of a
        # picture on the web two copies may be honest.
        # Its slow rate is the authors' own.
        methods={
            **{name: method for name, method in METHODS.items() if name != "safeclip_scaled"},
            "clip_thinned": Method(trainer="clip_augmented", copies=2),
        },
        candidates=candidates(slow_rate=5e-6, fast_rate=5e-5, epochs=32, copies=2),
        recipe={
            "epochs": 32, "batch_size": 512, "peak": 5e-4, "slow_rate": 5e-6, "warmup": 10_000,
            "pool": 21_845,
        },
        cleaning={"epochs": 10, "batch_size": 64, "peak": 1e-5, "warmup": 50, "pool": 64},
        save_every=600.0,
    ),
}  # fmt: skip
