"""Plot and table of the certification experiment, drawn from its results file."""

from pathlib import Path

import numpy as np

from experiments import records
from experiments.common import markdown
from experiments.plots import read, rows_of, spread

NAMES = {
    "standard": "Standard",
    "gaussian": "Gaussian noise",
    "consistency": "Noise and consistency",
    "smooth_adv": "SmoothAdv",
}
COLOURS = {
    "standard": "#7f7f7f",
    "gaussian": "#1f77b4",
    "consistency": "#2ca02c",
    "smooth_adv": "#d62728",
}


def certified_table(path: Path) -> str:
    """The Markdown table of a results file: one row per sigma and method."""
    record = read(path)
    config, rows = record["config"], rows_of(record, "sigma", "method")
    radii = [f"r {radius:g}" for radius in config["table_radii"]]
    header = ["sigma", "method", "clean %", *radii, "mean radius", "seeds", "training, TFLOP"]
    table = []
    for sigma in config["sigmas"]:
        for method in config["methods"]:
            cells = rows.get((sigma, method))
            if not cells:
                table.append([f"{sigma:g}", NAMES[method], *["not run"] * (len(header) - 2)])
                continue
            each = zip(*(cell["table_accuracy"] for cell in cells), strict=True)
            table.append(
                [
                    f"{sigma:g}",
                    NAMES[method],
                    spread([cell["clean_accuracy"] for cell in cells]),
                    *(spread(list(values)) for values in each),
                    _mean([cell["average_radius"] for cell in cells]),
                    str(len(cells)),
                    f"{np.mean([cell['train_flops'] for cell in cells]) / 1e12:.2g}",
                ]
            )
    return markdown(header, table)


def _mean(values):
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def certified_curves(path: Path) -> None:
    """Certified accuracy against radius, one panel per sigma, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = read(path)
    config, rows = record["config"], rows_of(record, "sigma", "method")
    sigmas = [sigma for sigma in config["sigmas"] if any(key[0] == sigma for key in rows)]
    figure, axes = plt.subplots(
        1,
        len(sigmas),
        figsize=(5.2 * len(sigmas), 3.8),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, sigma in zip(axes[0], sigmas, strict=True):
        end = 0.0
        for (where, method), cells in rows.items():
            if where != sigma:
                continue
            radii = cells[0]["radii"]
            values = 100 * np.array([cell["certified_accuracy"] for cell in cells])
            colour = COLOURS[method]
            end = max([end, *(r for r, high in zip(radii, values.max(0), strict=True) if high)])
            axis.plot(radii, values.mean(0), color=colour, label=NAMES[method])
            axis.fill_between(radii, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        axis.set(xlabel="l2 radius", ylim=(0, 100), xlim=(0, 1.1 * end or None))
        axis.set_title(f"{config['dataset']}, sigma {sigma:g}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("certified accuracy, %")
    target = path.with_name(path.stem + "-curve.png")
    records.once(target, lambda file: figure.savefig(file, dpi=110))
    plt.close(figure)
