"""Plots and tables of the training experiment, drawn from its results file."""

import json
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

import jaxrobust as jr
from experiments import records
from experiments.common import markdown, percent

NAMES = {
    "standard": "Standard",
    "n_fgsm": "N-FGSM",
    "n_fgsm_guarded": "N-FGSM, guarded",
    "n_fgsm_unguarded": "the same without its guard",
    "pgd_at": "PGD-AT",
    "trades": "TRADES",
    "mart": "MART",
}
COLOURS = {
    "standard": "#7f7f7f",
    "n_fgsm": "#ff7f0e",
    "n_fgsm_guarded": "#d62728",
    "n_fgsm_unguarded": "#e8a0a0",
    "pgd_at": "#1f77b4",
    "trades": "#2ca02c",
    "mart": "#9467bd",
}
UNITS = {"linf": "linf", "l2": "l2"}


def read(path: Path) -> dict:
    """A results file.

    Raises:
        SystemExit: it is not there yet.
    """
    if not path.exists():
        raise SystemExit(f"{path} is not there: run the experiment without --plot-only first")
    return json.loads(path.read_text())


def rows_of(record: dict, *fields: str) -> dict[tuple, list[dict]]:
    """Metrics of the cells by these fields of their keys, one per seed, in the file's order."""
    rows = defaultdict(list)
    for cell in record["cells"]:
        rows[tuple(cell["key"][name] for name in fields)].append(cell["metrics"])
    return rows


def seeds_of(record: dict, *fields: str) -> dict[tuple, dict[int, dict]]:
    """Like `rows_of`, metrics by seed: unfinished rows are compared on the seeds of both."""
    rows = defaultdict(dict)
    for cell in record["cells"]:
        rows[tuple(cell["key"][name] for name in fields)][cell["key"]["seed"]] = cell["metrics"]
    return rows


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    mean = percent(float(np.mean(values)))
    if len(values) < 2:
        return mean
    return f"{mean} ± {percent(float(np.std(values, ddof=1)))}"


def training_table(path: Path) -> str:
    """The Markdown table of a results file: one row per model, threat and method."""
    record = read(path)
    config = record["config"]
    attack = f"pgd{config['pgd_steps']}x{config['pgd_restarts']}_accuracy"
    header = [
        "threat",
        "method",
        "clean %",
        f"PGD-{config['pgd_steps']} x {config['pgd_restarts']} restarts %",
        "seeds",
        "training, TFLOP",
    ]
    rows = rows_of(record, "model", "threat", "eps", "method")
    table = []
    for model in config["models"]:
        for threat, eps in config["threats"].items():
            for method in config["methods"]:
                cells = rows.get((model, threat, eps, method))
                label = f"{threat} {eps:.3g}"
                label = label if len(config["models"]) == 1 else f"{model}, {label}"
                if not cells:
                    table.append([label, NAMES[method], *["not run"] * 4])
                    continue
                table.append(
                    [
                        label,
                        NAMES[method],
                        spread([cell["clean_accuracy"] for cell in cells]),
                        spread([cell[attack] for cell in cells]),
                        str(len(cells)),
                        # The guard's price depends on how often it acts: counted as always.
                        ("<= " if method == "n_fgsm_guarded" else "")
                        + f"{np.mean([cell['train_flops'] for cell in cells]) / 1e12:.2g}",
                    ]
                )
    return markdown(header, table)


def attacks_table(path: Path) -> str:
    """The Markdown table of `bench_attacks`: images per second, and the ratio to the best peer."""
    rates = defaultdict(dict)
    for cell in read(path)["cells"]:
        key, figures = cell["key"], cell["metrics"]
        rates[key["model"], key["steps"], key["batch"]][key["library"]] = figures
    names = list(dict.fromkeys(name for row in rates.values() for name in row))
    ours = [name for name in names if name.startswith("jaxrobust")]
    peers = [name for name in names if name not in ours]
    torch_routes = [name for name in peers if name.startswith("torch")]
    foolbox_routes = [name for name in peers if name.startswith("foolbox")]
    header = ["network", "attack, batch", "jaxrobust", *peers, "x best torch", "x best foolbox"]
    table = []
    for (model, steps, batch), row in rates.items():
        rate = {name: figures["images_per_second"] for name, figures in row.items()}
        best = max(rate[name] for name in ours)

        def ratio(names, best=best, rate=rate):
            found = [rate[name] for name in names if name in rate]
            return f"{best / max(found):.2f}" if found else "not run"

        columns = [f"{rate[name]:.0f}" if name in rate else "not run" for name in peers]
        table.append(
            [
                model,
                f"PGD-{steps}, {batch}",
                f"{best:.0f}",
                *columns,
                ratio(torch_routes),
                ratio(foolbox_routes),
            ]
        )
    return markdown(header, table)


def training_speed_table(path: Path) -> str:
    """The Markdown table of `bench_training`: images per second of a PGD-10 training step."""
    cells = read(path)["cells"]
    timed = [cell for cell in cells if "library" in cell["key"]]
    memory = {
        (cell["key"]["model"], cell["key"]["memory"]): cell["metrics"]["bytes"] / 2**20
        for cell in cells
        if "memory" in cell["key"]
    }
    best = defaultdict(float)
    for cell in timed:
        if cell["key"]["library"].startswith("torch"):
            model, rate = cell["key"]["model"], cell["metrics"]["images_per_second"]
            best[model] = max(best[model], rate)
    header = ["network, batch", "step", "images/s", "x best torch", "GFLOP/s", "peak memory, MiB"]
    table = []
    for cell in timed:
        key, figures = cell["key"], cell["metrics"]
        rate, model = figures["images_per_second"], key["model"]
        # Memory was taken once per library, with its default form of the step.
        default = {"jaxrobust jit, 1 device, fused": "jaxrobust", "torch eager": "torch"}
        library = default.get(key["library"].removesuffix(", frozen attack"))
        used = memory.get((model, library))
        table.append(
            [
                f"{model}, {key['batch']}",
                key["library"],
                f"{rate:.1f}",
                f"{rate / best[model]:.2f}" if best[model] else "not run",
                f"{figures['gflop_per_second']:.0f}",
                "" if used is None else f"{used:.0f}",
            ]
        )
    return markdown(header, table)


def accuracy_curves(path: Path) -> None:
    """Accuracy against eps, one panel per model and threat, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = read(path)
    rows = rows_of(record, "model", "threat", "eps", "method")
    panels = list(dict.fromkeys(key[:3] for key in rows))
    curve = f"curve_pgd{record['config']['curve_steps']}_accuracy"
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for (*where, method), cells in rows.items():
            if tuple(where) != panel:
                continue
            eps = cells[0]["curve_eps"]
            values = 100 * np.array([cell[curve] for cell in cells])
            axis.plot(eps, values.mean(0), "o-", ms=3, color=COLOURS[method], label=NAMES[method])
            axis.fill_between(
                eps, values.min(0), values.max(0), color=COLOURS[method], alpha=0.2, lw=0
            )
        model, threat, trained = panel
        axis.axvline(trained, color="black", lw=0.8, ls=":")
        axis.text(trained, 101, "trained for", ha="center", va="bottom", fontsize=8)
        axis.set(xlabel=f"eps ({UNITS[threat]})", ylim=(0, 100), xlim=(0, None))
        axis.set_ylabel(f"accuracy under PGD-{record['config']['curve_steps']}, %")
        axis.set_title(f"{model} on {record['config']['dataset']}, {threat}", pad=16, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    target = path.with_name(path.stem + "-curve.png")
    records.once(target, lambda file: figure.savefig(file, dpi=110))
    plt.close(figure)


def adversarial_examples(config, options, keys: list[dict], test, count: int = 6) -> None:
    """Test images, their perturbation magnified, and the result, for the first cell of each method.

    Written beside the results file. Networks whose weights are not there are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model_name, threat, eps = (keys[0][name] for name in ("model", "threat", "eps"))
    model = jr.models.build(model_name, **config.models[model_name])
    attack = jr.pgd(threat, eps, steps=config.pgd_steps)
    images, labels = test.images[:count], test.labels[:count]
    shown = []
    for method in config.methods:
        key = next(key for key in keys if key["method"] == method)
        folder = records.run_folder(options, config, key)
        try:
            variables = jr.checkpoint.load_weights(folder / "weights.safetensors")
        except FileNotFoundError:
            continue
        variables = {"batch_stats": {}, **variables}
        x_adv = attack(
            _cross_entropy(model.apply), images, jax.random.key(0), args=(variables, labels)
        )
        predicted = np.asarray(model.apply(variables, x_adv).argmax(1))
        shown.append((method, np.asarray(x_adv), predicted))
    if not shown:
        return
    figure, axes = plt.subplots(
        1 + 2 * len(shown),
        count,
        figsize=(1.15 * count, 1.2 * (1 + 2 * len(shown))),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for column in range(count):
        _draw(axes[0][column], images[column], test.class_names[labels[column]])
        for i, (_, x_adv, predicted) in enumerate(shown):
            delta = x_adv[column] - images[column]
            scale = max(float(np.abs(delta).max()), 1e-9)
            name = test.class_names[predicted[column]]
            wrong = predicted[column] != labels[column]
            _draw(axes[1 + 2 * i][column], x_adv[column], name, "#c00000" if wrong else "black")
            _draw(axes[2 + 2 * i][column], 0.5 + 0.5 * delta / scale, f"x {0.5 / scale:.2g}")
    axes[0][0].set_ylabel("image", fontsize=8)
    for i, (method, *_) in enumerate(shown):
        axes[1 + 2 * i][0].set_ylabel(f"against\n{NAMES[method]}", fontsize=8)
        axes[2 + 2 * i][0].set_ylabel("delta", fontsize=8)
    figure.suptitle(f"PGD-{config.pgd_steps}, {threat} {eps:.3g}: prediction above", fontsize=9)
    target = options.out / f"adversarial_training-{options.preset}-examples.png"
    records.once(target, lambda file: figure.savefig(file, dpi=110))
    plt.close(figure)


def _cross_entropy(apply):
    return lambda x, variables, labels: jr.losses.cross_entropy(apply(variables, x), labels)


def _draw(axis, image, title, colour="black"):
    grey = image.shape[-1] == 1
    axis.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
    axis.set_title(title, fontsize=7, color=colour, pad=2)
