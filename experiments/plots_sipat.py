"""Tables and plots of the SIP-AT experiment, drawn from its results file."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from experiments import mixtures, records
from experiments.common import markdown
from experiments.plots import read, rows_of, spread
from experiments.sipat_settings import is_control
from jaxrobust import metrics

# What a row is: its colour in the plots, by the beginning of its name.
KINDS = {
    "standard": ("#7f7f7f", "standard"),
    "at": ("#1f77b4", "AT, also at smaller eps"),
    "trades": ("#17becf", "TRADES"),
    "sip": ("#d62728", "SIP-AT"),
    "random": ("#2ca02c", "control: random pixels"),
    "least": ("#bcbd22", "control: least salient pixels"),
    "inverted": ("#9467bd", "control: inverted mask"),
    "part": ("#8c564b", "PART's choice"),
    "half": ("#ff7f0e", "salient pixels at half eps"),
}

# Rows of the README's table.
QUOTED = (
    "standard", "at", "trades", "at_eps_83", "at_eps_67", "at_eps_50", "sip_gradient_20",
    "random_20", "least_20", "inverted_20", "sip_gradient_50", "random_50", "sip_human",
    "random_human", "sip_falling_50", "random_falling_50", "part_human", "random_part_human",
)  # fmt: skip

# Whose pictures are shown.
CREDITS = {
    "cutouts": "Twemoji, copyright 2020 Twitter, Inc and other contributors, CC-BY 4.0; "
    "photographs as carried by foolbox",
    "stamps": "Tux Paint's stamps, by its contributors, GPL-2+; photographs as carried by foolbox",
}


def kind_of(method: str) -> tuple[str, str]:
    """Colour and label of a method."""
    return KINDS[method.split("_")[0]]


def readme_table(path: Path) -> str:
    """The rows that the README quotes; the file holds more."""
    return table(path, QUOTED)


def table(path: Path, methods: Collection[str] = ()) -> str:
    """The Markdown table of a results file: one row per data set and method, all by default."""
    record = read(path)
    config, rows = record["config"], rows_of(record, "dataset", "method")
    parts = []
    for dataset, problem in config["problems"].items():
        grid = [eps_text(eps) for eps in problem["grid"]]
        suite = [f"suite at {eps_text(eps)}" for eps in problem["suite_eps"]]
        header = [dataset, "clean %", *grid, *suite, "salience only", "background only", "seeds"]
        lines = []
        for method in methods or config["methods"]:
            cells = rows.get((dataset, method))
            if not cells:
                lines.append([method, *["not run"] * (len(header) - 1)])
                continue
            judged = [cell["suite_accuracy"] for cell in cells if "suite_accuracy" in cell]
            lines.append(
                [
                    method,
                    spread([cell["clean_accuracy"] for cell in cells]),
                    *columns([cell[f"pgd{config['pgd_steps']}_accuracy"] for cell in cells]),
                    *(columns(judged) if judged else [""] * len(suite)),
                    spread([cell["salience_only_accuracy"] for cell in cells]),
                    spread([cell["background_only_accuracy"] for cell in cells]),
                    str(len(cells)),
                ]
            )
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def outcomes_of(record: dict, dataset: str) -> dict[str, np.ndarray]:
    """[seeds, 1 + grid, images] of every method of a data set that has all its seeds."""
    rows, seeds = rows_of(record, "dataset", "method"), len(record["config"]["seeds"])
    return {
        method: np.stack([records.unpacked(cell["outcomes"], cell["images"]) for cell in cells])
        for (where, method), cells in rows.items()
        if where == dataset and len(cells) == seeds
    }


def verdict(path: Path) -> str:
    """What each setting gains over AT, and whether it lies above all controls.

    Differences in points with bootstrap 95 % intervals, paired over images and pooled over seeds.
    """
    record = read(path)
    parts = []
    for dataset, problem in record["config"]["problems"].items():
        outcomes = outcomes_of(record, dataset)
        if "at" not in outcomes:
            continue
        controls = {name: found for name, found in outcomes.items() if is_control(name)}
        grid = [eps_text(eps) for eps in problem["grid"]]
        header = [dataset, "clean, to AT", *(f"{eps}, to AT" for eps in grid[:2])]
        header += [f"{eps}, to the controls" for eps in grid]
        lines = []
        for method, found in outcomes.items():
            if is_control(method):
                continue
            gains = [
                metrics.paired_bootstrap(found[:, row], outcomes["at"][:, row]) for row in range(3)
            ]
            margins = [mixtures.margin(found, controls, row) for row in range(1, 1 + len(grid))]
            above = [points(m.interval) + (" **above**" if m.above else "") for m in margins]
            lines.append([method, *map(points, gains), *above])
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def follow_up(path: Path) -> str:
    """The settings above all controls once more: corrected, and on the seeds that did not choose.

    Every setting was compared at every eps, so some are above by luck; and who looked at the first
    seed to decide what to run has used it up. Intervals as in `verdict`.
    """
    record = read(path)
    lines = []
    for dataset, problem in record["config"]["problems"].items():
        outcomes = outcomes_of(record, dataset)
        controls = {name: found for name, found in outcomes.items() if is_control(name)}
        settings = {name: found for name, found in outcomes.items() if name not in controls}
        comparisons = len(settings) * len(problem["grid"])
        for name, found in settings.items() if controls else ():
            for row, eps in enumerate(problem["grid"], 1):
                once = mixtures.margin(found, controls, row)
                if not once.above:
                    continue
                corrected = mixtures.margin(
                    found, controls, row, comparisons=comparisons, resamples=24_000
                )
                later = {control: of[1:] for control, of in controls.items()}
                others = (
                    points(mixtures.margin(found[1:], later, row).interval)
                    if len(found) > 1
                    else "not run"
                )
                lines.append(
                    [dataset, name, eps_text(eps), points(once.interval),
                     points(corrected.interval), others]
                )  # fmt: skip
    header = [
        "above the controls", "setting", "eps", "by", "corrected for all comparisons",
        "on the seeds after the first",
    ]  # fmt: skip
    return markdown(header, lines)


def beside_suite(path: Path) -> str:
    """PGD and AutoAttack on the same images, where AutoAttack was run; means over seeds."""
    record = read(path)
    config, parts = record["config"], []
    for dataset, problem in config["problems"].items():
        places = [1 + problem["grid"].index(eps) for eps in problem["suite_eps"]]
        eps = [eps_text(eps) for eps in problem["suite_eps"]]
        lines = []
        for (where, method), cells in rows_of(record, "dataset", "method").items():
            if where != dataset or not all("suite_accuracy" in cell for cell in cells):
                continue
            curves = [records.unpacked(cell["outcomes"], cell["images"]) for cell in cells]
            few = config["suite_images"]
            pgd = 100 * np.mean([curve[places, :few].mean(1) for curve in curves], 0)
            suite = 100 * np.mean([cell["suite_accuracy"] for cell in cells], 0)
            lines.append([method, *(f"{v:.1f}" for v in (*pgd, *suite, *(pgd - suite)))])
        header = [dataset]
        for what in (f"PGD-{config['pgd_steps']}", "AutoAttack", "lost"):
            header += [f"{what}, {one}" for one in eps]
        if lines:
            parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def above(record: dict, dataset: str, row: int) -> str:
    """The settings that lie above every mixture of controls beyond doubt, in words."""
    outcomes = outcomes_of(record, dataset)
    controls = {name: found for name, found in outcomes.items() if is_control(name)}
    if not controls:
        return "not run"
    found = [
        name
        for name in outcomes
        if name not in controls and mixtures.margin(outcomes[name], controls, row).above
    ]
    return ", ".join(found) or "none"


def points(interval: metrics.Interval) -> str:
    """+1.2 (0.4 to 2.0), in points of accuracy."""
    mean, low, high = (f"{100 * value:.1f}" for value in interval)
    return f"{'' if mean.startswith('-') else '+'}{mean} ({low} to {high})"


def columns(values: list[list[float]]) -> list[str]:
    """Mean and spread over seeds, column by column."""
    return [spread(list(column)) for column in zip(*values, strict=True)]


def eps_text(eps: float) -> str:
    """8/255 where it is a small whole number of grey levels, else the number."""
    levels = eps * 255
    whole = levels < 20 and abs(levels - round(levels)) < 1e-6
    return f"{levels:.0f}/255" if whole else f"{eps:g}"


def curves(path: Path) -> None:
    """Unmasked accuracy against eps, one panel per data set, mean over seeds."""
    record = read(path)
    rows, datasets = rows_of(record, "dataset", "method"), list(record["config"]["problems"])
    accuracy = f"pgd{record['config']['pgd_steps']}_accuracy"
    figure, axes = panels(len(datasets))
    for axis, dataset in zip(axes, datasets, strict=True):
        for (where, method), cells in rows.items():
            if where != dataset:
                continue
            values = [[cell["clean_accuracy"], *cell[accuracy]] for cell in cells]
            colour, _ = kind_of(method)
            eps = [0.0, *cells[0]["grid"]]
            axis.plot(eps, 100 * np.mean(values, 0), ".-", color=colour, alpha=0.7, lw=1)
        axis.set(xlabel="eps (linf)", ylabel="unmasked accuracy, %", ylim=(0, 100), title=dataset)
        axis.grid(alpha=0.3)
    _legend(axes[-1])
    _write(figure, path, "curve")


def frontier(path: Path) -> None:
    """Clean against robust accuracy at the smallest and at the largest eps of the grid."""
    record = read(path)
    rows, datasets = rows_of(record, "dataset", "method"), list(record["config"]["problems"])
    accuracy = f"pgd{record['config']['pgd_steps']}_accuracy"
    figure, axes = panels(2 * len(datasets))
    places = [(dataset, at) for dataset in datasets for at in (0, -1)]
    for axis, (dataset, at) in zip(axes, places, strict=True):
        grid = record["config"]["problems"][dataset]["grid"]
        found = {
            method: 100 * np.array([[c["clean_accuracy"], c[accuracy][at]] for c in cells])
            for (where, method), cells in rows.items()
            if where == dataset and method != "standard"
        }
        means = {method: values.mean(0) for method, values in found.items()}
        for method, values in found.items():
            (x, y), (dx, dy) = means[method], map(_error, values.T)
            axis.errorbar(x, y, xerr=dx, yerr=dy, fmt="o", color=kind_of(method)[0], ms=4)
            if not any((other > means[method]).all() for other in means.values()):
                axis.annotate(method, (x, y), fontsize=5, alpha=0.8, clip_on=True)
        reached = mixtures.boundary(*np.array([means[m] for m in means if is_control(m)]).T)
        axis.plot(*reached.T, color="#555555", lw=0.8, ls="--")
        low, high = reached[:, 1].min(), reached[:, 1].max()
        span, best = max(high - low, 3), max(mean[1] for mean in means.values())
        axis.set_ylim(low - 0.6 * span, max(best, high) + 0.2 * span)
        axis.margins(x=0.15)
        title = f"{dataset}: above all controls, {above(record, dataset, at % len(grid) + 1)}"
        axis.set_title(title, fontsize=8)
        axis.set(xlabel="clean accuracy, %", ylabel=f"PGD at {eps_text(grid[at])}, %")
        axis.grid(alpha=0.3)
    _legend(axes[-1])
    figure.suptitle(
        "Named is what nothing beats in both; what lies far below is cut off", fontsize=8
    )
    _write(figure, path, "frontier")


def pictures(path: Path, dataset: str, images, maps, spared, plain) -> None:
    """Images, maps, and the magnified perturbations with the salient pixels spared and without.

    Args:
        path: of the results file, beside which the picture is written.
        dataset: its name, whose art is credited below the picture.
        images: [n, h, w, c] in [0, 1].
        maps: [n, h, w, 1], 1 where a pixel is spared.
        spared: [n, h, w, c] perturbations of the masked attack.
        plain: likewise, of the attack without a mask.
    """
    rows = {"image": images, "spared": maps}
    for name, delta in (("masked\nperturbation", spared), ("unmasked\nperturbation", plain)):
        delta = np.asarray(delta)
        rows[name] = 0.5 + 0.5 * delta / max(float(np.abs(delta).max()), 1e-9)
    from matplotlib.figure import Figure

    figure = Figure((1.3 * len(images), 1.35 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for line, (name, shown) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=7)
        for axis, picture in zip(line, np.asarray(shown), strict=True):
            picture = np.repeat(picture, 3, -1) if picture.shape[-1] == 1 else picture
            axis.imshow(np.clip(picture, 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    if dataset in CREDITS:
        figure.supxlabel(CREDITS[dataset], fontsize=5)
    _write(figure, path, f"pictures-{dataset}")


def _error(values):
    """The standard error over seeds, 0 for one."""
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0


def panels(count: int):
    """A figure with some axes in a row."""
    from matplotlib.figure import Figure

    figure = Figure((4.8 * count, 3.8), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _legend(axis):
    for colour, label in KINDS.values():
        axis.plot([], [], "o", color=colour, label=label)
    axis.plot([], [], "--", color="#555555", lw=0.8, label="what the controls reach")
    axis.legend(fontsize=6)


def _write(figure, path, what):
    target = path.with_name(f"{path.stem}-{what}.png")
    records.once(target, lambda file: figure.savefig(file, dpi=110))
