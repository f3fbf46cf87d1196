"""The gradient-masking report card: reasons not to believe a robust accuracy.

    for check in report_card(logits_fn, images, labels, eps=8 / 255, key=key):
        print(check.verdict, check.name, check.meaning)

A model whose gradients mislead attacks looks robust and is not. Every check is a figure with a
limit and a sentence that says what to do.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrobust import balls, inference, parallel
from jaxrobust.attacks import inputs
from jaxrobust.attacks.apgd import apgd_ce, apgd_t
from jaxrobust.attacks.square import square
from jaxrobust.evaluation import checks, given, probes
from jaxrobust.evaluation.checks import Check
from jaxrobust.evaluation.ledger import Ledger
from jaxrobust.evaluation.task import run_suite, task_of
from jaxrobust.keys import fold

# The iterative attack: its step in units of eps, its steps, and how many times more for the check.
STEP, STEPS, LONGER = 0.1, 40, 4
CURVE = (0.25, 0.5, 1.0, 2.0, 4.0)
# Which numbers are folded into the examples' keys: the curve takes those from 0 on.
_DRAW = {"longer": 100, "again": 101, "transfer": 200, "bpda": 300, "asked": 1000}

LogitsFn = Callable[..., jax.Array]


def report_card(
    logits_fn: LogitsFn,
    images: Any,
    labels: Any,
    *,
    eps: Any,
    norm: str = "linf",
    key: jax.Array,
    args: tuple = (),
    bounds: tuple[float, float] = (0.0, 1.0),
    white_box: Any = None,
    black_box: Any = None,
    surrogates: Sequence[tuple[LogitsFn, tuple]] = (),
    preprocessor: tuple[LogitsFn, LogitsFn] | None = None,
    random: bool = False,
    draws: int = 20,
    steps: int = 100,
    targets: int = 9,
    queries: int = 1000,
    indices: Any = None,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> tuple[Check, ...]:
    """Checks whether a model's gradients can be trusted to find its adversarial examples.

    A few hundred images are enough. Beside the white-box attack (steps * (1 + targets) gradients
    per example that holds, 0 if `white_box` is given) and Square (`queries` forward passes per
    example that holds, 0 if `black_box` is given), an image costs about 550 gradients, one more
    evaluation of each surrogate's 40, and as many as the curve's 40 for BPDA; times `draws` where
    the model is random. Six programs are compiled per model, none again for another eps.

    Args:
        logits_fn: (x, *args) -> [b, classes], the whole defended model; (x, keys, *args) with a
            typed key per example if `random`. Pass the same function object every time.
        images: [n, h, w, c] float in `bounds`.
        labels: [n] whole numbers.
        eps: radius, > 0, in the unit of the images.
        norm: "linf", "l2" or "l1".
        key: one typed key; example i draws from fold_in(key, indices[i]).
        args: arrays that `logits_fn` takes besides x.
        bounds: the box, finite.
        white_box: [n] bool, which examples are right under the strongest gradient attacks; None
            runs APGD-CE and APGD-T.
        black_box: [n] bool, which examples are right under attacks by queries; None runs Square on
            what the white box left.
        surrogates: (logits_fn, args) of other models of the same classes, to transfer from.
        preprocessor: (preprocess, classify), both called as (x, *args), of which the model is
            made: for BPDA.
        random: whether the model draws from the keys that it is given.
        draws: how many draws an expected gradient takes, if `random`.
        steps: iterations of the white-box attacks.
        targets: classes that APGD-T aims at.
        queries: of Square.
        indices: [n] numbers of the examples in their data set; 0 .. n - 1 by default.
        batch_size: examples at a time, rounded up to a multiple of the devices; the last batch is
            filled up.
        mesh: spreads each batch over devices; one device by default.

    Returns:
        The checks, always the same ones in the same order; those that do not apply say why.

    Raises:
        TypeError, ValueError: an argument is not of the form above, or logits are not finite.
    """
    if np.ndim(eps) or not eps > 0:
        raise ValueError(f"eps must be a number > 0, got {eps!r}")
    if isinstance(eps, np.ndarray | jax.Array):
        eps = eps.item()
    if preprocessor is not None and random:
        raise ValueError("preprocessor must be None for a random model: BPDA takes (x, *args)")
    counts = {"steps": steps, "targets": targets, "queries": queries, "batch_size": batch_size}
    for name, count in counts.items():
        inputs.check_steps(count, name)
    inputs.check_steps(draws, "draws", low=int(random))
    low, high = given.check_bounds(bounds)
    if not np.isfinite(high - low):
        raise ValueError(f"bounds must be finite, got {bounds}")
    balls.ball(norm)
    images, labels, keys = given.check_examples(images, labels, indices, key, bounds)
    args = parallel.replicate(args, mesh)
    surrogates = [(other, parallel.replicate(theirs, mesh)) for other, theirs in surrogates]
    model = _Model(
        logits_fn, images, labels, keys, args, eps, norm, (low, high), draws * random,
        parallel.rounded(min(batch_size, len(images)), mesh), mesh,
    )  # fmt: skip
    probed = model.probe(key)
    holds = _flags("white_box", white_box, len(labels))
    if holds is None:
        holds = model.white_box(steps, targets)
    queried = _flags("black_box", black_box, len(labels))
    if queried is None:
        queried = model.black_box(key, holds, queries)
    one_step, curve = model.curves()
    few = jnp.asarray(images[:8])
    repeat = None if random else probes.repeat_difference(logits_fn, few, args)
    return (
        checks.one_step(one_step, curve, model.count),
        checks.black_box(holds & ~queried),
        _transfer(model, holds, surrogates),
        checks.large_radius(curve, probed.logits.shape[1], model.count),
        checks.zero_gradient(probed.slope),
        checks.repeatable(repeat),
        checks.jump(probed),
        checks.probabilities(probed.logits),
        _convergence(model, holds),
        checks.slopes(probed),
        checks.monotone(curve, model.count),
        checks.random_gradient(probed if random else None),
        _bpda(model, holds, preprocessor),
    )


class _Model(NamedTuple):
    """What is asked, and how: every method goes over all examples in batches of one shape."""

    logits_fn: LogitsFn
    images: np.ndarray
    labels: np.ndarray
    keys: jax.Array
    args: tuple
    eps: float
    norm: str
    bounds: tuple[float, float]
    draws: int
    batch_size: int
    mesh: Mesh | None

    @property
    def count(self):
        return len(self.labels)

    @property
    def reach(self):
        """A radius that holds the middle of the box for every image: nothing can be right there."""
        size = self.images[0].size
        order = {"linf": 1.0, "l2": np.sqrt(size), "l1": float(size)}[self.norm]
        return (self.bounds[1] - self.bounds[0]) / 2 * order

    def batched(self, function, *columns):
        """function(x, labels, keys, *columns) row by row, with the last batch filled up."""
        parts = []
        columns = (self.images, self.labels, self.keys, *columns)
        for rows in inference.filled(np.arange(self.count), self.batch_size):
            chosen = parallel.place(tuple(column[rows] for column in columns), self.mesh)
            parts.append(jax.tree.map(np.asarray, function(*chosen)))
        whole = lambda *leaves: np.concatenate(leaves)[: self.count]  # noqa: E731
        return jax.tree.map(whole, *parts)

    def probe(self, key):
        shape = self.logits_fn, self.bounds, self.draws
        ways = probes.random_ways(key, self.images.shape[1:])
        found = self.batched(lambda *batch: probes.probe(*shape, *batch, self.args, ways))
        if not np.isfinite(found.logits).all():
            bad = np.flatnonzero(~np.isfinite(found.logits).all(1))
            raise ValueError(f"logits_fn must return finite logits, got others at row {bad[0]}")
        return found

    def ascend(self, eps, steps, number, *, random_start=True, source=None):
        """PGD of its own randomness `number`, on the model or on a `source` (logits_fn, args)."""
        logits_fn, args = source or (self.logits_fn, self.args)
        shape = logits_fn, self.norm, self.bounds, 0 if source else self.draws
        step = eps if steps == 1 else STEP * eps
        sizes = eps, step, steps, random_start

        def run(x, labels, keys):
            return probes.ascend(*shape, x, labels, fold(keys, number), args, *sizes)

        return self.batched(run)

    def wrong(self, x):
        ask = lambda x, labels, keys, x_adv: probes.wrong(  # noqa: E731
            self.logits_fn, self.draws, x_adv, labels, fold(keys, _DRAW["asked"]), self.args
        )
        return self.batched(ask, x)

    def white_box(self, steps, targets):
        options = {"steps": steps, "draws": self.draws, "bounds": self.bounds}
        chosen = {
            "apgd-ce": apgd_ce(self.norm, self.eps, **options),
            "apgd-t": apgd_t(self.norm, self.eps, targets=targets, **options),
        }
        return self._suite(self.logits_fn, self.args, chosen).robust

    def black_box(self, key, holds, queries):
        """Square on what holds; a random model is held to one draw, and asked again with others."""
        if not holds.any():
            return holds
        attack = {"square": square(self.norm, self.eps, queries=queries, bounds=self.bounds)}
        function, args = self.logits_fn, self.args
        if self.draws:
            function, args = probes.FixedDraw(function), (key, *args)
        found = self._suite(function, args, attack, np.flatnonzero(holds))
        x_adv = self.images.copy()
        x_adv[holds] = found.x_adv
        return holds & ~self.wrong(x_adv)

    def _suite(self, logits_fn, args, chosen, rows=slice(None)) -> Ledger:
        """Without `auto_attack`'s flags, which are among the card's own checks."""
        examples = self.images[rows], self.labels[rows], self.keys[rows]
        task = task_of(logits_fn, *examples, chosen, args, self.batch_size, self.mesh)
        return run_suite(task, chosen)[0]

    def curves(self):
        """{radius: accuracy} of the one-step attack and of PGD, each run by itself."""
        radii = {share * self.eps for share in CURVE if share * self.eps < self.reach}
        radii = sorted(radii | {self.eps, self.reach})
        one_step = {r: 1 - self.ascend(r, 1, 0, random_start=False).broken.mean() for r in radii}
        runs = {r: self.ascend(r, STEPS, i).broken for i, r in enumerate(radii)}
        return one_step, {r: 1 - broken.mean() for r, broken in runs.items()}


def _flags(name, flags, count):
    if flags is None:
        return None
    flags = np.asarray(flags)
    if flags.dtype != bool or flags.shape != (count,):
        raise ValueError(f"{name} must be [{count}] bool, got {flags.dtype} {flags.shape}")
    return flags


def _convergence(model, holds):
    longer = model.ascend(model.eps, LONGER * STEPS, _DRAW["longer"]).broken
    return checks.convergence(
        holds & (longer | model.ascend(model.eps, STEPS, _DRAW["again"]).broken)
    )


def _transfer(model, holds, surrogates):
    if not surrogates:
        return checks.skipped("transfer", "no surrogates are given")
    only = np.zeros(model.count, bool)
    for source in surrogates:
        x_adv = model.ascend(model.eps, STEPS, _DRAW["transfer"], source=source).x_adv
        only |= holds & model.wrong(x_adv)
    advice = "gradients of the model itself are masked, so add transfer to the suite"
    return checks.beaten("transfer", only, "Transfer from surrogates", advice)


def _bpda(model, holds, preprocessor):
    if preprocessor is None:
        return checks.skipped("bpda", "no preprocessor is given")
    source = probes.StraightThrough(*preprocessor), model.args
    only = holds & model.ascend(model.eps, STEPS, _DRAW["bpda"], source=source).broken
    advice = "the pre-processor's own gradient is masked, so add BPDA to the suite"
    return checks.beaten("bpda", only, "BPDA", advice)
