"""One call that evaluates a classifier, and the report it gives: figures, and reasons for doubt.

    report = jr.evaluate(logits_fn, images, labels, threats={"linf": 8 / 255}, key=key)
    print(report)
    report.save("report.json")

Robust accuracy is the per-example worst case over all attacks of all threats. The gradient-masking
report card is part of every report: a check that raises an alarm stays in it.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrobust import attacks, balls, flops, metrics
from jaxrobust.attacks import classifier, scheduler
from jaxrobust.evaluation.accuracy import accuracy_curve
from jaxrobust.evaluation.auto_attack import auto_attack
from jaxrobust.evaluation.auto_attack import suite as attacks_of
from jaxrobust.evaluation.checks import Check
from jaxrobust.evaluation.masking import report_card
from jaxrobust.files import atomic_write

CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
_CURVE_STEPS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreatReport:
    """What one threat did.

    Attributes:
        norm: of the threat.
        eps: its radius.
        accuracy: (estimate, low, high): robust accuracy with its 95 % Wilson interval.
        stages: accuracy after each attack, "clean" first.
        seconds: by attack, compilation included.
        flops: by attack, of matrix products and convolutions, counted on what was computed.
        per_class: robust accuracy of each class.
        curve: {"eps": [...], "accuracy": [...]} under PGD-20 on the first images: an upper bound.
        robust: [n] bool.
        broken_by: [n] names.
        checks: the gradient-masking report card.
        notes: what a reader of the figure must know.
    """

    norm: str
    eps: float
    accuracy: tuple[float, float, float]
    stages: dict[str, float]
    seconds: dict[str, float]
    flops: dict[str, float]
    per_class: list[float]
    curve: dict[str, list[float]]
    robust: np.ndarray
    broken_by: np.ndarray
    checks: tuple[Check, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """An evaluation.

    Attributes:
        images: how many.
        suite: the version of AutoAttack, or "custom".
        clean: (estimate, low, high) accuracy with its 95 % Wilson interval.
        worst_case: the same for examples that hold against every threat.
        threats: by name.
    """

    images: int
    suite: str
    clean: tuple[float, float, float]
    worst_case: tuple[float, float, float]
    threats: dict[str, ThreatReport]

    @property
    def alarms(self) -> tuple[str, ...]:
        """The checks of the report card that failed, with what they mean."""
        return tuple(
            f"{name}: {check.name}: {check.meaning}"
            for name, threat in self.threats.items()
            for check in threat.checks
            if check.verdict == "flag"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; RobustBench's names for what it has names for."""
        first = next(iter(self.threats.values()))
        return {
            "clean_acc": f"{100 * self.clean[0]:.2f}",
            "autoattack_acc": f"{100 * self.worst_case[0]:.2f}",
            "eps": first.eps,
            "threat_model": "+".join(threat.norm.capitalize() for threat in self.threats.values()),
            "images": self.images,
            "suite": self.suite,
            "clean_accuracy": self.clean,
            "robust_accuracy": self.worst_case,
            "alarms": list(self.alarms),
            "threats": {name: _plain(threat) for name, threat in self.threats.items()},
        }

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, whole or not at all."""
        atomic_write(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def __str__(self) -> str:
        """A table, and every check that does not pass."""
        lines = [
            f"{self.images} images, suite {self.suite!r}; accuracies in % with 95 % intervals",
            f"{'clean':24}{_interval(self.clean)}",
        ]
        for name, threat in self.threats.items():
            lines.append(f"{name + f' {threat.eps:.4g}':24}{_interval(threat.accuracy)}")
            before = threat.stages["clean"]
            for attack, after in list(threat.stages.items())[1:]:
                lines.append(
                    f"  {attack:22}{100 * after:5.1f}   broke {100 * (before - after):4.1f} points "
                    f"in {threat.seconds[attack]:.1f} s, {threat.flops[attack] / 1e12:.3g} TFLOP"
                )
                before = after
            lines += [f"  note: {note}" for note in threat.notes]
        lines.append(f"{'worst case':24}{_interval(self.worst_case)}")
        lines += [f"ALARM {alarm}" for alarm in self.alarms]
        if not self.alarms:
            lines.append("no sign of masked gradients in any check that applies")
        return "\n".join(lines)


def evaluate(
    logits_fn: Callable[..., jax.Array],
    images: Any,
    labels: Any,
    *,
    threats: Mapping[str, float],
    suite: str | Callable[..., Mapping[str, Any]] = "standard",
    key: jax.Array,
    args: tuple = (),
    bounds: tuple[float, float] = (0.0, 1.0),
    curve_images: int = 200,
    card_images: int = 200,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Evaluates a deterministic classifier against one or several threats.

    Args:
        logits_fn: (x, *args) -> [b, classes], the whole defended model. Pass the same function
            object every time.
        images: [n, h, w, c] float in `bounds`.
        labels: [n] whole numbers.
        threats: radius by norm, such as {"linf": 8 / 255, "l2": 0.5}.
        suite: "standard" or "plus" (`auto_attack`), or a function (norm, eps, bounds) -> attacks by
            name.
        key: one typed key.
        args: arrays that `logits_fn` takes besides x.
        bounds: the box.
        curve_images: how many images the curve over eps is drawn from.
        card_images: how many images the report card's own attacks see.
        batch_size: examples at a time.
        mesh: spreads AutoAttack's batches over devices.
        out: a folder for the state of the evaluation, from which it goes on if it was stopped,
            the report as report.json, and the adversarial images of each threat as x_adv.npy.
        progress: show progress bars.

    Raises:
        TypeError, ValueError: as `auto_attack`; or no threat, or an unknown norm.
    """
    if not threats:
        raise ValueError("threats must name at least one norm and its radius, got none")
    if not callable(suite) and suite not in ("standard", "plus"):
        raise ValueError(f"suite must be 'standard', 'plus' or a function, got {suite!r}")
    for norm in threats:
        balls.ball(norm)
    folder = None if out is None else Path(out)
    reports, robust, correct = {}, None, None
    for number, (norm, eps) in enumerate(threats.items()):
        own = jax.random.fold_in(key, number)
        chosen = (
            suite(norm, eps, bounds) if callable(suite) else attacks_of(suite, norm, eps, bounds)
        )
        result = auto_attack(
            logits_fn,
            images,
            labels,
            eps=eps,
            norm=norm,
            version="custom",
            attacks=chosen,
            key=own,
            args=args,
            bounds=bounds,
            batch_size=batch_size,
            mesh=mesh,
            state=folder and folder / f"{norm}.npz",
            progress=progress,
        )
        correct = result.broken_by != "clean"
        robust = result.robust if robust is None else robust & result.robust
        reports[norm] = ThreatReport(
            norm=norm,
            eps=float(eps),
            accuracy=_wilson(result.robust),
            stages=result.accuracy,
            seconds=result.seconds,
            flops=_flops(logits_fn, images, args, chosen, result),
            per_class=_per_class(logits_fn, images, labels, args, result.robust),
            curve=_curve(logits_fn, images, labels, args, norm, eps, own, bounds, curve_images),
            robust=result.robust,
            broken_by=result.broken_by,
            checks=_card(
                logits_fn, images, labels, args, norm, eps, own, bounds, result, card_images
            ),
            notes=result.notes,
        )
        if folder is not None:
            _save_images(folder / f"{norm}-x_adv.npy", result.x_adv)
    report = Report(
        images=len(robust),
        suite="custom" if callable(suite) else suite,
        clean=_wilson(correct),
        worst_case=_wilson(robust),
        threats=reports,
    )
    if folder is not None:
        report.save(folder / "report.json")
    return report


def _wilson(flags):
    return tuple(metrics.wilson_interval(int(np.sum(flags)), len(flags)))


def _interval(accuracy):
    estimate, low, high = (100 * value for value in accuracy)
    return f"{estimate:5.1f}   [{low:.1f}, {high:.1f}]"


def _per_class(logits_fn, images, labels, args, robust):
    shape = jax.ShapeDtypeStruct((1, *np.shape(images)[1:]), np.float32)
    classes = classifier.class_count(logits_fn, shape, args)
    labels = np.asarray(labels)
    counts = np.bincount(labels, minlength=classes)
    held = np.bincount(labels, weights=robust, minlength=classes)
    return [float(h / c) if c else None for h, c in zip(held, counts, strict=True)]


def _flops(logits_fn, images, args, chosen, result):
    """Matrix products and convolutions of one iteration, times the iterations computed."""
    shape = np.shape(images)[1:]
    one = jax.ShapeDtypeStruct((1, *shape), np.float32)
    classes = classifier.class_count(logits_fn, one, args)
    found = {}
    for name, attack in chosen.items():
        search = attack.search(classes)

        def iteration(x, args, search=search):
            labels = jax.numpy.zeros(1, np.int32)
            keys = jax.random.split(jax.random.key(0), 1)
            rows = scheduler.Rows(x, labels, labels, jax.numpy.ones((1, 1, 1, 1)), keys, labels)
            return search.advance(logits_fn, search.begin(rows), rows, args)

        # The only loop of unknown length, FAB's projection, holds no matrix product.
        cost = flops.count_flops(iteration, one, args, while_trips=1).matmul
        found[name] = float(cost * result.iterations.get(name, 0))
    return found


@dataclasses.dataclass(frozen=True)
class _AsApply:
    """A `logits_fn` called as `apply`; equal for equal functions, so that it compiles once."""

    logits_fn: Callable[..., jax.Array]

    def __call__(self, args, x):
        return self.logits_fn(x, *args)


def _curve(logits_fn, images, labels, args, norm, eps, key, bounds, count):
    radii = [float(share * eps) for share in CURVE]
    attack = attacks.pgd(norm, eps, steps=_CURVE_STEPS, bounds=bounds)
    rows = slice(0, count)
    apply = _AsApply(logits_fn)
    held = accuracy_curve(apply, args, images[rows], labels[rows], attack, radii, key=key)
    return {"eps": radii, "accuracy": held.mean(1).tolist()}


def _card(logits_fn, images, labels, args, norm, eps, key, bounds, result, count):
    rows = slice(0, count)
    by_queries = result.broken_by[rows] == "square"
    return report_card(
        logits_fn,
        images[rows],
        labels[rows],
        eps=eps,
        norm=norm,
        key=key,
        args=args,
        bounds=bounds,
        white_box=result.robust[rows] | by_queries,
        black_box=result.robust[rows],
    )


def _plain(threat):
    """A threat's figures for JSON; per-example flags as lists."""
    fields = {field.name: getattr(threat, field.name) for field in dataclasses.fields(threat)}
    fields["robust"] = threat.robust.tolist()
    fields["broken_by"] = threat.broken_by.tolist()
    fields["checks"] = [{**check._asdict(), "verdict": check.verdict} for check in threat.checks]
    return fields


def _save_images(path, x_adv):
    content = io.BytesIO()
    np.save(content, x_adv)
    atomic_write(path, content.getvalue())
