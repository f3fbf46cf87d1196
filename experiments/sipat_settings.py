"""What the SIP-AT experiment trains: its rows with their controls, its data sets, its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One row: what is trained, and what of the image it spares."""

    loss: str = "at"  # or "standard", "trades", "mart"
    source: str | None = None  # of the scores; None spares nothing
    area: float = 0.2  # share of the pixels that is spared; people's maps have their own
    end_area: float | None = None  # what the area changes to, linearly, until training ends
    per_class: bool = False  # the more, the more often the AT network fails on the class
    control: str | None = None  # "shuffled", "least": as many pixels, other ones
    teacher: str = "standard"  # the method whose network the scores explain
    masking: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eps_share: float = 1.0

    @property
    def varies(self) -> bool:
        """Whether the training step selects the area, from scores."""
        return self.per_class or self.end_area is not None


def controlled(area: float) -> dict[str, Method]:
    """A spared area with its two controls."""
    percent = round(100 * area)
    return {
        f"sip_gradient_{percent}": Method(source="gradient", area=area),
        f"random_{percent}": Method(source="gradient", area=area, control="shuffled"),
        f"least_{percent}": Method(source="gradient", area=area, control="least"),
    }


# Sets in colour without people's maps: rows that need them are left out.
UNANNOTATED = ("cifar10", "cifar100")
HALF_OUTSIDE = {"salient": 1.0, "background": 0.5}
METHODS = {
    "standard": Method(loss="standard"),
    "at": Method(),
    "trades": Method(loss="trades"),
    "at_eps_83": Method(eps_share=0.83),
    "at_eps_67": Method(eps_share=0.67),
    "at_eps_50": Method(eps_share=0.5),
    **controlled(0.2),
    **controlled(0.05),
    **controlled(0.5),
    "inverted_20": Method(source="gradient", masking={"invert": True}),
    "sip_post_hoc_20": Method(source="gradient", masking={"post_hoc": True}),
    "sip_soft_20": Method(source="gradient", masking={"mode": "soft"}),
    "sip_smooth_grad_20": Method(source="smooth_grad"),
    "sip_integrated_20": Method(source="integrated_gradients"),
    "sip_grad_cam_20": Method(source="grad_cam"),
    "sip_layer_cam_20": Method(source="layer_cam"),
    "sip_rise_20": Method(source="rise"),
    "sip_robust_20": Method(source="gradient", teacher="at"),
    "sip_human": Method(source="human"),
    "random_human": Method(source="human", control="shuffled"),
    "sip_trades_20": Method(source="gradient", loss="trades"),
    "half_eps_20": Method(source="gradient", masking={"salient": 0.5}),
    "sip_falling_50": Method(source="gradient", area=0.5, end_area=0.0),
    "random_falling_50": Method(source="gradient", area=0.5, end_area=0.0, control="shuffled"),
    "sip_per_class_20": Method(source="gradient", per_class=True),
    "random_per_class_20": Method(source="gradient", per_class=True, control="shuffled"),
    # The opposite choice: the object keeps its eps, what surrounds it has less, or none.
    "part_20": Method(source="grad_cam", masking={"salient": 1.0, "background": 0.875}),
    "part_human": Method(source="human", masking=HALF_OUTSIDE),
    "random_part_human": Method(source="human", control="shuffled", masking=HALF_OUTSIDE),
    "inverted_human": Method(source="human", masking={"invert": True}),
    "random_inverted_human": Method(source="human", control="shuffled", masking={"invert": True}),
}
# The first words of the names of rows that salience has no part in, or is turned around in.
CONTROLS = ("standard", "at", "trades", "random", "least", "inverted")


def is_control(method: str) -> bool:
    """Whether a row knows nothing of salience, or turns it around."""
    return method.split("_")[0] in CONTROLS


# What the suite judges: the ends of the frontier, and all that they are held against.
ENDS = ("sip_gradient_5", "sip_gradient_20", "sip_gradient_50", "sip_human", "sip_falling_50")
JUDGED = ENDS + tuple(filter(is_control, METHODS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One data set, the network for it, and the eps that it is judged at."""

    dataset: str
    model: Mapping[str, Any]
    tap: str  # the activation that Grad-CAM and LayerCAM look at
    eps: float
    grid: tuple[float, ...]
    suite_eps: tuple[float, ...]
    train_split: str = "train+validation"
    epochs: int = 20
    batch_size: int = 50
    rate: float = 1e-2
    standard_rate: float = 2e-3
    shift: int = 1
    flip: bool = False
    optimizer: str = "adam"
    weight_decay: float = 0.0


PROBLEMS = {
    "mnist5k": Problem(
        dataset="mnist5k", model={"name": "small_cnn"}, tap="conv2", eps=0.3,
        grid=(0.05, 0.1, 0.2, 0.3), suite_eps=(0.1, 0.3),
    ),
    "cutouts": Problem(
        dataset="cutouts",
        model={
            "name": "small_cnn", "channels": (32, 64, 64), "strides": (2, 2, 1), "kernel": 3,
            "dense": (128,), "classes": 8,
        },
        tap="conv3", eps=8 / 255, grid=tuple(k / 255 for k in (1, 2, 4, 8)),
        suite_eps=(2 / 255, 8 / 255), epochs=12, rate=3e-3,
        standard_rate=2e-3, shift=2, flip=True,
    ),
}  # fmt: skip
CIFAR = Problem(
    dataset="cifar10", model={"name": "preact_resnet18", "norm": "batch"}, tap="layer4",
    eps=8 / 255, grid=tuple(k / 255 for k in (1, 2, 4, 8)), suite_eps=(2 / 255, 8 / 255),
    train_split="train", epochs=200, batch_size=128, optimizer="sgd", rate=0.1, standard_rate=0.1,
    shift=4, flip=True, weight_decay=5e-4,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One preset; a cell is one (data set, method, seed)."""

    problems: Mapping[str, Problem] = dataclasses.field(default_factory=lambda: PROBLEMS)
    methods: Mapping[str, Method] = dataclasses.field(default_factory=lambda: METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    train_images: int | None = None
    attack_steps: int = 5
    eps_warmup: float = 0.3
    ema_decay: float = 0.99
    save_every: float = 30.0
    test_images: int = 1000
    pgd_steps: int = 50
    suite_images: int = 200
    suite: tuple[str, ...] = JUDGED


FEW = ("standard", "at", "at_eps_67", "sip_gradient_20", "random_20", "least_20", "sip_human")
PRESETS = {
    "smoke": Config(
        problems={"mnist5k": dataclasses.replace(PROBLEMS["mnist5k"], epochs=1)},
        methods={
            name: METHODS[name]
            for name in (
                "standard", "at", "sip_gradient_20", "random_20", "sip_per_class_20",
                "random_falling_50",
            )
        },
        seeds=(0,), train_images=200, attack_steps=1, save_every=0.5, test_images=32, pgd_steps=2,
        suite=(),
    ),
    "quick": Config(
        problems={"mnist5k": PROBLEMS["mnist5k"]}, methods={name: METHODS[name] for name in FEW},
        seeds=(0,), suite=(),
    ),
    "laptop": Config(),
    "paper": Config(
        problems={
            "cifar10": CIFAR,
            "cifar100": dataclasses.replace(
                CIFAR, dataset="cifar100", model={**CIFAR.model, "classes": 100}
            ),
            "cub200": dataclasses.replace(
                CIFAR, dataset="cub200", model={**CIFAR.model, "classes": 200}, epochs=50,
                batch_size=32,
            ),
        },
        attack_steps=10, ema_decay=0.995, test_images=10000,
    ),
}  # fmt: skip
