"""Tables and plots of the SAFECLIP experiment, drawn from its results file."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import records
from experiments.common import markdown, percent
from experiments.plots import read, rows_of, seeds_of, spread
from experiments.plots_sipat import panels
from experiments.safeclip_choice import (
    KINDS,
    bars,
    chosen,
    excess,
    on_canaries,
    recall,
    share_of,
    stale,
)
from experiments.safeclip_choice import usefulness as usefulness_of
from experiments.safeclip_settings import CANARIES, CHOSEN, NOTHING, UNDEFENDED, Config
from jaxrobust.data.pairs import Pairs
from jaxrobust.metrics import wilson_interval
from jaxrobust.safeclip import triggers

ENOUGH, LITTLE, USEFUL = 0.8, 0.1, 0.9
COLUMNS = (
    "success %", "Wilson, all seeds", "unpoisoned %", "triggered, true class %",
    "zero-shot top-1 / 5 %", "other style, top-1 %", "retrieval R@5 %", "probe %",
    "poisons kept %", "AUROC", "s per epoch", "seeds",
)  # fmt: skip
QUOTED = (
    "success %", "Wilson, all seeds", "unpoisoned %", "zero-shot top-1 / 5 %", "retrieval R@5 %",
    "poisons kept %", "seeds",
)  # fmt: skip
PUBLISHED = "safeclip_fixed"
CREDIT = "Emoji: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0"


def table(path: Path) -> str:
    """One row per attack and method; what was not run is said so."""
    record = read(path)
    config, rows = record["config"], rows_of(record, "attack", "method")
    header = ["attack", "training", *COLUMNS]

    def line(attack: str, method: str) -> list[str]:
        cells = rows.get((attack, method))
        found = columns(cells) if cells else ["not run"] * len(COLUMNS)
        return [attack, method, *found]

    attacks, candidates = config["attacks"], config.get("candidates", ())
    lines = [
        line(a, m)
        for a in attacks
        if a != CANARIES
        for m in config["methods"]
        if a != NOTHING or (a, m) in rows  # where few were meant to be run
    ]
    parts = [markdown(header, lines)]
    tuned = [line(CANARIES, name) for name in candidates]
    if tuned:
        kinds = [*header]
        kinds[2] = "success, targets / triggered %"
        parts.append(markdown(kinds, tuned))
    single = [line(a, name) for a in config.get("ablated", ()) for name in candidates]
    if single:
        parts.append(markdown(header, single))
    return "\n\n".join(parts)


def readme_table(path: Path) -> str:
    """What was run, in fewer columns, the verdict and the choice; the other rows are named."""
    record = read(path)
    config, rows = record["config"], rows_of(record, "attack", "method")
    lines, missing = [], defaultdict(list)
    for attack in config["attacks"]:
        if attack == CANARIES:
            continue
        absent = []
        for method in config["methods"]:
            if (attack, method) in rows:
                found = dict(zip(COLUMNS, columns(rows[attack, method]), strict=True))
                lines.append([attack, method, *(found[name] for name in QUOTED)])
            elif attack != NOTHING:  # where few were meant to be run
                absent.append(method)
        missing[tuple(absent)].append(attack)
    parts = [markdown(["attack", "training", *QUOTED], lines), verdict(path), choice(path)]
    parts += [
        f"Not run against {', '.join(attacks)}: {', '.join(absent)}."
        for absent, attacks in missing.items()
        if absent
    ]
    return "\n\n".join(filter(None, parts))


def choice(path: Path) -> str:
    """How each candidate fared against the canaries, the chosen one in bold; "" without any.

    The first of them change the published setting, one thing at a time: its ablations.
    """
    record = read(path)
    candidates, limit = record["config"].get("candidates", ()), record["config"].get("limit")
    met = on_canaries(record["cells"], candidates)
    if not met:
        return ""
    allowed, best = bars(met, limit), chosen(record["cells"], candidates, limit)
    lines = []
    for name in candidates:
        if name not in met:
            lines.append([name, *["not run"] * 5])
            continue
        found = met[name]
        rates = (percent(share_of(found, kind)["estimate"]) for kind in KINDS)
        lines.append(
            [
                f"**{name}**" if name == best else name, " / ".join(rates),
                "yes" if excess(found, allowed) <= 0 else "no",
                percent(found["zero_shot"]["top1"]), percent(recall(found)),
                percent(usefulness_of(found)),
            ]
        )  # fmt: skip
    most = " / ".join(percent(allowed[kind]) for kind in KINDS)
    header = [
        "candidate, on canaries, one seed", "success, targets / triggered %",
        f"at most {most}", "zero-shot top-1 %", "retrieval R@5 %", "mean of both",
    ]  # fmt: skip
    parts = [markdown(header, lines)]
    if other := stale(record["cells"], candidates, limit):
        parts.append(f"**Rows of {CHOSEN} were trained as {', '.join(other)}, not as {best}.**")
    return "\n\n".join(parts)


def columns(cells: list[dict]) -> list[str]:
    """A row's figures, mean and spread over seeds."""
    kinds = [kind for kind in KINDS if kind in cells[0]]
    shares = {kind: [share_of(cell, kind) for cell in cells] for kind in kinds}
    pooled = [interval(found) for found in shares.values()]
    # A split comes after what was taken out before training, and has the last word.
    last = [cell | (cell.get("history") or [{}])[-1] for cell in cells]
    leaks = [cell["leak"]["successes"] / cell["planted"] for cell in last if "leak" in cell]
    base = [[share_of(cell["base"], kind)["estimate"] for cell in cells if "base" in cell]
            for kind in kinds]  # fmt: skip
    areas = [cell["auroc"] for cell in last if "auroc" in cell]
    truth = [cell["backdoor"]["accuracy"]["estimate"] for cell in cells if "backdoor" in cell]
    tops = [spread([cell["zero_shot"][f"top{k}"] for cell in cells]) for k in (1, 5)]
    return [
        " / ".join(spread([share["estimate"] for share in found]) for found in shares.values()),
        " / ".join(f"{percent(low)} to {percent(high)}" for low, high in pooled),
        " / ".join(spread(found) for found in base if found),
        spread(truth) if truth else "",
        " / ".join(tops),
        optional(cells, "zero_shot_style", lambda found: found["top1"]),
        spread([recall(cell) for cell in cells]),
        optional(cells, "linear_probe", float),
        spread(leaks) if leaks else "",
        f"{np.mean(areas):.2f}" if areas else "",
        f"{np.median([cell['epoch_seconds'] for cell in cells]):.1f}",
        str(len(cells)),
    ]


def optional(cells: list[dict], name: str, of: Callable[[Any], float]) -> str:
    """The spread of a figure that not every data set has."""
    return spread([of(cell[name]) for cell in cells]) if name in cells[0] else ""


def interval(shares: list[dict]) -> tuple[float, float]:
    """Wilson's interval of the counts of all seeds together."""
    _, low, high = wilson_interval(
        sum(share["successes"] for share in shares), sum(share["n"] for share in shares)
    )
    return low, high


def verdict(path: Path) -> str:
    """Whether attacks work on the undefended network, and what each defence leaves and costs.

    A defence counts only where the attack succeeds without one, on every seed. Usefulness is
    zero-shot accuracy and retrieval in units of the undefended network's: of the one that met the
    same poisons, and of the one that met none, by which it is judged where it was trained; on the
    seeds that both were run on. Two trainings with equal settings differ by a tenth in retrieval,
    so a last table takes all attacks together that work undefended, with 95 % intervals.
    """
    record = read(path)
    rows, lines = seeds_of(record, "attack", "method"), []
    unpoisoned = rows.get((NOTHING, UNDEFENDED), {})
    together = defaultdict(list)
    for attack in record["config"]["attacks"]:
        bare = rows.get((attack, UNDEFENDED))
        if attack in (CANARIES, NOTHING) or not bare:
            continue
        kind = "targeted" if "targeted" in next(iter(bare.values())) else "backdoor"
        # Attacks that meet one seed alone would count there and not elsewhere.
        counts = attack not in record["config"].get("single", ())
        works = min(share_of(cell, kind)["estimate"] for cell in bare.values()) >= ENOUGH
        for method in record["config"]["methods"]:
            cells = rows.get((attack, method))
            if method == UNDEFENDED or not cells:
                continue
            shares = [share_of(cell, kind) for cell in cells.values()]
            rates = [share["estimate"] for share in shares]
            beside = [paired(cells, rivals) for rivals in (bare, unpoisoned)]
            if works and counts:
                together[method].append((attack, rates, beside))
            useful = [usefulness(trainings) for trainings in beside]
            judged = useful[1] or useful[0]
            lines.append(
                [
                    attack, "yes" if works else "**no**", method, percent(np.mean(rates)),
                    percent(max(rates)), percent(interval(shares)[1]),
                    "yes" if np.mean(rates) <= LITTLE else "no",
                    *(" / ".join(percent(value, 0) for value in found) or "not run"
                      for found in useful),
                    ("yes" if min(judged) >= USEFUL else "no") if judged else "not run",
                    str(len(cells)),
                ]
            )  # fmt: skip
    header = [
        "attack", "works undefended (80 % on every seed)", "training", "success %", "worst seed %",
        "upper end, all seeds %", "stops it (10 %)", "zero-shot / retrieval, % of undefended",
        "% of unpoisoned", "as useful (90 %)", "seeds",
    ]  # fmt: skip
    parts = [markdown(header, lines)]
    several = {method: found for method, found in together.items() if len(found) > 1}
    if several:
        header = [
            "training", "attacks", "success, mean %",
            "zero-shot, % of undefended", "retrieval, % of undefended",
            "zero-shot, % of unpoisoned", "retrieval, % of unpoisoned",
        ]  # fmt: skip
        parts.append(markdown(header, [all_attacks(*found) for found in several.items()]))
    return "\n\n".join(parts)


def all_attacks(method: str, found: list[tuple]) -> list[str]:
    """A row of the last table: the mean over attacks, and usefulness over all trainings."""
    attacks, rates, beside = zip(*found, strict=True)
    ratios = []
    for trainings in zip(*beside, strict=True):
        shares, limits = usefulness(*trainings), usefulness_interval(trainings)
        for place, share in enumerate(shares):
            low, high = limits[:, place]
            known = f" ({percent(low, 0)} to {percent(high, 0)})" if np.isfinite(low) else ""
            ratios.append(percent(share, 0) + known)
        ratios += [] if shares else ["not run"] * 2
    mean = np.mean([np.mean(one) for one in rates])
    return [method, ", ".join(attacks), percent(mean), *ratios]


# By seed: (zero-shot accuracy, retrieval) of a row's training, and of another row's.
Trainings = dict[int, tuple[tuple[float, float], tuple[float, float]]]


def paired(cells: dict[int, dict], rivals: dict[int, dict]) -> Trainings:
    """What a row and another one can do, on the seeds of both."""
    of = lambda cell: (cell["zero_shot"]["top1"], recall(cell))  # noqa: E731
    return {seed: (of(cells[seed]), of(rivals[seed])) for seed in cells.keys() & rivals.keys()}


def usefulness(*found: Trainings) -> list[float]:
    """Zero-shot accuracy and retrieval as shares of another row's, means over all trainings."""
    pairs = [pair for trainings in found for pair in trainings.values()]
    if not pairs:
        return []
    ours, theirs = np.mean(pairs, 0)
    return [float(value) for value in ours / theirs]


def usefulness_interval(found: Sequence[Trainings], draws: int = 10_000) -> np.ndarray:
    """[2, 2] ends of the two 95 % intervals: seeds and attacks are drawn with replacement.

    Trainings of one seed share their order and views, and all attacks the unpoisoned network; so
    both are drawn whole. Three seeds bound little; one bounds nothing, and gives NaN.
    """
    rows = [(attack, seed) for attack, one in enumerate(found) for seed in one]
    if len({seed for _, seed in rows}) < 2:
        return np.full((2, 2), np.nan)
    attacks, seeds = (np.unique(column, return_inverse=True)[1] for column in np.transpose(rows))
    random = np.random.default_rng(0)
    weights = np.ones((draws, len(rows)))
    for places in (attacks, seeds):
        count = places.max() + 1
        weights *= random.multinomial(count, np.full(count, 1 / count), draws)[:, places]
    ours, theirs = np.moveaxis([found[attack][seed] for attack, seed in rows], 1, 0)
    some = weights.sum(1) > 0
    ratios = (weights[some] @ ours) / (weights[some] @ theirs)
    return np.percentile(ratios, (2.5, 97.5), axis=0)


def histograms(path: Path) -> None:
    """Scores at the first split with the fitted mixture, one panel per attack.

    Of the published method, which splits by that mixture; of others only if it was not run at all.
    """
    cells = read(path)["cells"]
    found = {}
    for cell in [c for c in cells if c["key"]["method"] == PUBLISHED] or cells:
        entry = next((e for e in cell["metrics"].get("history", []) if "histogram" in e), None)
        if entry and cell["key"]["attack"] not in found:
            found[cell["key"]["attack"]] = (cell["key"]["method"], entry["histogram"])
    if not found:
        return
    figure, axes = panels(len(found))
    for axis, (attack, (method, histogram)) in zip(axes, found.items(), strict=True):
        edges = np.array(histogram["edges"])
        places, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
        for name, colour in (("clean", "#1f77b4"), ("poisons", "#d62728")):
            axis.bar(places, histogram[name], width, color=colour, alpha=0.6, label=name)
        total = sum(histogram["clean"]) + sum(histogram["poisons"])
        axis.plot(places, total * width * density_of(histogram["mixture"], places), "k-", lw=1)
        axis.set(title=f"{attack}, {method}", xlabel="score of a pair at the split", yscale="log")
        axis.set_ylim(bottom=0.5)
        used = places[np.array(histogram["clean"]) + np.array(histogram["poisons"]) > 0]
        axis.set_xlim(used.min() - width, used.max() + width)
    axes[0].legend(fontsize=6)
    _write(figure, path, "histogram")


def density_of(mixture: dict, places: np.ndarray) -> np.ndarray:
    """The fitted density of two normal distributions."""
    parts = zip(mixture["means"], mixture["deviations"], mixture["shares"], strict=True)
    return sum(
        share / (width * np.sqrt(2 * np.pi)) * np.exp(-(((places - mean) / width) ** 2) / 2)
        for mean, width, share in parts
    )


def leaks(path: Path) -> None:
    """Share of the poisons in the safe set, epoch by epoch, with the safe share for comparison."""
    record = read(path)
    found = defaultdict(list)
    for cell in record["cells"]:
        curve = [e for e in cell["metrics"].get("history", []) if "leak" in e]
        if curve:
            found[cell["key"]["attack"]].append((cell, curve))
    if not found:
        return
    figure, axes = panels(len(found))
    colours = {}  # of a method, whatever the attack and the seed
    for axis, (attack, cells) in zip(axes, found.items(), strict=True):
        labelled = set()
        for cell, curve in cells:
            epochs, method = [entry["epoch"] for entry in curve], cell["key"]["method"]
            label = None if method in labelled else method
            labelled.add(method)
            colour = colours.setdefault(method, f"C{len(colours) % 10}")
            leak = [100 * e["leak"]["estimate"] for e in curve]
            axis.plot(epochs, leak, ".-", lw=1, color=colour, label=label)
            axis.plot(epochs, [100 * e["safe_share"] for e in curve], ":", lw=0.7, color=colour)
        axis.set(title=attack, xlabel="epoch", ylabel="% of the poisons (dotted: of all pairs)")
        axis.legend(fontsize=5)
        axis.grid(alpha=0.3)
    _write(figure, path, "leak")


def triggered(path: Path, pairs: Pairs, config: Config) -> None:
    """Pictures as they are, and with every trigger on them."""
    images, indices = np.asarray(pairs.images[:6]), pairs.indices[:6]
    rows = {"clean": images}
    for name, attack in config.attacks.items():
        if attack.trigger:
            rows[name] = getattr(triggers, attack.trigger)(**attack.options)(images, indices)
    from matplotlib.figure import Figure

    figure = Figure((1.2 * len(images), 1.25 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for line, (name, shown) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=7)
        for axis, picture in zip(line, np.asarray(shown), strict=True):
            axis.imshow(np.clip(picture, 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    if config.data == "emoji":
        figure.supxlabel(CREDIT, fontsize=5)
    _write(figure, path, "triggered")


def _write(figure, path, what):
    target = path.with_name(f"{path.stem}-{what}.png")
    records.once(target, lambda file: figure.savefig(file, dpi=110))
