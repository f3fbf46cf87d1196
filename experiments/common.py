"""What every experiment shares: command line, devices, the standard suite, and text of tables."""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments import records
from jaxrobust import evaluation, parallel


def arguments(
    doc: str, presets: Mapping[str, Any], default: str = "quick", devices: int | None = None
) -> argparse.Namespace:
    """The command line of an experiment, with the device options carried out already.

    What cannot work ends here with a line of usage, before any data is loaded.

    Args:
        doc: the script's docstring, shown by --help.
        presets: by name.
        default: the preset without --preset.
        devices: how many a CPU is split into; one per core, at most 8, by default.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        choices=list(presets),
        default=default,
        help=f"how much is run (default: {default})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=records.RESULTS,
        help="where results are written, and found: cells that are in the file already are not run "
        "again (default: experiments/results, which holds the README's)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help="checkpoints and weights (default: OUT/runs, or runs beside the README without --out)",
    )
    parser.add_argument("--plot-only", action="store_true", help="draw from the results file")
    parser.add_argument(
        "--devices",
        type=int,
        help="how many (default: all; a CPU is split, one per core, at most 8)",
    )
    parser.add_argument(
        "--mapping",
        choices=parallel.MAPPINGS,
        default="shard_map",
        help="how a training step gets to all devices (default: shard_map)",
    )
    parser.add_argument("--coordinator", help="host:port of process 0, for several hosts")
    parser.add_argument("--processes", type=int, help="how many hosts; found on pods and SLURM")
    parser.add_argument("--process", type=int, help="which host this is, from 0")
    parser.add_argument(
        "--distributed", action="store_true", help="several hosts, all found by themselves"
    )
    options = parser.parse_args()
    options.runs = options.runs or (
        records.ROOT.parent / "runs" if options.out == records.RESULTS else options.out / "runs"
    )
    options.experiment = Path(sys.argv[0]).stem
    problem = _problem(options, presets.get(options.preset))
    if problem:
        parser.error(problem)
    _start(options, devices or min(os.cpu_count() or 1, 8))
    # A CPU is split into as many as are asked for; others have what they have.
    if options.devices and options.devices > jax.device_count():
        parser.error(f"--devices: there are {jax.device_count()}, got {options.devices}")
    return options


def _problem(options: argparse.Namespace, config: Any) -> str | None:
    """What is wrong with a command line, or None."""
    if options.devices is not None and options.devices < 1:
        return f"--devices must be >= 1, got {options.devices}"
    for size in sorted(_batch_sizes(config)) if options.devices else ():
        if size % options.devices and not options.plot_only:
            return f"--devices must divide the batches of {size}, got {options.devices}"
    numbers = {"--processes": options.processes, "--process": options.process}
    given = [name for name, number in numbers.items() if number is not None]
    if given and not options.coordinator:
        return f"{given[0]} needs --coordinator host:port"
    if len(given) == 1:
        missing = next(name for name in numbers if name not in given)
        return f"{given[0]} needs {missing}"
    if given and not 0 <= options.process < options.processes:
        return f"--process must be in [0, {options.processes}), got {options.process}"
    return _unwritable("--out", options.out) or _unwritable("--runs", options.runs)


def _batch_sizes(config: Any) -> set[int]:
    """What a preset trains with: every `batch_size` that stands beside a number of epochs.

    Others are of evaluations, which round them to the devices.
    """
    if dataclasses.is_dataclass(config):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if not isinstance(config, Mapping):
        return set()
    own = {config["batch_size"]} if {"batch_size", "epochs"} <= config.keys() else set()
    return own.union(*map(_batch_sizes, config.values()))


def _unwritable(name: str, folder: Path) -> str | None:
    """Why no file can be put into a folder, or into the nearest one above it; None if one can."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"{name}: {folder} cannot be written: {error.strerror}"


def _start(options, devices):
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/jaxrobust/xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    parallel.keep_freed_memory()
    parallel.split_host(options.devices or devices)
    if options.distributed or options.coordinator:
        parallel.initialize(options.coordinator, options.processes, options.process)


def mesh_for(options: argparse.Namespace, batch_size: int) -> jax.sharding.Mesh:
    """The asked-for devices, or as many as divide the batch."""
    if options.devices and jax.process_count() == 1:
        return parallel.data_mesh(options.devices)
    count = max(n for n in range(1, jax.device_count() + 1) if batch_size % n == 0)
    return parallel.data_mesh(None if jax.process_count() > 1 else count)


def local_mesh(options: argparse.Namespace) -> jax.sharding.Mesh:
    """This process's devices, or the asked-for ones: over them an evaluation is spread."""
    alone = options.devices and jax.process_count() == 1
    return parallel.data_mesh(options.devices if alone else jax.local_devices())


@dataclasses.dataclass(frozen=True)
class LogitsOf:
    """A network as attacks on classifiers call it; equal networks share what is compiled."""

    apply: Callable[..., jax.Array]

    def __call__(self, x: jax.Array, variables: Any) -> jax.Array:
        """The logits of x."""
        return self.apply(variables, x)


def suite_of(queries: int, steps: int = 100, targets: int = 9) -> Callable[..., dict[str, Any]]:
    """The standard suite with lengths of one's own, as `jr.evaluate` takes it."""

    def suite(norm, eps, bounds):
        chosen = evaluation.suite("standard", norm, eps, bounds)
        for name in ("apgd-ce", "apgd-t"):
            inner = dataclasses.replace(chosen[name].attack, steps=steps)
            chosen[name] = dataclasses.replace(chosen[name], attack=inner)
        chosen["apgd-t"] = dataclasses.replace(chosen["apgd-t"], targets=targets)
        chosen["fab-t"] = dataclasses.replace(chosen["fab-t"], steps=steps, targets=targets)
        chosen["square"] = dataclasses.replace(chosen["square"], queries=queries)
        return chosen

    return suite


def percent(value: float, digits: int = 1) -> str:
    """0.934 as "93.4"."""
    return f"{100 * value:.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)
