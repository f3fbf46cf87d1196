"""The report of an evaluation: figures, and reasons for doubt.

    print(report)
    report.save("report.json")
    report.plot("report.png")

A check of the gradient-masking report card that raises an alarm stays in every form of it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.evaluation import drawing
from jaxrobust.evaluation.checks import Check
from jaxrobust.files import atomic_write

# Checks forgive a couple of images: of fewer than these that is over 2 % of them, ten times the
# share that raises an alarm otherwise, and their silence means little.
ENOUGH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreatReport:
    """What one threat did.

    Attributes:
        norm: of the threat; of one that is an attack, its name.
        eps: its radius; of one that is an attack, the attack's own eps, the largest of several.
        attacks: what was run, by name, in order: each as it prints, with all its settings.
        accuracy: (estimate, low, high): robust accuracy with its 95 % Wilson interval.
        stages: accuracy after each attack, "clean" first.
        seconds: by attack, compilation included.
        flops: by attack, of matrix products and convolutions, counted on what was computed.
        per_class: robust accuracy of each class; None where it has no image.
        curve: {"eps": [...], "accuracy": [...]} under PGD-20 on the first images: an upper bound.
            Empty for a threat that is an attack.
        robust: [n] bool.
        broken_by: [n] names.
        checks: the gradient-masking report card; none for a threat that is an attack.
        card_images: how many images the card's own attacks saw.
        notes: what a reader of the figure must know.
    """

    norm: str
    eps: float
    attacks: dict[str, str]
    accuracy: tuple[float, float, float]
    stages: dict[str, float]
    seconds: dict[str, float]
    flops: dict[str, float]
    per_class: list[float | None]
    curve: dict[str, list[float]]
    robust: np.ndarray
    broken_by: np.ndarray
    checks: tuple[Check, ...]
    card_images: int
    notes: tuple[str, ...]

    @property
    def applied(self) -> int:
        """How many of the checks apply."""
        return sum(check.figure is not None for check in self.checks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """An evaluation.

    Attributes:
        images: how many.
        suite: the version of AutoAttack, or "custom".
        clean: (estimate, low, high) accuracy with its 95 % Wilson interval.
        worst_case: the same for examples that hold against every threat.
        threats: by name.
        corruptions: accuracy at severities 1 to 5 by corruption, on clean images that nobody
            attacked.
        key: {"impl": name, "data": numbers}, from which `jax.random.wrap_key_data` makes the key.
        bounds: the box of the images.
        versions: of jaxrobust, jax and numpy.
        device: how many of which.
        precision: of float32 products, as `jax.default_matmul_precision`; "default" is rounded on
            GPUs and TPUs.
    """

    images: int
    suite: str
    clean: tuple[float, float, float]
    worst_case: tuple[float, float, float]
    threats: dict[str, ThreatReport]
    corruptions: dict[str, list[float]]
    key: dict[str, Any]
    bounds: tuple[float, float]
    versions: dict[str, str]
    device: str
    precision: str

    @property
    def corruption_accuracy(self) -> float | None:
        """The mean over all corruptions and severities, or None if there are none."""
        return float(np.mean(list(self.corruptions.values()))) if self.corruptions else None

    @property
    def alarms(self) -> tuple[str, ...]:
        """The checks of the report card that failed, with what they mean."""
        return tuple(
            f"{name}: {check.name}: {check.meaning}"
            for name, threat in self.threats.items()
            for check in threat.checks
            if check.verdict == "flag"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers.

        With one norm as the threat, RobustBench's names beside them; its "autoattack_acc" stands
        for the standard suite alone.
        """
        return {
            **self._robustbench(),
            "images": self.images,
            "suite": self.suite,
            "key": self.key,
            "bounds": self.bounds,
            "versions": self.versions,
            "device": self.device,
            "precision": self.precision,
            "clean_accuracy": self.clean,
            "robust_accuracy": self.worst_case,
            "corruptions_acc": self.corruption_accuracy,
            "corruptions": self.corruptions,
            "alarms": list(self.alarms),
            "threats": {name: _plain(threat) for name, threat in self.threats.items()},
        }

    def _robustbench(self):
        threat, *others = self.threats.values()
        if others or not threat.curve:
            return {}
        figure = {"autoattack_acc": f"{100 * self.worst_case[0]:.2f}"}
        return {
            "clean_acc": f"{100 * self.clean[0]:.2f}",
            **(figure if self.suite == "standard" else {}),
            "eps": threat.eps,
            "threat_model": threat.norm.capitalize(),
        }

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, whole or not at all."""
        atomic_write(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draws accuracy against eps, after each attack, by class, and under corruptions.

        Raises:
            ImportError: matplotlib is not installed.
        """
        drawing.draw(self, path)

    def __str__(self) -> str:
        """A table, and every check that does not pass."""
        lines = [
            f"{self.images} images, suite {self.suite!r}; accuracies in % with 95 % intervals",
            f"{'clean':24}{_interval(self.clean)}",
        ]
        for name, threat in self.threats.items():
            # Of an attack, eps is in a unit of its own: a share of its grid, or a pixel's range.
            shown = f"{name} {threat.eps:.4g}" if threat.curve else name
            lines.append(f"{shown:24}{_interval(threat.accuracy)}")
            before = threat.stages["clean"]
            for attack, after in list(threat.stages.items())[1:]:
                lines.append(
                    f"  {attack:22}{100 * after:5.1f}   broke {100 * (before - after):4.1f} points "
                    f"in {threat.seconds[attack]:.1f} s, {threat.flops[attack] / 1e12:.3g} TFLOP"
                )
                before = after
            lines += [f"  note: {note}" for note in threat.notes]
            if threat.checks:
                lines.append(
                    f"  {threat.applied} of {len(threat.checks)} checks of the gradients applied, "
                    f"on {threat.card_images} images"
                )
        lines.append(f"{'worst case':24}{_interval(self.worst_case)}")
        for name, accuracies in self.corruptions.items():
            shown = " ".join(f"{100 * accuracy:5.1f}" for accuracy in accuracies)
            lines.append(f"  {name:22}{shown}   at severities 1 to 5")
        if self.corruptions:
            lines.append(f"{'corruptions, mean':24}{100 * self.corruption_accuracy:5.1f}")
        lines += [f"ALARM {alarm}" for alarm in self.alarms]
        cards = [threat.card_images for threat in self.threats.values() if threat.checks]
        if cards and not self.alarms:
            lines.append(
                "no sign of masked gradients in any check that applied"
                if min(cards) >= ENOUGH
                else f"too few images to tell whether gradients are masked: {ENOUGH} would do"
            )
        lines.append(
            ", ".join(f"{name} {version}" for name, version in self.versions.items())
            + f", on {self.device}, {self.precision} precision, key {self.key['data']}"
        )
        return "\n".join(lines)


def _interval(accuracy):
    estimate, low, high = (100 * value for value in accuracy)
    return f"{estimate:5.1f}   [{low:.1f}, {high:.1f}]"


def _plain(threat):
    """A threat's figures for JSON; per-example flags as lists."""
    fields = {field.name: getattr(threat, field.name) for field in dataclasses.fields(threat)}
    fields["robust"] = threat.robust.tolist()
    fields["broken_by"] = threat.broken_by.tolist()
    fields["checks"] = [{**check._asdict(), "verdict": check.verdict} for check in threat.checks]
    return fields
