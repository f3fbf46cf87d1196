"""What attacks on classifiers share: how they are called, the classes they aim at, one evaluation.

Such an attack is called as `attack(logits_fn, x, labels, key, mask=None, args=())` and returns
misclassified images; an example that it cannot break, or that is misclassified as it is, comes back
unchanged.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxrobust import balls, losses, metrics
from jaxrobust.attacks import box, inputs, scheduler
from jaxrobust.attacks.pgd import finite_gradient
from jaxrobust.keys import example_keys, fold
from jaxrobust.losses.classification import DLR_EPSILON

LogitsFn = Callable[..., Array]

LOSSES = ("ce", "dlr", "targeted_dlr")


def loss_for(name: str | Callable, classes: int) -> Callable:
    """The loss (logits, labels, targets) -> [b] by its name, as far as the classes allow.

    DLR needs three classes and targeted DLR four. With fewer, the margin is divided by what there
    is, or not at all: of two classes the margin alone orders all points as DLR would.

    Raises:
        ValueError: an unknown name.
    """
    if callable(name):
        return name
    if name not in LOSSES:
        raise ValueError(f"loss must be a function or one of {LOSSES}, got {name!r}")
    if name == "ce":
        return _cross_entropy
    if name == "dlr":
        return _dlr if classes >= 3 else _margin
    return {2: _margin, 3: _three_class_dlr}.get(classes, losses.targeted_dlr)


def _cross_entropy(logits, labels, targets):
    return losses.cross_entropy(logits, labels)


def _dlr(logits, labels, targets):
    return losses.dlr(logits, labels)


def _margin(logits, labels, targets):
    return losses.margin(logits, labels)


def _three_class_dlr(logits, labels, targets):
    gap = logits.max(1) - logits.min(1)
    return (pick(logits, targets) - pick(logits, labels)) / (gap + DLR_EPSILON)


def pick(logits: Array, classes: Array) -> Array:
    """The logit of each row's class: [b] of [b, k]."""
    return jnp.take_along_axis(logits, classes[:, None], 1)[:, 0]


def evaluate(
    logits_fn: LogitsFn, loss: Callable, x: Array, rows: scheduler.Rows, args: tuple, draws: int = 0
) -> tuple[Array, Array, Array]:
    """Loss [b], misclassification [b] and gradient [b, ...] of one forward and backward pass.

    With `draws` > 0 the model is random, `logits_fn(x, keys, *args)`: loss and gradient are means
    over so many draws, and an example is misclassified where most of its draws are. The gradient
    is made finite.
    """

    def total(x, *keys):
        logits = logits_fn(x, *keys, *args)
        values = loss(logits, rows.labels, rows.targets)
        return values.sum(), (values, metrics.misclassified(logits, rows.labels))

    gradient = jax.grad(total, has_aux=True)
    if not draws:
        grad, (values, wrong) = gradient(x)
        return values, wrong, finite_gradient(grad)

    def add(i, sums):
        grad, (values, wrong) = gradient(x, fold(rows.keys, i))
        return jax.tree.map(jnp.add, sums, (values, wrong.astype(x.dtype), grad))

    none = inputs.per_example(x, 0)
    values, wrong, grad = jax.lax.fori_loop(0, draws, add, (none, none, jnp.zeros_like(x)))
    return values / draws, wrong > draws / 2, finite_gradient(grad / draws)


def predict(
    logits_fn: LogitsFn, x: Array, labels: Array, keys: Array, args: tuple, draws: int = 0
) -> tuple[Array, Array]:
    """Misclassification [b], of most draws where the model is random, and (mean) logits."""
    if not draws:
        logits = logits_fn(x, *args)
        return metrics.misclassified(logits, labels), logits

    def one(i):
        logits = logits_fn(x, fold(keys, i), *args)
        return metrics.misclassified(logits, labels), logits

    wrong, logits = jax.lax.map(one, jnp.arange(draws))
    return wrong.mean(0) > 0.5, logits.mean(0)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def clean_pass(
    logits_fn: LogitsFn,
    x: Array,
    labels: Array,
    keys: Array,
    args: tuple,
    targets: int,
    draws: int = 0,
) -> tuple[Array, Array, Array]:
    """Correctness [b], the likeliest wrong classes [b, targets], and the logits [b, classes]."""
    wrong, logits = predict(logits_fn, x, labels, keys, args, draws)
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[1], dtype=bool), -jnp.inf, logits)
    return ~wrong, jax.lax.top_k(others, targets)[1], logits


def class_count(logits_fn: LogitsFn, x: Array | jax.ShapeDtypeStruct, args: tuple) -> int:
    """How many logits there are; `args` begin with keys [b] where the model is random.

    Raises:
        ValueError: fewer than 2, or what is not one array [b, classes].
    """
    # Of an empty batch, a model that flattens by reshape(b, -1) cannot say it.
    one = jax.ShapeDtypeStruct((max(x.shape[0], 1), *x.shape[1:]), x.dtype)
    logits = jax.eval_shape(logits_fn, one, *args)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != one.shape[0]:
        got = f"a {type(logits).__name__}" if shape is None else f"shape {shape}"
        raise ValueError(f"logits_fn must return one array [{one.shape[0]}, classes], got {got}")
    if shape[1] < 2:
        raise ValueError(f"logits_fn must return logits of at least 2 classes, got {shape[1]}")
    return shape[1]


def break_batch(
    attack: Any,
    logits_fn: LogitsFn,
    x: ArrayLike,
    labels: ArrayLike,
    key: Array,
    mask: ArrayLike | None,
    args: Any,
    slots: int = 128,
) -> Array:
    """Runs an attack with `search(classes)` and `eps` on one batch; see the module's docstring."""
    x, mask, args = inputs.check_call(x, mask, args, attack.bounds, key)
    keys = example_keys(key, x.shape[0])
    draws = attack.draws
    if draws and not x.shape[0]:
        return x
    classes = class_count(logits_fn, x, (keys, *args) if draws else args)
    labels = inputs.check_labels(labels, x.shape[0], classes)
    if not x.shape[0]:
        return x
    search = attack.search(classes)
    base = x.astype(jnp.float32)
    eps = radii(attack.eps, mask, base)
    right, targets, _ = clean_pass(logits_fn, base, labels, keys, args, search.targets, draws)
    leaves = jax.tree.leaves((x, labels, eps, keys, args))
    data = (base, labels, targets, eps)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        broken, x_adv = _traced(search, logits_fn, *data, keys, args)
    else:
        problem = scheduler.Problem(*(np.asarray(a) for a in data), keys)
        broken, x_adv = _scheduled(search, logits_fn, problem, np.asarray(right), args, slots)
    x_adv = jnp.where(inputs.wide(broken & right, x), x_adv, base)
    if x.dtype != base.dtype:
        rows = scheduler.Rows(base, labels, labels, eps, keys, labels)
        x_adv = _rounded(search, logits_fn, attack.bounds, x, x_adv, rows, args)
    return jax.lax.stop_gradient(x_adv)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rounded(search, logits_fn, bounds, x, x_adv, rows, args):
    """The image x_adv in x's precision, inside, where it is misclassified so too; else x."""
    x_adv = box.finish(x, x_adv - rows.x, rows.eps, bounds)
    holds = scheduler.confirmed(search, logits_fn, x_adv, rows, args)
    return jnp.where(inputs.wide(holds, x), x_adv, x)


_ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}


def _scheduled(search, logits_fn, problem, right, args, slots):
    size = np.full(len(right), np.inf)
    x_adv = problem.x.copy()

    def keep(example, _number, broken, image):
        # Of several rounds that all ran, the smallest perturbation; else there is only one.
        if broken:
            length = np.linalg.norm((image - problem.x[example]).ravel(), _ORDERS[search.norm])
            if length < size[example]:
                x_adv[example], size[example] = image, length

    rounds = range(search.rounds if search.minimal else 1)
    jobs = [(int(i), r) for r in rounds for i in np.flatnonzero(right)]
    scheduler.run(
        search, logits_fn, problem, jobs, keep, args=args, slots=slots, go_on=not search.minimal
    )
    return jnp.asarray(np.isfinite(size)), jnp.asarray(x_adv)


def radii(eps: Any, mask: ArrayLike | None, x: Array) -> Array:
    """One radius per example and, where asked for, per pixel: [b, 1...] or [b, ...]."""
    eps = balls.broadcast_radius(eps, x)
    if mask is not None:
        eps = eps * balls.broadcast_radius(mask, x, "mask")
    eps = eps.reshape((1,) * x.ndim) if eps.ndim == 0 else eps
    return jnp.broadcast_to(eps, (x.shape[0], *eps.shape[1:]))


def _traced(search, logits_fn, x, labels, targets, eps, keys, args):
    """Inside jit or vmap nothing can be left out: every round runs on every example."""

    def one_round(number, found):
        size, x_adv = found
        aim, rounds = targets[:, number % targets.shape[1]], jnp.full(len(x), number)
        rows = scheduler.Rows(x, labels, aim, eps, fold(keys, number), rounds)
        state = search.begin(rows)
        step = lambda _, state: search.advance(logits_fn, state, rows, args)  # noqa: E731
        state = jax.lax.fori_loop(0, search.evaluations, step, state)
        hit, x_hit = search.outcome(state, rows)
        hit &= scheduler.confirmed(search, logits_fn, x_hit, rows, args)
        length = jnp.where(hit, balls.norms(x_hit - x, search.norm), jnp.inf)
        better = length < size if search.minimal else hit & jnp.isinf(size)
        kept = jnp.where(inputs.wide(better, x), x_hit, x_adv)
        return jnp.where(better, length, size), kept

    found = (inputs.per_example(x, jnp.inf), x)
    size, x_adv = jax.lax.fori_loop(0, search.rounds, one_round, found)
    return jnp.isfinite(size), x_adv
