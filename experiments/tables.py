"""Writes the README's tables from the committed results.

    python -m experiments.tables           # between the markers in README.md
    python -m experiments.tables --check   # fails if the README is behind

A marker is `<!-- table: adversarial_training-laptop -->` ... `<!-- end -->`; what stands between is
generated.
"""

import argparse
import re
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
)
from jaxrobust.checkpoint import atomic_write

README = common.ROOT.parent / "README.md"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(\n?<!-- end -->)", re.DOTALL)
MAKERS = {
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


def filled(text: str, results: Path = common.RESULTS) -> str:
    """The text with every marked table made anew.

    Raises:
        SystemExit: a marker names an experiment that has no table, or a file that is not there.
    """

    def table(match):
        name = match.group(2)
        maker = MAKERS.get(name.split("-")[0])
        if maker is None:
            raise SystemExit(f"{name}: no experiment makes this table; known: {sorted(MAKERS)}")
        return match.group(1) + maker(results / f"{name}.json") + "\n" + match.group(3).lstrip("\n")

    return MARKED.sub(table, text)


def main() -> None:
    """Fills or checks README.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text()
    new = filled(text)
    if options.check and new != text:
        raise SystemExit("README.md is behind the results: run python -m experiments.tables")
    if not options.check:
        atomic_write(README, new)


if __name__ == "__main__":
    main()
