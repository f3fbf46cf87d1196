"""One call that evaluates a classifier against all that it is asked to withstand.

    report = jr.evaluate(logits_fn, images, labels, threats={"linf": 8 / 255}, key=key)

Robust accuracy is the per-example worst case over all attacks of all threats.
"""

import importlib.util
import io
import numbers
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrobust import attacks, balls, flops, metrics
from jaxrobust.attacks import inputs, scheduler
from jaxrobust.evaluation import checks, given
from jaxrobust.evaluation.accuracy import AsApply, accuracy_curve
from jaxrobust.evaluation.auto_attack import (
    NORMS,
    AutoAttackResult,
    auto_attack,
    by_queries,
    norm_of,
)
from jaxrobust.evaluation.auto_attack import suite as attacks_of
from jaxrobust.evaluation.corrupted import check_corruptions, corruption_accuracy
from jaxrobust.evaluation.findings import Findings
from jaxrobust.evaluation.masking import report_card
from jaxrobust.evaluation.report import Report, ThreatReport
from jaxrobust.evaluation.task import fingerprint_of
from jaxrobust.files import atomic_write
from jaxrobust.keys import numbered_keys

CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
_CURVE_STEPS = 20


def evaluate(
    logits_fn: Callable[..., jax.Array],
    images: Any,
    labels: Any,
    *,
    threats: Mapping[str, Any],
    suite: str | Callable[..., Mapping[str, Any]] = "standard",
    corruptions: Sequence[str] = (),
    key: jax.Array,
    args: tuple = (),
    bounds: tuple[float, float] = (0.0, 1.0),
    indices: Any = None,
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
        threats: radius by norm, or an attack by a name of one's own, such as
            {"linf": 8 / 255, "l2": 0.5, "spatial": jr.spatial(), "patch": jr.patch(5)}.
        suite: for the norms: "standard" or "plus" (`auto_attack`), or a function
            (norm, eps, bounds) -> attacks by name.
        corruptions: common corruptions to measure the accuracy under, at all five severities:
            `jr.data.CORRUPTIONS`, or some of them. Nobody attacks there, and they do not count in
            the worst case.
        key: one typed key; each threat draws from its name and the examples' indices.
        args: arrays that `logits_fn` takes besides x.
        bounds: the box.
        indices: [n] numbers of the examples in their data set; 0 .. n - 1 by default. With them an
            example's flags and corruptions depend neither on its row nor on the others.
        curve_images: how many of the first images the curve over eps is drawn from.
        card_images: how many of the first images the report card's own attacks see.
        batch_size: examples at a time.
        mesh: spreads the batches of AutoAttack, of the curve and of the report card over devices.
        out: a folder for the state of the evaluation (NAME.npz, NAME-card.json and
            corruptions.json), from which it goes on if it was stopped, the report as report.json,
            where matplotlib is installed its plot as report.png, and the adversarial images of each
            threat as NAME-x_adv.npy.
        progress: show progress bars.

    Returns:
        The `Report`; also in `out`.

    Raises:
        TypeError, ValueError: as `auto_attack`; or no threat, an unknown norm, an unknown
            corruption, or corruptions of images that are not in [0, 1].
        CheckpointError: `out` holds another evaluation.
        ImportError: corruptions are asked for, and their package is not installed.
    """
    if not callable(suite) and suite not in ("standard", "plus"):
        raise ValueError(f"suite must be 'standard', 'plus' or a function, got {suite!r}")
    threats = _checked_threats(threats)
    for name, count in (("curve_images", curve_images), ("card_images", card_images)):
        inputs.check_steps(count, name)
    x, y, _ = given.check_examples(images, labels, indices, key, bounds)
    check_corruptions(corruptions, images, bounds)
    classes = given.class_count(logits_fn, x.shape[1:], args)
    folder = None if out is None else Path(out)
    subject = _Subject(
        logits_fn, x, y, given.check_indices(indices, len(x)), classes, args, bounds, suite,
        curve_images, card_images, batch_size, mesh, folder, progress,
    )  # fmt: skip
    reports = {
        # By name: a threat that is added later leaves the others' keys as they are.
        name: subject.threat(name, threat, jax.random.fold_in(key, zlib.crc32(name.encode())))
        for name, threat in threats.items()
    }
    robust = np.logical_and.reduce([threat.robust for threat in reports.values()])
    report = Report(
        images=len(robust),
        suite="custom" if callable(suite) else suite,
        clean=_wilson(next(iter(reports.values())).broken_by != "clean"),
        worst_case=_wilson(robust),
        threats=reports,
        corruptions=corruption_accuracy(
            logits_fn,
            images,
            labels,
            names=corruptions,
            args=args,
            indices=indices,
            batch_size=batch_size,
            state=folder and folder / "corruptions.json",
            progress=progress,
        ),
        key={
            "impl": str(jax.random.key_impl(key)),
            "data": np.asarray(jax.random.key_data(key)).tolist(),
        },
        bounds=tuple(float(bound) for bound in bounds),
        versions=_versions(),
        device=_device(mesh),
        precision=str(jax.config.jax_default_matmul_precision or "default"),
    )
    if folder is not None:
        report.save(folder / "report.json")
        if importlib.util.find_spec("matplotlib"):
            report.plot(folder / "report.png")
    return report


def _checked_threats(threats):
    """The threats with their radii as floats; refuses what is none."""
    if not isinstance(threats, Mapping):
        raise TypeError(
            f"threats must be radii by norm or attacks by name, such as {{'linf': 8 / 255}}, got "
            f"{threats!r}"
        )
    if not threats:
        raise ValueError("threats must name at least one norm and its radius, got none")
    checked = {}
    for name, threat in threats.items():
        if isinstance(threat, np.ndarray | jax.Array) and threat.ndim == 0:
            threat = threat.item()
        if isinstance(threat, numbers.Real):
            balls.ball(name)
            inputs.check_number(f"threats[{name!r}]", threat, low=0, strict=True)
            threat = float(threat)
        elif not hasattr(threat, "search") or getattr(threat, "eps", None) is None:
            raise ValueError(
                f"threats must hold radii by norm or attacks on a classifier, got {threat!r} for "
                f"{name!r}"
            )
        checked[name] = threat
    return checked


def _versions():
    # Of this very code: what is installed under its name may be another.
    own = sys.modules[__name__.partition(".")[0]].__version__
    return {"jaxrobust": own, "jax": jax.__version__, "numpy": np.__version__}


def _device(mesh):
    one, count = (mesh.devices.flat[0], mesh.size) if mesh else (jax.devices()[0], 1)
    return f"{count} x {one.device_kind}"


class _Subject(NamedTuple):
    """What is evaluated, and how."""

    logits_fn: Callable[..., jax.Array]
    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    classes: int
    args: tuple
    bounds: tuple[float, float]
    suite: str | Callable[..., Mapping[str, Any]]
    curve_images: int
    card_images: int
    batch_size: int
    mesh: Mesh | None
    folder: Path | None
    progress: bool

    def threat(self, name: str, threat: Any, key: jax.Array) -> ThreatReport:
        """One threat: a norm's radius, or an attack."""
        of_norm = isinstance(threat, float)
        chosen = self._suite(name, threat) if of_norm else {name: threat}
        result = auto_attack(
            self.logits_fn, self.images, self.labels, eps=threat if of_norm else threat.eps,
            norm=name if name in NORMS else norm_of(threat) or name, version="custom",
            attacks=chosen, key=key, args=self.args, bounds=self.bounds, indices=self.indices,
            batch_size=self.batch_size, mesh=self.mesh, progress=self.progress,
            state=self.folder and self.folder / f"{name}.npz",
        )  # fmt: skip
        if self.folder is not None:
            _save_images(self.folder / f"{name}-x_adv.npy", result.x_adv)
        curve, card = self._curve_and_card(name, threat, key, result) if of_norm else ({}, ())
        return ThreatReport(
            norm=name,
            eps=float(np.max(result.eps)),
            attacks={attack: repr(value) for attack, value in chosen.items()},
            accuracy=_wilson(result.robust),
            stages=result.accuracy,
            seconds=result.seconds,
            flops=self._flops(chosen, result),
            per_class=self._per_class(result.robust),
            curve=curve,
            robust=result.robust,
            broken_by=result.broken_by,
            checks=card,
            card_images=len(self.images[: self.card_images]) if of_norm else 0,
            notes=result.notes,
        )

    def _curve_and_card(self, norm, eps, key, result: AutoAttackResult):
        """As they were found before, if they were."""
        keys = numbered_keys(key, self.indices)
        findings = Findings(
            self.folder and self.folder / f"{norm}-card.json",
            f"{fingerprint_of(self.images, self.labels, keys, result.attacks)} {norm} {eps}",
            self.logits_fn,
            self.images,
            self.args,
        )
        curve = findings.once(
            f"curve of {self.curve_images} images", lambda: self._curve(norm, eps, keys)
        )
        card = findings.once(
            f"checks of {self.card_images} images",
            lambda: [list(check) for check in self._card(norm, eps, key, result)],
        )
        return curve, tuple(checks.Check(*line) for line in card)

    def _suite(self, norm, eps):
        if callable(self.suite):
            return self.suite(norm, eps, self.bounds)
        return attacks_of(self.suite, norm, eps, self.bounds)

    def _flops(self, chosen, result: AutoAttackResult):
        """Matrix products and convolutions of one iteration, times the iterations computed."""
        found, one = {}, jax.ShapeDtypeStruct((1, *self.images.shape[1:]), np.float32)
        for name, attack in chosen.items():
            search = attack.search(self.classes)

            def iteration(x, args, search=search):
                labels = jax.numpy.zeros(1, np.int32)
                keys = jax.random.split(jax.random.key(0), 1)
                rows = scheduler.Rows(x, labels, labels, jax.numpy.ones((1, 1, 1, 1)), keys, labels)
                return search.advance(self.logits_fn, search.begin(rows), rows, args)

            # The only loop of unknown length, FAB's projection, holds no matrix product.
            cost = flops.count_flops(iteration, one, self.args, while_trips=1).matmul
            found[name] = float(cost * result.iterations.get(name, 0))
        return found

    def _per_class(self, robust):
        counts = np.bincount(self.labels, minlength=self.classes)
        held = np.bincount(self.labels, weights=robust, minlength=self.classes)
        return [float(h / c) if c else None for h, c in zip(held, counts, strict=True)]

    def _curve(self, norm, eps, keys):
        radii = [float(share * eps) for share in CURVE]
        attack = attacks.pgd(norm, eps, steps=_CURVE_STEPS, bounds=self.bounds)
        rows = slice(0, self.curve_images)
        apply = AsApply(self.logits_fn)
        held = accuracy_curve(
            apply, self.args, self.images[rows], self.labels[rows], attack, radii, key=keys[rows],
            batch_size=self.batch_size, mesh=self.mesh, bounds=self.bounds,
        )  # fmt: skip
        return {"eps": radii, "accuracy": held.mean(1).tolist()}

    def _card(self, norm, eps, key, result: AutoAttackResult):
        """The report card; Square's verdict is on all images if it is the suite's last attack."""
        rows, queried = slice(0, self.card_images), by_queries(result.attacks, result.broken_by)
        asked = any(isinstance(attack, attacks.Square) for attack in result.attacks.values())
        verdict = asked and queried is not None  # else the card makes its own
        card = report_card(
            self.logits_fn, self.images[rows], self.labels[rows], eps=eps, norm=norm, key=key,
            args=self.args, bounds=self.bounds, batch_size=self.batch_size, mesh=self.mesh,
            indices=self.indices[rows], black_box=result.robust[rows] if verdict else None,
            white_box=None if queried is None else (result.robust | queried)[rows],
        )  # fmt: skip
        if not verdict:
            return card
        on_all = checks.black_box(queried)
        return tuple(on_all if check.name == on_all.name else check for check in card)


def _wilson(flags):
    return tuple(metrics.wilson_interval(int(np.sum(flags)), len(flags)))


def _save_images(path, x_adv):
    content = io.BytesIO()
    np.save(content, x_adv)
    atomic_write(path, content.getvalue())
