"""One run of a suite: attack after attack on the examples that hold, in batches, resumable."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxrobust import parallel
from jaxrobust.attacks import classifier, inputs, scheduler
from jaxrobust.evaluation import given
from jaxrobust.evaluation.ledger import Ledger
from jaxrobust.keys import fold

# Logits that a state keeps, to tell models apart.
_KEPT_LOGITS = 100_000


class Task(NamedTuple):
    """What a suite is to break, and in which batches; made by `task_of`.

    Attributes:
        logits_fn: (x, *args) -> [b, classes], or (x, keys, *args) with draws > 0.
        images: [n, h, w, c] float32.
        labels: [n] int32.
        keys: [n] typed keys.
        args: on the devices.
        classes: how many logits there are.
        draws: of a random model, or 0.
        slots: examples at a time, at most.
        mesh: devices that they are spread over.
    """

    logits_fn: Callable[..., jax.Array]
    images: np.ndarray
    labels: np.ndarray
    keys: jax.Array
    args: tuple
    classes: int
    draws: int
    slots: int
    mesh: Mesh | None

    @property
    def starts(self) -> range:
        """Rows at which batches begin."""
        return range(
            0, len(self.images), scheduler.fitting(self.slots, len(self.images), self.mesh)
        )

    def batch(self, start: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images, labels and keys; what is missing in the last batch is its last example."""
        last = len(self.images) - 1
        rows = np.minimum(np.arange(start, start + self.starts.step), last)
        columns = self.images[rows], self.labels[rows]
        x, y = parallel.place(columns, self.mesh)
        return x, y, self.keys[rows]

    def clean_pass(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Correctness [n], the likeliest wrong classes [n, t], and the logits [n, classes].

        Raises:
            ValueError: logits are not finite.
        """
        parts = [
            classifier.clean_pass(
                self.logits_fn, *self.batch(start), self.args, self.classes - 1, self.draws
            )
            for start in self.starts
        ]
        correct, targets, logits = (
            np.concatenate([np.asarray(p) for p in column])[: len(self.images)]
            for column in zip(*parts, strict=True)
        )
        if not np.isfinite(logits).all():
            bad = np.flatnonzero(~np.isfinite(logits).all(1))
            raise ValueError(
                f"logits_fn must return finite logits, got others for {len(bad)} images, "
                f"the first at row {bad[0]}"
            )
        return correct, targets, logits


def task_of(
    logits_fn: Any,
    images: np.ndarray,
    labels: np.ndarray,
    keys: jax.Array,
    chosen: Mapping[str, Any],
    args: Any,
    batch_size: Any,
    mesh: Mesh | None,
) -> Task:
    """The task of a suite `chosen`, of examples that `given.check_examples` let pass.

    Raises:
        TypeError, ValueError: logits_fn, labels or batch_size are not of `auto_attack`'s form, or
            the attacks are at odds about a random model.
    """
    draws = {attack.draws for attack in chosen.values()}
    if len(draws) > 1:
        raise ValueError(f"attacks must agree on draws of a random model, got {sorted(draws)}")
    slots, draws = _slots(batch_size, mesh), draws.pop()
    rows = scheduler.fitting(slots, len(images), mesh)
    args = inputs.check_args(args)
    args = parallel.replicate(args, mesh)
    classes = given.class_count(logits_fn, images.shape[1:], args, draws=draws, rows=rows)
    inputs.check_labels(labels, len(labels), classes)
    return Task(logits_fn, images, labels, keys, args, classes, draws, slots, mesh)


def run_suite(
    task: Task,
    chosen: Mapping[str, Any],
    *,
    state: str | Path | None = None,
    save_every: float = 10.0,
    progress: bool = False,
) -> tuple[Ledger, np.ndarray]:
    """Attacks one after another on what holds: who was broken by what, and the clean logits.

    Args:
        task: what to break.
        chosen: the attacks by name.
        state: as in `auto_attack`, like all that follow.
        save_every: seconds.
        progress: show a progress bar.

    Raises:
        ValueError: logits are not finite, or `state` holds another evaluation.
    """
    images, labels, keys = task.images, task.labels, task.keys
    correct, targets, logits = task.clean_pass()
    searches = {name: attack.search(task.classes) for name, attack in chosen.items()}
    ledger = Ledger(
        state,
        save_every,
        fingerprint_of(images, labels, keys, chosen),
        images,
        correct,
        logits[: max(_KEPT_LOGITS // task.classes, 1)],
        tuple(chosen),
    )
    for number, (name, search) in enumerate(searches.items()):
        jobs = ledger.jobs(name, search.rounds)
        if name in ledger.finished:
            continue
        ledger.begin(name)
        problem = scheduler.Problem(
            x=images,
            labels=labels,
            targets=targets[:, : search.targets],
            eps=radii_of(chosen[name].eps, images),
            keys=fold(keys, number),
        )
        with tqdm(total=len(jobs), desc=name, unit="image", disable=not progress) as bar:

            def done(example, number, broken, x_adv, rounds=search.rounds, bar=bar):
                ledger.record(example, number, x_adv if broken else None)
                bar.update(broken or number + 1 == rounds)
                bar.set_postfix_str(f"{ledger.robust.mean():.1%} hold", refresh=False)

            scheduler.run(
                search, task.logits_fn, problem, jobs, done, args=task.args, slots=task.slots,
                mesh=task.mesh, on_turn=ledger.spend,
            )  # fmt: skip
        ledger.end(name)
    return ledger, logits


def _slots(batch_size, mesh):
    inputs.check_steps(batch_size, "batch_size")
    return parallel.rounded(2 ** (int(batch_size).bit_length() - 1), mesh)


def radii_of(eps: Any, images: np.ndarray) -> np.ndarray:
    """Radii [n, 1, 1, 1], or [n, h, w, c] from a map."""
    return np.asarray(classifier.radii(eps, None, jnp.asarray(images)))


def fingerprint_of(images, labels, keys, chosen):
    """Tells whether a state belongs to this evaluation: data, and attacks in their order."""
    digest = hashlib.sha256()
    for part in (images, labels, jax.random.key_data(keys)):
        digest.update(np.ascontiguousarray(part).tobytes())
    words = [[name, dataclasses.asdict(attack)] for name, attack in chosen.items()]
    digest.update(json.dumps(words, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value):
    """Arrays as numbers, functions by their names."""
    return value.__qualname__ if callable(value) else np.asarray(value).tolist()
