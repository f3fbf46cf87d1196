"""Writes the tables of README.md and of experiments/results/README.md from the committed results.

    python -m experiments.tables           # between the markers of both
    python -m experiments.tables --check   # fails if one is behind

A marker is `<!-- table: adversarial_training-laptop -->` ... `<!-- end -->`; what stands between is
generated. The README at the top has a choice of rows and columns where a table is long, the one
beside the results has all.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments import (
    autoattack_benchmark,
    bench_autoattack,
    bench_cropd,
    bench_minimal,
    bench_pod,
    bench_safeclip,
    common,
    plots,
    plots_certify,
    plots_cropd,
    plots_safeclip,
    plots_sipat,
    records,
)
from experiments.safeclip_settings import UNDEFENDED
from jaxrobust.checkpoint import atomic_write

README = records.ROOT.parent / "README.md"
ALL = records.RESULTS / "README.md"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(\n?<!-- end -->)", re.DOTALL)
KEPT = ("zero-shot, % of undefended", "retrieval, % of undefended")
Maker = Callable[[Path], str]
Rows = list[dict[str, str]]

# ---- choices from long tables -------------------------------------------------------------------


def rows_of(text: str) -> list[Rows]:
    """Every Markdown table in a text, as rows by column."""
    found = []
    for part in text.split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
        if not cells:
            continue
        names = cells[0]
        if len(set(names)) < len(names):
            raise ValueError(f"columns must have names of their own, got {names}")
        found.append([dict(zip(names, line, strict=True)) for line in cells[2:]])
    return found


def shown(rows: Rows) -> str:
    """Rows of equal columns as a Markdown table."""
    return common.markdown(list(rows[0]), [list(row.values()) for row in rows])


def chosen(rows: Rows, columns: Sequence[str], keep: Callable[[dict], bool] = bool) -> str:
    """Some columns of the rows that are kept.

    Raises:
        KeyError: the table has no such column.
    """
    return shown([{name: row[name] for name in columns} for row in rows if keep(row)])


def beside(
    tables: Mapping[str, Rows], name: str, rows: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> Rows:
    """Tables with equal row names, side by side.

    Args:
        tables: by what is put before their columns.
        name: of the column in which they name their rows, which may be their own title.
        rows: which, by name.
        columns: which of each table.
    """
    found = []
    for row in rows:
        line = {name: row}
        for title, table in tables.items():
            cells = next((one for one in table if next(iter(one.values())) == row), {})
            line |= {f"{title}: {key}": cells.get(key, "not run") for key in columns[title]}
        found.append(line)
    return found


def training_choice(path: Path) -> str:
    """PGD and AutoAttack of the same networks, the threats side by side."""
    (pgd,) = rows_of(plots.training_table(path))
    name = path.name.replace("adversarial_training", "autoattack_benchmark")
    (suite,) = rows_of(autoattack_benchmark.table(path.with_name(name)))
    judged = {(row["threat"], row["method"]): row["AutoAttack %"] for row in suite}
    attack = next(name for name in pgd[0] if name.startswith("PGD"))
    lines = {}
    for row in pgd:
        line = lines.setdefault(row["method"], {"method": row["method"]})
        start = f"{row['threat']}: "
        line[start + "clean %"], line[start + attack] = row["clean %"], row[attack]
        line[start + "AutoAttack %"] = judged.get((row["threat"], row["method"]), "not run")
        line.setdefault("TFLOP", row["training, TFLOP"])
    last = {"TFLOP": "training, TFLOP"}
    return shown([{last.get(n, n): line[n] for n in sorted(line, key="TFLOP".__eq__)}
                  for line in lines.values()])  # fmt: skip


def suite_choice(path: Path) -> str:
    """The whole suite, not its attacks one by one."""
    header, bar, *lines = bench_autoattack.table(path).splitlines()
    return "\n".join([header, bar, *(line for line in lines if "| standard |" in line)])


def certified_choice(path: Path) -> str:
    """Fewer radii."""
    (rows,) = rows_of(plots_certify.certified_table(path))
    radii = ("r 0", "r 0.5", "r 1", "r 2")
    return chosen(
        rows, ("sigma", "method", "clean %", *radii, "mean radius", "seeds", "training, TFLOP")
    )


def salience_choice(path: Path) -> str:
    """Rows with their controls, both data sets side by side."""
    methods = (
        "standard", "at", "at_eps_67", "sip_gradient_20", "random_20", "least_20", "sip_human",
        "random_human", "sip_falling_50", "random_falling_50",
    )  # fmt: skip
    tables = {next(iter(rows[0])): rows for rows in rows_of(plots_sipat.readme_table(path))}
    eps = {"mnist5k": ("clean %", "0.1", "0.3"), "cutouts": ("clean %", "2/255", "8/255")}
    return shown(beside(tables, "training", methods, eps))


def preprocessor_choice(path: Path) -> str:
    """The rows that the text speaks of, data sets side by side."""
    methods = (
        "none", "autoencoder", "gaussian_dae", "reported", "reported_lambda_100",
        "adversarial_reconstruction", "recommended", "jpeg", "alf", "aff",
    )  # fmt: skip
    tables = {
        title.split(",")[0]: rows
        for rows in rows_of(plots_cropd.readme_table(path))
        if ", linf" in (title := next(iter(rows[0])))
    }
    columns = {}
    for title, rows in tables.items():
        pgd = next(name for name in rows[0] if name.startswith("PGD"))
        judged = any(row["worst case %"] not in ("", "not run") for row in rows)
        columns[title] = ("clean %", pgd, *["worst case %"] * judged, "seeds")
    return shown(beside(tables, "in front, or done to the model", methods, columns))


def preprocessor_costs(path: Path) -> str:
    """What training takes, of the rows that the text speaks of."""
    (rows,) = rows_of(bench_cropd.readme_table(path).split("\n\n")[0])
    methods = ("recommended", "gaussian_dae", "reported", "aff")
    return chosen(rows, list(rows[0]), lambda row: row["training"] in methods)


def pairs_choice(path: Path) -> str:
    """Every attack's success against every training, and what all trainings keep of usefulness."""
    tables = rows_of(plots_safeclip.readme_table(path))
    cells = next(rows for rows in tables if "unpoisoned %" in rows[0])
    together = next((rows for rows in tables if list(rows[0])[:2] == ["training", "attacks"]), [])
    attacks = list(dict.fromkeys(row["attack"] for row in cells if row["success %"]))
    success = {(row["attack"], row["training"]): row["success %"] for row in cells}
    useful = {row["training"]: row for row in together}
    lines = []
    for method in dict.fromkeys(row["training"] for row in cells if row["success %"]):
        line = {"training": method}
        line |= {attack: success.get((attack, method), "not run") for attack in attacks}
        other = "100" if method == UNDEFENDED else "not run"
        lines.append(line | {name: useful.get(method, {}).get(name, other) for name in KEPT})
    return shown(lines)


# ---- both documents -----------------------------------------------------------------------------

MAKERS: dict[str, Maker] = {
    "adversarial_training": plots.training_table,
    "bench_attacks": plots.attacks_table,
    "bench_training": plots.training_speed_table,
    "bench_pod": bench_pod.readme_table,
    "bench_autoattack": bench_autoattack.table,
    "bench_cropd": bench_cropd.readme_table,
    "bench_safeclip": bench_safeclip.readme_table,
    "bench_minimal": bench_minimal.table,
    "autoattack_benchmark": autoattack_benchmark.table,
    "certify": plots_certify.certified_table,
    "cropd": plots_cropd.readme_table,
    "safeclip": plots_safeclip.readme_table,
    "sipat": plots_sipat.readme_table,
}
CHOICES: dict[str, Maker] = {
    "adversarial_training": training_choice,
    "bench_autoattack": suite_choice,
    "bench_cropd": preprocessor_costs,
    "certify": certified_choice,
    "cropd": preprocessor_choice,
    "safeclip": pairs_choice,
    "sipat": salience_choice,
}
DOCUMENTS: dict[Path, Mapping[str, Maker]] = {README: MAKERS | CHOICES, ALL: MAKERS}


def filled(text: str, makers: Mapping[str, Maker], results: Path = records.RESULTS) -> str:
    """The text with every marked table made anew.

    Raises:
        SystemExit: a marker names an experiment that has no table, or a file that is not there.
    """

    def table(match):
        name = match.group(2)
        maker = makers.get(name.split("-")[0])
        if maker is None:
            raise SystemExit(f"{name}: no experiment makes this table; known: {sorted(makers)}")
        return match.group(1) + maker(results / f"{name}.json") + "\n" + match.group(3).lstrip("\n")

    return MARKED.sub(table, text)


def main() -> None:
    """Fills or checks both documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    for path, makers in DOCUMENTS.items():
        text = path.read_text()
        new = filled(text, makers)
        name = path.relative_to(README.parent)
        if options.check and new != text:
            raise SystemExit(f"{name} is behind the results: run python -m experiments.tables")
        if not options.check:
            atomic_write(path, new)


if __name__ == "__main__":
    main()
