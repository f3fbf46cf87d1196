"""The picture of a report: accuracy against eps, after each attack, by class, and corrupted."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.data.packages import require
from jaxrobust.files import atomic_write

_WIDTH, _HEIGHT = 4.8, 3.6  # inches of a panel


def draw(report: Any, path: str | Path) -> None:
    """Draws a `Report` into a file of the kind that its name says (.png, .pdf, .svg).

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", "matplotlib", "the plot of a report")
    curves = [threat for threat in report.threats.values() if threat.curve]
    panels = [(_curve, threat) for threat in curves] + [(_stages, report), (_classes, report)]
    if report.corruptions:
        panels.append((_corruptions, report))
    figure = figure_module.Figure((_WIDTH * len(panels), _HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (panel, shown) in zip(axes, panels, strict=True):
        panel(axis, shown)
    title = f"{report.images} images, suite {report.suite!r}"
    figure.suptitle(f"{title}: {len(report.alarms)} ALARM" if report.alarms else title)
    path, content = Path(path), io.BytesIO()
    figure.savefig(content, format=path.suffix[1:] or "png", dpi=120)
    atomic_write(path, content.getvalue())


def _curve(axis, threat):
    """PGD's curve, which is an upper bound, and the suite's figure at its eps."""
    eps, accuracy = np.asarray(threat.curve["eps"]), np.asarray(threat.curve["accuracy"])
    axis.plot(eps, 100 * accuracy, marker="o", label="PGD-20, upper bound")
    middle, low, high = (100 * value for value in threat.accuracy)
    error = [[middle - low], [high - middle]]
    axis.errorbar([threat.eps], [middle], yerr=error, fmt="s", capsize=3, label="suite, 95 %")
    axis.set(xlabel=f"eps, {threat.norm}", ylabel="accuracy, %", ylim=(0, 100))
    axis.set_title(threat.norm)
    axis.grid(alpha=0.3)
    axis.legend()


def _stages(axis, report):
    """What still holds after each attack of each threat."""
    names, values = [], []
    for name, threat in report.threats.items():
        for stage, accuracy in threat.stages.items():
            names.append(stage if stage == name else f"{name}: {stage}")
            values.append(100 * accuracy)
    axis.barh(names, values)
    axis.invert_yaxis()
    axis.set(xlabel="accuracy, %", xlim=(0, 100), title="after each attack")


def _classes(axis, report):
    """Robust accuracy of each class."""
    for name, threat in report.threats.items():
        shares = [np.nan if share is None else 100 * share for share in threat.per_class]
        axis.plot(np.arange(len(shares)), shares, marker=".", linestyle="", label=name)
    axis.set(xlabel="class", ylabel="robust accuracy, %", ylim=(-2, 102), title="by class")
    axis.grid(alpha=0.3)
    axis.legend()


def _corruptions(axis, report):
    """Accuracy by corruption and severity."""
    table = 100 * np.asarray(list(report.corruptions.values()))
    picture = axis.imshow(table, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(table)), report.corruptions, fontsize="small")
    axis.set_xticks(range(table.shape[1]), range(1, table.shape[1] + 1))
    axis.set(xlabel="severity", title="accuracy under corruptions, %")
    axis.figure.colorbar(picture, ax=axis)
