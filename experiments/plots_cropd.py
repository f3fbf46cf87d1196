"""Table and plot of the CRoPD experiment, drawn from its results file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from experiments import records
from experiments.common import markdown
from experiments.cropd_settings import applies
from experiments.plots import read, rows_of, seeds_of, spread
from experiments.plots_sipat import eps_text, panels, points
from jaxrobust import metrics

COSTLY = ("alf", "aff")
ALPHA = 0.001  # of `smoothing.certify`, which the experiment leaves as it is
BOUND = {
    "clean_loss": "clean loss",
    "adversarial_loss": "measured adversarial loss",
    "bound": "bound: clean loss + K L displacement",
}
TERMS = {
    "clean_loss": "clean loss", "adversarial_loss": "adversarial loss",
    "displacement": "displacement of the code", "head": "K, of the head",
    "lipschitz": "L, along the attack", "bound": "clean loss + K L displacement",
}  # fmt: skip


def table(path: Path, *, every: bool = True) -> str:
    """The Markdown table: one row per data set and method, what was not run said so.

    Without `every`, what was not run is named in one line instead.
    """
    record = read(path)
    config = record["config"]
    parts = []
    for dataset in config["problems"]:
        found = run_rows(record, dataset)
        names = methods_of(config, dataset)
        missing = [name for name in names if name not in found]
        if not found and not every:
            parts.append(f"{dataset}: not run.")
            continue
        header = list(next(iter(found.values()), {"clean %": ""}))
        shown = {name: list(row.values()) for name, row in found.items()}
        if every:
            shown |= {name: ["not run"] * len(header) for name in missing}
        lines = [[name, *shown[name]] for name in names if name in shown]
        parts.append(markdown([title(config, dataset), *header], lines))
        if missing and not every:
            parts.append(f"Not run there: {', '.join(missing)}.")
    return "\n\n".join(parts)


def readme_table(path: Path) -> str:
    """The rows that were run, the others named, the verdict, and the certificates."""
    parts = table(path, every=False), verdict(path), certificates(path), bound_table(path)
    return "\n\n".join(filter(None, parts))


def certificates(path: Path) -> str:
    """What randomized smoothing with a denoiser in front certifies; "" where it was not run."""
    record = read(path)
    rows = rows_of(record, "dataset", "method")
    found = {
        key: held
        for key, cells in rows.items()
        if (held := [cell for cell in cells if "certified_accuracy" in cell])
    }
    if not found:
        return ""
    samples = record["config"]["certify_samples"]
    radii = sorted(
        {radius for cells in found.values() for cell in cells for radius in cell["radii"]}
    )
    lines = []
    for (dataset, method), cells in found.items():
        sigma = record["config"]["methods"][method]["sigma"]
        reach = sigma * ndtri(ALPHA ** (1 / samples))
        lines.append([dataset, method, f"{sigma:g}", *(held_at(cells, r, reach) for r in radii)])
    header = ["certified, l2", "", "sigma", *(f"radius {radius:g}, %" for radius in radii)]
    return markdown(header, lines)


def held_at(cells: list[dict], radius: float, reach: float) -> str:
    """Certified accuracy at a radius, mean over seeds; no sample can tell beyond its reach."""
    if radius > reach:
        return "beyond reach"
    shares = [dict(zip(c["radii"], c["certified_accuracy"], strict=True)) for c in cells]
    held = [share[radius] for share in shares if radius in share]
    return f"{100 * np.mean(held):.1f}" if held else ""


def methods_of(config: dict, dataset: str) -> list[str]:
    """The methods that are run on a data set."""
    problem = config["problems"][dataset]
    return [name for name, method in config["methods"].items() if applies(problem, method)]


def run_rows(record: dict, dataset: str) -> dict[str, dict[str, str]]:
    """Columns of the methods that were run on a data set, in the configuration's order."""
    config, rows = record["config"], rows_of(record, "dataset", "method")
    return {
        name: columns(rows[dataset, name], config["pgd_steps"])
        for name in config["methods"]
        if (dataset, name) in rows
    }


def title(config: dict, dataset: str) -> str:
    """A data set and its threat."""
    return f"{dataset}, linf {eps_text(config['problems'][dataset]['eps'])}"


def columns(cells: list[dict], steps: int) -> dict[str, str]:
    """A row's figures by column: mean and spread over seeds, medians of costs."""
    of = lambda name: [cell[name] for cell in cells if name in cell]  # noqa: E731
    pgd = [found[1] for found in of(f"pgd{steps}_accuracy")]
    robust, flops, seconds = of("robust_accuracy"), of("train_flops"), of("train_seconds")
    alarms = sorted({flag for flags in of("card_flags") for flag in flags})
    parameters, swapped = of("parameters"), of("swap_in_accuracy")
    return {
        "clean %": spread(of("clean_accuracy")),
        f"PGD-{steps} %": spread(pgd),
        "worst case %": spread(robust) if robust else "not run",
        "non-adaptive % (says nothing)": spread(of("nonadaptive_accuracy")),
        "with the bare model's head: clean, PGD %": (
            " / ".join(spread(column) for column in zip(*swapped, strict=True)) if swapped else ""
        ),
        "alarms": ", ".join(alarms) if of("card_flags") else "not run",
        "training TFLOP": f"{np.median(flops) / 1e12:.1f}" if flops else "0",
        "s, as it ran": f"{np.median(seconds):.0f}" if seconds else "",
        "trained parameters": f"{np.median(parameters) / 1e3:,.0f} k" if parameters else "0",
        "seeds": str(len(cells)),
    }


def outcomes_of(cells: list[dict], row: int | None) -> np.ndarray:
    """[seeds, images]: a row of the PGD curve, 0 for clean; None for the worst case."""
    if row is None:
        return np.stack([records.unpacked(c["robust_outcomes"], c["images"])[0] for c in cells])
    return np.stack([records.unpacked(c["outcomes"], c["images"])[row] for c in cells])


def verdict(path: Path) -> str:
    """Each pre-processor beside the denoiser of equal size, the bare model, and fine-tuning.

    Differences in points, with bootstrap 95 % intervals paired over images and pooled over the
    seeds that the two compared have: under PGD at the problem's eps for every row, and in the
    worst case where the suite was run for both. FLOPs are medians over a row's own seeds. Seconds
    are compared by `bench_cropd`, in one process: cells are trained side by side.
    """
    record = read(path)
    config = record["config"]
    rows = seeds_of(record, "dataset", "method")
    parts = []
    for dataset in config["problems"]:
        cells = {name: rows[where, name] for where, name in rows if where == dataset}
        if not {"none", "gaussian_dae"} <= set(cells):
            continue
        bare, denoiser = cells["none"], cells["gaussian_dae"]
        lines = []
        for method in config["methods"]:
            found = cells.get(method, {})
            if config["methods"][method]["kind"] != "autoencoder" or not found:
                continue
            wide = config["methods"][method]["wide"]
            equal = cells.get("gaussian_dae_wide", {}) if wide else denoiser
            rivals = ((2, equal), (None, equal), (None, bare), (0, bare))
            gains = [gain(found, other, row) for row, other in rivals]
            shared = (str(len(set(found) & set(other))) for other in (equal, bare))
            cost = share(found, cells.get("aff"), "train_flops")
            lines.append([method, *gains, cost, " / ".join(shared)])
        header = [
            dataset, f"PGD-{config['pgd_steps']}, to the denoiser", "worst case, to the denoiser",
            "worst case, to the bare model", "clean, to the bare model",
            f"FLOPs of AFF's (PGD-{config['rival_steps']})", "seeds, denoiser / bare",
        ]  # fmt: skip
        if lines:
            parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def gain(cells: dict, rivals: dict, row: int | None) -> str:
    """A difference in points, if both were measured so on some seed; rows as of `outcomes_of`."""
    seeds = sorted(set(cells) & set(rivals))
    ours, theirs = ([some[seed] for seed in seeds] for some in (cells, rivals))
    if not seeds:
        return "not run"
    if row is None and not all("robust_outcomes" in cell for cell in (*ours, *theirs)):
        return "not run"
    return points(metrics.paired_bootstrap(outcomes_of(ours, row), outcomes_of(theirs, row)))


def share(cells: dict, rivals: dict | None, name: str) -> str:
    """What a row costs as a share of what fine-tuning all of the model costs, in percent."""
    if not rivals:
        return "not run"
    ours, theirs = (np.median([cell[name] for cell in some.values()]) for some in (cells, rivals))
    return f"{100 * ours / theirs:.0f} %"


def bound_table(path: Path) -> str:
    """The terms of the bound, mean over images and seeds; "" where none was measured."""
    record = read(path)
    lines = [
        [dataset, method, *(f"{value:.3g}" for value in means_of(cells, TERMS).values())]
        for (dataset, method), cells in rows_of(record, "dataset", "method").items()
        if all("bound" in cell for cell in cells)
    ]
    return markdown(["bound, in nats", "", *TERMS.values()], lines) if lines else ""


def means_of(cells: list[dict], names: Iterable[str]) -> dict[str, float]:
    """Terms of the bound, mean over seeds of means over images."""
    return {name: float(np.mean([cell["bound"][name] for cell in cells])) for name in names}


def run_sets(config: dict, rows: dict) -> list[str]:
    """The data sets of which some row was run."""
    return [name for name in config["problems"] if any(name == where for where, _ in rows)]


def bound(path: Path) -> None:
    """Both sides of the bound, mean over images and seeds, per auto-encoder and data set."""
    record = read(path)
    rows = rows_of(record, "dataset", "method")
    names = run_sets(record["config"], rows)
    if not names:
        return
    figure, axes = panels(len(names))
    for axis, dataset in zip(axes, names, strict=True):
        found = {
            method: means_of(cells, BOUND)
            for (where, method), cells in rows.items()
            if where == dataset and all("bound" in c for c in cells)
        }
        places = np.arange(len(found))
        for number, (name, label) in enumerate(BOUND.items()):
            height = [values[name] for values in found.values()]
            axis.barh(places + 0.27 * (1 - number), height, 0.25, label=label)
        axis.set(yticks=places, xscale="log", xlabel="nats", title=dataset)
        axis.set_yticklabels(list(found), fontsize=6)
    axes[0].legend(fontsize=6)
    figure.suptitle("The bound with its factor L measured along the attack: no certificate", size=8)
    records.once(path.with_name(f"{path.stem}-bound.png"), lambda p: figure.savefig(p, dpi=110))


def frontier(path: Path) -> None:
    """Robust against clean accuracy of every row, one panel per data set, beside the JSON."""
    record = read(path)
    config, rows = record["config"], rows_of(record, "dataset", "method")
    steps, names = config["pgd_steps"], run_sets(config, rows)
    if not names:
        return
    figure, axes = panels(len(names))
    judged_rows = {key for key, cells in rows.items() if all("robust_accuracy" in c for c in cells)}
    for axis, dataset in zip(axes, names, strict=True):
        plain = not any(where == dataset for where, _ in judged_rows)
        for number, method in enumerate(config["methods"]):
            cells = rows.get((dataset, method), [])
            if not cells:
                continue
            clean = [100 * c["clean_accuracy"] for c in cells]
            judged = (dataset, method) in judged_rows
            robust = [
                100 * (c["robust_accuracy"] if judged else c[f"pgd{steps}_accuracy"][1])
                for c in cells
            ]
            marker = "s" if method in COSTLY else "o"
            style = {
                "marker": marker,
                "linestyle": "none",
                "capsize": 2,
                "color": f"C{number % 10}",
            }
            style["fillstyle"] = "full" if judged else "none"
            named = judged or plain
            if not named:  # a sweep beside what was judged: where it lies says enough
                style["color"] = "0.7"
            bars = [np.std(seeds, ddof=1) if len(seeds) > 1 else None for seeds in (robust, clean)]
            axis.errorbar(np.mean(clean), np.mean(robust), *bars, **style)
            if named:
                axis.annotate(method, (np.mean(clean), np.mean(robust)), fontsize=6)
        axis.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", title=dataset)
        axis.grid(alpha=0.3)
    title = (
        "Squares train the foundation model's head or all of it; filled: worst case over all "
        f"attacks, hollow: PGD-{steps} alone"
    )
    figure.suptitle(title, fontsize=8)
    records.once(path.with_name(f"{path.stem}-frontier.png"), lambda p: figure.savefig(p, dpi=110))
