"""Metrics of a training run: one CSV file, and TensorBoard events beside it."""

import contextlib
import csv
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.files import atomic_write

_FILE = "metrics.csv"


@contextlib.contextmanager
def metric_logger(
    directory: str | os.PathLike,
    *,
    tensorboard: bool = True,
    resume_step: int | None = None,
    write: bool = True,
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Open a run's metrics and give the function that logs a step; closes them at the end.

        with metric_logger("runs/trades", resume_step=step) as log:
            log(step, {"loss": loss, "robust_accuracy": accuracy})

    `metrics.csv` has the column `step` and one column per metric, in the order in which they first
    came. A new metric widens the file; a metric that a step does not have leaves its cell empty.
    Every row is handed to the operating system before `log` returns, so a kill loses none. Values
    are written so that reading them gives the same float64.

    Args:
        directory: where `metrics.csv` and the event files go; created if missing.
        tensorboard: also write TensorBoard events; needs the package tensorboardX.
        resume_step: the step that was restored, >= 0. Later rows, which a killed run left behind,
            are dropped, so that the file ends as if the run had never stopped. None starts anew:
            all rows are dropped.
        write: False makes `log` do nothing; with several processes, True on process 0 alone.

    Yields:
        log(step, metrics): step is an int larger than the last one logged; metrics maps names to
        numbers or arrays of one element.

    Raises:
        ValueError: resume_step < 0, or the file there was not written by this function.
        ModuleNotFoundError: tensorboardX is missing.
    """
    if resume_step is not None and resume_step < 0:
        raise ValueError(f"resume_step must be None or >= 0, got {resume_step}")
    if not write:
        yield lambda step, metrics: None
        return
    path = Path(directory) / _FILE
    rows = _kept_rows(path, resume_step)
    with contextlib.ExitStack() as stack:
        add_scalars = _tensorboard(directory, resume_step, stack) if tensorboard else None
        append = _csv(path, rows)

        def log(step: int, metrics: Mapping) -> None:
            values = {name: _number(name, value) for name, value in metrics.items()}
            append(step, values)
            if add_scalars is not None:
                add_scalars(step, values)

        yield log


def read_metrics(path: str | os.PathLike) -> list[dict[str, int | float]]:
    """Read a metrics file: one dict per row, `step` an int; empty cells are left out.

    Args:
        path: `metrics.csv`, or the directory that holds it.

    Raises:
        ValueError: the file is not one that `metric_logger` wrote.
    """
    path = Path(path)
    path = path / _FILE if path.is_dir() else path
    return [
        {name: int(text) if name == "step" else float(text) for name, text in row.items()}
        for row in _rows(path)
    ]


def _number(name: str, value: Any) -> int | float:
    if not isinstance(name, str) or name in ("", "step") or not name.isprintable():
        raise ValueError(f"a metric's name must be printable and not 'step', got {name!r}")
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSUc":
        raise ValueError(
            f"metric {name!r} must be one number, got {array.dtype}{list(array.shape)}"
        )
    number = array.item()
    return number if isinstance(number, int) and not isinstance(number, bool) else float(number)


def _rows(path: Path) -> list[dict[str, str]]:
    """Read the complete rows as text, empty cells left out."""
    text = path.read_text(errors="replace")
    # A kill in the middle of a write leaves a last line without its end.
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    whole = all(len(line) == len(lines[0]) and line[0].isdecimal() for line in lines[1:])
    if (text and not lines) or (lines and (lines[0][:1] != ["step"] or not whole)):
        raise ValueError(
            f"{path}: expected a metrics file with the first column step, found another"
        )
    return [
        {name: cell for name, cell in zip(lines[0], line, strict=True) if cell}
        for line in lines[1:]
    ]


def _kept_rows(path: Path, resume_step: int | None) -> list[dict[str, str]]:
    """Rows that a run resumed at `resume_step` keeps; also checks a file that will be replaced."""
    rows = _rows(path) if path.exists() else []
    return [row for row in rows if resume_step is not None and int(row["step"]) <= resume_step]


def _columns(rows: list[dict[str, str]]) -> list[str]:
    """Names in the order in which they first came: only the rows decide, not what was dropped."""
    return list(dict.fromkeys(["step", *(name for row in rows for name in row)]))


def _write(path: Path, rows: list[dict[str, str]], columns: list[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def _csv(
    path: Path, rows: list[dict[str, str]]
) -> Callable[[int, Mapping[str, int | float]], None]:
    """Start the file with `rows` and return the function that appends one."""
    columns = _columns(rows)
    last = int(rows[-1]["step"]) if rows else -1
    _write(path, rows, columns)

    def append(step: int, values: Mapping[str, int | float]) -> None:
        nonlocal columns, last
        if step <= last:
            raise ValueError(f"step must be larger than the last one logged, {last}, got {step}")
        row = {"step": str(step)} | {name: repr(value) for name, value in values.items()}
        wider = list(dict.fromkeys([*columns, *row]))
        if wider != columns:
            _write(path, [*_rows(path), row], wider)
        else:
            line = io.StringIO()
            csv.DictWriter(line, columns, restval="", lineterminator="\n").writerow(row)
            with path.open("a") as file:
                file.write(line.getvalue())
        columns, last = wider, step

    return append


def _tensorboard(
    directory: str | os.PathLike, resume_step: int | None, stack: contextlib.ExitStack
) -> Callable[[int, Mapping[str, int | float]], None]:
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboard=True needs tensorboardX: pip install tensorboardX"
        ) from error
    Path(directory).mkdir(parents=True, exist_ok=True)
    # Not SummaryWriter: it writes from a thread, and its flush does not wait for that one. Without
    # the suffix, a second writer within the same second would overwrite the first one's file.
    writer = EventsWriter(str(Path(directory) / "events"), filename_suffix=f".{time.time_ns()}")
    stack.callback(writer.close)
    # Readers drop what earlier event files hold from this step on.
    purge = 0 if resume_step is None else resume_step + 1
    writer.write_event(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    def add_scalars(step: int, values: Mapping[str, int | float]) -> None:
        for name, value in values.items():
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            writer.write_event(event)
        writer.flush()

    return add_scalars
