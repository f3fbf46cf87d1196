"""Runs searches that end early for each example on its own, and keeps the device full meanwhile.

An attack on a classifier is done with an example the moment it is misclassified. A batch that waits
for its slowest example computes mostly for nothing. Here a batch is a row of slots: each holds one
example at its own iteration; a slot whose example is broken, or out of iterations, takes the next
example, or the same one's next round (a restart, another target class). So one compiled shape stays
full until the work runs out, and a smaller one finishes the rest.

What a slot computes depends on its example and key alone: but for the rounding of the kernels that
a device chooses for a shape, results are the same for every number of slots, order of examples and
number of devices.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxrobust import metrics, parallel
from jaxrobust.attacks import inputs, loop
from jaxrobust.keys import fold

# What few examples are given, as shares of the slots: each is compiled when it is first needed. A
# run that was full ends in the first of them.
_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)


State = Any


class Rows(NamedTuple):
    """What one slot works on.

    Attributes:
        x: [b, h, w, c] float32 images.
        labels: [b] true classes.
        targets: [b] classes aimed at in this round.
        eps: [b, ...] radii that broadcast to x.
        keys: [b] typed keys of this example and round; outside compiled code the raw data of the
            example's key, of which `_with_keys` makes the round's.
        rounds: [b] the round's number.
    """

    x: Array
    labels: Array
    targets: Array
    eps: Array
    keys: Array
    rounds: Array


@runtime_checkable
class Search(Protocol):
    """An attack as the scheduler runs it: hashable, with `eps` outside of it.

    Attributes:
        rounds: how often an example that holds is tried again.
        targets: how many classes the rounds aim at in turn.
        evaluations: iterations of one round.
        chunk: iterations between two looks at who is done.
        draws: 0, or how often a random model is asked at each point.
        minimal: whether rounds compete for the smallest perturbation in `norm`.
        loop: the loop's form.
    """

    rounds: int
    targets: int
    evaluations: int
    chunk: int
    draws: int
    minimal: bool
    norm: str
    loop: str

    def begin(self, rows: Rows) -> State:
        """The states of fresh slots; arrays with a leading axis [b], no network evaluated."""

    def advance(self, logits_fn: Callable, state: State, rows: Rows, args: tuple) -> State:
        """One iteration of every slot; those that are done stay as they are."""

    def outcome(self, state: State, rows: Rows) -> tuple[Array, Array]:
        """Whether each slot has broken its example [b], and with which x_adv [b, ...]."""


class Problem(NamedTuple):
    """Examples to break, on the host.

    Attributes:
        x: [n, h, w, c] float32.
        labels: [n].
        targets: [n, t] classes to aim at, round by round (round r takes column r mod t).
        eps: [n, ...] radii that broadcast to x.
        keys: [n] typed keys.
    """

    x: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    eps: np.ndarray
    keys: Array


# Called with example, round, whether it broke, and x_adv if it did.
OnDone = Callable[[int, int, bool, np.ndarray | None], None]


def run(
    search: Search,
    logits_fn: Callable,
    problem: Problem,
    jobs: list[tuple[int, int]],
    on_done: OnDone,
    *,
    args: tuple = (),
    slots: int = 128,
    mesh: Mesh | None = None,
    go_on: bool = True,
    on_turn: Callable[[int], None] = lambda computed: None,
) -> None:
    """Runs every job (example, round), and then the later rounds of examples that hold.

    Args:
        search: the attack.
        logits_fn: (x, *args) -> [b, classes].
        problem: the examples.
        jobs: where to begin: (example, first round) of those still to break.
        on_done: told of every round's end.
        args: arrays that `logits_fn` takes besides x.
        slots: examples at a time; a multiple of the devices.
        mesh: devices that the slots are spread over.
        go_on: follow a round that ends without success by the example's next one.
        on_turn: told now and then how many iterations of one example were computed, idle slots
            included, before `on_done` hears what came of them.
    """
    waiting = collections.deque(jobs)
    pool = _Pool(search, logits_fn, problem, args, mesh, fitting(slots, len(waiting), mesh))
    while waiting or pool.busy:
        pool.fill(waiting)
        small = fitting(slots, 1, mesh)
        if not waiting and pool.busy <= small < pool.slots:
            pool.shrink(small)
        on_turn(pool.slots * search.chunk)
        for example, number, x_adv in pool.turn():
            on_done(example, number, x_adv is not None, x_adv)
            if go_on and x_adv is None and number + 1 < search.rounds:
                waiting.append((example, number + 1))


def fitting(slots: int, needed: int, mesh: Mesh | None) -> int:
    """The smallest of the five shapes that is enough, or the largest."""
    devices = mesh.size if mesh else 1
    shapes = (max(int(slots * share) // devices, 1) * devices for share in _SHARES)
    return next((shape for shape in shapes if needed <= shape), slots)


class _Pool:
    """The slots: which job each holds, and its state on the device."""

    def __init__(self, search, logits_fn, problem, args, mesh, slots):
        self.search, self.logits_fn, self.problem = search, logits_fn, problem
        self.place = functools.partial(parallel.place, mesh=mesh)
        self.args, self.slots = args, slots
        self.jobs = [None] * slots
        self.age = np.zeros(slots, int)
        self.state = self.rows = None
        self.key_data = np.asarray(jax.random.key_data(problem.keys))
        self.impl = str(jax.random.key_impl(problem.keys))

    @property
    def busy(self) -> int:
        return sum(job is not None for job in self.jobs)

    def fill(self, waiting):
        """Gives free slots the next jobs."""
        free = [slot for slot, job in enumerate(self.jobs) if job is None]
        fresh = np.zeros(self.slots, bool)
        for slot in free:
            if not waiting:
                break
            self.jobs[slot], self.age[slot], fresh[slot] = waiting.popleft(), 0, True
        if not fresh.any():
            return
        rows, fresh = self.place((self._rows(), fresh))
        if self.state is None:
            self.state = _begin(self.search, self.impl, rows)
        else:
            self.state = _refill(self.search, self.impl, fresh, rows, self.state)
        self.rows = rows

    def _rows(self):
        """The rows of all slots; an empty slot repeats some example and is not looked at."""
        held = [job or (0, 0) for job in self.jobs]
        example, number = (np.asarray(column) for column in zip(*held, strict=True))
        p = self.problem
        targets = p.targets[example, number % max(p.targets.shape[1], 1)]
        return Rows(
            x=p.x[example],
            labels=p.labels[example],
            targets=targets,
            eps=p.eps[example],
            keys=self.key_data[example],
            rounds=number.astype(np.int32),
        )

    def shrink(self, slots):
        """Moves the busy slots to a smaller shape."""
        held = [slot for slot, job in enumerate(self.jobs) if job is not None]
        rows = np.resize(np.asarray(held), slots)
        self.state, self.rows = self.place(_take((self.state, self.rows), rows))
        empty = slots - len(held)
        self.jobs = [self.jobs[slot] for slot in held] + [None] * empty
        self.age = np.concatenate([self.age[held], np.zeros(empty, int)])
        self.slots = slots

    def turn(self):
        """Advances all slots and yields (example, round, x_adv or None) of those that ended."""
        self.state = loop.iterate(
            _advance,
            self.state,
            self.search.chunk,
            operands=(self.rows, self.args),
            static=(self.search, self.logits_fn, self.impl),
            form=self.search.loop,
        )
        self.age += self.search.chunk
        broken, x_adv = _outcome(
            self.search, self.logits_fn, self.impl, self.state, self.rows, self.args
        )
        broken = np.asarray(broken)
        images = np.asarray(x_adv) if broken.any() else None
        for slot, job in enumerate(self.jobs):
            over = self.age[slot] >= self.search.evaluations
            if job is not None and (broken[slot] or over):
                self.jobs[slot] = None
                yield *job, images[slot] if broken[slot] else None


def _with_keys(impl, rows):
    keys = jax.random.wrap_key_data(rows.keys, impl=impl)
    return rows._replace(keys=jax.vmap(jax.random.fold_in)(keys, rows.rounds))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(search, impl, rows):
    return search.begin(_with_keys(impl, rows))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _refill(search, impl, fresh, rows, state):
    begun = search.begin(_with_keys(impl, rows))
    chosen = lambda new, old: jnp.where(inputs.wide(fresh, new), new, old)  # noqa: E731
    return jax.tree.map(chosen, begun, state)


def _advance(static, i, state, operands):
    search, logits_fn, impl = static
    rows, args = operands
    return search.advance(logits_fn, state, _with_keys(impl, rows), args)


@jax.jit
def _take(tree, rows):
    return jax.tree.map(lambda leaf: leaf[rows], tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _outcome(search, logits_fn, impl, state, rows, args):
    broken, x_adv = search.outcome(state, rows)
    return broken & confirmed(search, logits_fn, x_adv, _with_keys(impl, rows), args), x_adv


# The draws that confirm are not those that the attack saw.
_FRESH = 2**20


def confirmed(search: Search, logits_fn: Callable, x_adv: Array, rows: Rows, args: tuple) -> Array:
    """Misclassification [b] of the images that are handed out: at the boundary, ties may flip.

    A random model is asked anew, and most of its draws decide. What is not finite is no image.
    """

    def ask(*keys):
        return metrics.misclassified(logits_fn(x_adv, *keys, *args), rows.labels)

    if search.draws:
        draw = lambda i: ask(fold(rows.keys, _FRESH + i))  # noqa: E731
        wrong = jax.lax.map(draw, jnp.arange(search.draws)).mean(0) > 0.5
    else:
        wrong = ask()
    return wrong & jnp.isfinite(x_adv).all(tuple(range(1, x_adv.ndim)))
