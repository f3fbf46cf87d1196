"""Table and plot of the CRoPD experiment, drawn from its results file."""

from pathlib import Path

import numpy as np

from experiments import common
from experiments.common import markdown
from experiments.plots import read, rows_of, spread
from experiments.plots_sipat import eps_text

COSTLY = ("alf", "aff")


def table(path: Path) -> str:
    """The Markdown table: one row per data set and method, what was not run said so."""
    record = read(path)
    config, rows = record["config"], rows_of(record, "dataset", "method")
    steps = config["pgd_steps"]
    parts = []
    for dataset, problem in config["problems"].items():
        header = [
            f"{dataset}, linf {eps_text(problem['eps'])}",
            "clean %", f"PGD-{steps} %", "worst case %",
            "non-adaptive % (says nothing)", "alarms", "training TFLOP", "s", "ms, batch 1 / 64",
            "seeds",
        ]  # fmt: skip
        lines = []
        for method in config["methods"]:
            cells = rows.get((dataset, method))
            if not cells:
                lines.append([method, *["not run"] * (len(header) - 1)])
                continue
            of = lambda name, cells=cells: [c[name] for c in cells if name in c]  # noqa: E731
            pgd = [found[1] for found in of(f"pgd{steps}_accuracy")]
            robust, flops, seconds = of("robust_accuracy"), of("train_flops"), of("train_seconds")
            alarms = sorted({flag for flags in of("card_flags") for flag in flags})
            times = [f"{np.median(of(f'milliseconds_batch_{size}')):.1f}" for size in (1, 64)]
            lines.append(
                [
                    method, spread(of("clean_accuracy")), spread(pgd),
                    spread(robust) if robust else "not run", spread(of("nonadaptive_accuracy")),
                    ", ".join(alarms) if of("card_flags") else "not run",
                    f"{np.median(flops) / 1e12:.1f}" if flops else "0",
                    f"{np.median(seconds):.0f}" if seconds else "",
                    " / ".join(times), str(len(cells)),
                ]
            )  # fmt: skip
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def frontier(path: Path) -> None:
    """Robust against clean accuracy of every row, one panel per data set, beside the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = read(path)
    config, rows = record["config"], rows_of(record, "dataset", "method")
    steps, names = config["pgd_steps"], list(config["problems"])
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, dataset in zip(axes[0], names, strict=True):
        for method in config["methods"]:
            cells = rows.get((dataset, method), [])
            if not cells:
                continue
            clean = [100 * c["clean_accuracy"] for c in cells]
            robust = [100 * c.get("robust_accuracy", c[f"pgd{steps}_accuracy"][1]) for c in cells]
            marker = "s" if method in COSTLY else "o"
            style = {"marker": marker, "linestyle": "none", "capsize": 2}
            axis.errorbar(np.mean(clean), np.mean(robust), np.std(robust), np.std(clean), **style)
            axis.annotate(method, (np.mean(clean), np.mean(robust)), fontsize=6)
        axis.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", title=dataset)
        axis.grid(alpha=0.3)
    figure.suptitle("Squares train the foundation model's head or all of it", fontsize=8)
    figure.tight_layout()
    common.once(path.with_name(f"{path.stem}-frontier.png"), lambda p: figure.savefig(p, dpi=150))
    plt.close(figure)
