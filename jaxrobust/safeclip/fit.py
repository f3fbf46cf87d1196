"""Pre-training from the first step to the last: resumable inside a pass, on any number of devices.

recipe = safeclip.Recipe(epochs=24, batch_size=256)
fitted = safeclip.fit(clip, recipe, pairs.images, tokens, views=views, directory="runs/one")
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxrobust import data, identity, parallel, processes
from jaxrobust.attacks.inputs import check_steps
from jaxrobust.data import stored_images
from jaxrobust.data.stored_images import Images
from jaxrobust.models import Clip
from jaxrobust.safeclip.rates import safe_count
from jaxrobust.safeclip.recipe import Recipe, passes
from jaxrobust.safeclip.scoring import similarities
from jaxrobust.safeclip.split import first_split, fit_mixture, largest, most_similar
from jaxrobust.safeclip.steps import Views, adamw, create_state, training_step
from jaxrobust.training import TrainState
from jaxrobust.training.saver import Saver

_SCORES = 0x5C0E


class Trust(NamedTuple):
    """What is known of the pairs.

    Attributes:
        scores: [n] float32 similarities, or their running average.
        weights: [n] float32 of the splitter.
        safe: [n] bool; all are safe before the first split.
    """

    scores: np.ndarray
    weights: np.ndarray
    safe: np.ndarray


class Pretrained(NamedTuple):
    """What a run gives.

    Attributes:
        state: after the last step.
        trust: of the last epoch.
        history: one dict per epoch: epoch, losses and steps by kind of pass, and what `evaluate`
            returned; after the split also the safe share and, where one was made, the fallback.
        seconds: wall time of all training, over all interruptions; compilation included.
    """

    state: TrainState
    trust: Trust
    history: list[dict]
    seconds: float

    @property
    def variables(self) -> dict:
        """What `clip.encode_image` takes."""
        return self.state.variables()


def fit(
    clip: Clip,
    recipe: Recipe,
    images: Any,
    tokens: Any,
    *,
    views: Views | None = None,
    seed: int = 0,
    start: dict | None = None,
    mesh: Mesh | None = None,
    mapping: str = "shard_map",
    dtype: Any = None,
    evaluate: Callable[[int, dict, Trust], dict] | None = None,
    directory: str | Path | None = None,
    save_every: float = 30.0,
    save_steps: int | None = None,
    progress: bool = True,
    label: str = "pre-training",
) -> Pretrained:
    """Trains a dual encoder on pairs of which some may be poisoned.

    Args:
        clip: the dual encoder.
        recipe: the settings.
        images: [n, h, w, c] float32 in [0, 1]: an array, or `data.StoredImages`, decoded batch by
            batch while the devices work.
        tokens: [n, 1 + v, t] int32: the caption, then views of it.
        views: (keys, images) -> images, one random view; None leaves images as they are.
        seed: of the weights, the order and the views.
        start: variables to begin from instead of fresh ones.
        mesh: the devices; all by default.
        mapping: of `parallel.data_parallel`.
        dtype: compute type of the encoders.
        evaluate: (epoch, variables, trust) -> numbers for the history, after each epoch; as JSON
            has them.
        directory: where checkpoints go; a run that is there is gone on with, and ends bit-equal to
            one that was never stopped (on GPUs as of `training.fit`). It must have the same pairs
            and settings; of images on disk some files are compared, and of functions the name and
            what a `functools.partial` holds.
        save_every: seconds between checkpoints; more where saving takes over 5 % of the time.
        save_steps: save every so many steps instead.
        progress: show a progress bar.
        label: of the bar.

    Raises:
        ValueError: pairs that do not fit together, fewer than a batch, no views for a scoring
            that needs them, or a number out of its range.
        ImportError: the splitter's package is missing.
        checkpoint.CheckpointError: `directory` holds another run.
    """
    images, tokens = stored_images.checked(images), np.asarray(tokens)
    _check(clip, images, tokens, recipe, views)
    if save_steps is not None:
        check_steps(save_steps, "save_steps")
    mesh = parallel.data_mesh() if mesh is None else mesh
    local = parallel.data_mesh(mesh.local_devices)
    optimizer = adamw(recipe.weight_decay)

    @functools.cache
    def step_of(kind):
        made = training_step(clip, optimizer, kind, views=views, rows=recipe.rows, dtype=dtype)
        return parallel.data_parallel(made, mesh, mapping=mapping)

    def create(key, start):
        shape = images.shape[1:]
        return create_state(clip, optimizer, key, shape, pool=recipe.pool, start=start)

    start = None if start is None else jax.tree.map(np.asarray, start)
    state = parallel.create(create, mesh, jax.random.key(seed), start)
    nothing = np.zeros(len(images), np.float32)
    trust = Trust(nothing, nothing + 1, np.ones(len(images), bool))
    this_run = {
        "seed": seed, "pairs": len(images), "data": _identity(images, tokens),
        "network": clip.config, "views": identity.describe(views),
        "splitter": identity.describe(recipe.splitter), "dtype": identity.describe(dtype),
        "start": None if start is None else identity.digest(start), **recipe.numbers,
    }  # fmt: skip
    saver = Saver(directory, this_run, every=save_every, steps=save_steps)
    loop = {
        "epoch": 1, "pass": 0, "step": 0, "last_split": 0, "first_share": 0.0, "fallback": "",
        "losses": {}, "history": [],
    }  # fmt: skip
    (state, trust), loop = saver.restored((state, trust), loop)
    trust = Trust(*map(np.asarray, trust))
    bar = tqdm(
        total=recipe.epochs, initial=loop["epoch"] - 1, desc=label, unit="epoch",
        disable=not progress or jax.process_index() > 0,
    )  # fmt: skip
    with bar:
        while loop["epoch"] <= recipe.epochs:
            if recipe.splits(loop["epoch"]) and loop["last_split"] != loop["epoch"]:
                score = functools.partial(
                    similarities, clip, state.variables(), images, tokens, views=views, mesh=local
                )
                trust = _split(
                    recipe,
                    trust,
                    loop,
                    score,
                    jax.random.fold_in(jax.random.key(seed), _SCORES + loop["epoch"]),
                )
            work = passes(recipe, loop["epoch"], len(images), trust.safe, loop["first_share"])
            for number in range(loop["pass"], len(work)):
                batches = _batches(images, tokens, work[number].rows, recipe, seed, loop, mesh)
                if loop["step"] == 0:
                    # On the mesh like all of the state: elsewhere it would cost a compilation.
                    rate = parallel.create(_same, mesh, work[number].rate)
                    state = state._replace(extra=state.extra._replace(rate=rate))
                step, kind = step_of(work[number].kind), work[number].kind
                state = _run(step, state, trust, loop, kind, batches, saver)
                loop.update({"pass": number + 1, "step": 0})
            _close(loop, state, trust, evaluate)
            bar.update()
    saver.save(int(state.step), (state, trust), loop)
    return Pretrained(state, trust, loop["history"], saver.seconds)


def _split(recipe: Recipe, trust: Trust, loop: dict, score: Callable, key: jax.Array) -> Trust:
    """Scores all pairs and makes the epoch's safe set; the same one on all hosts."""
    found = score(scoring=recipe.scoring, draws=recipe.draws, neighbours=recipe.neighbours, key=key)
    epoch, is_first = loop["epoch"], not loop["last_split"]
    if not is_first:
        found = recipe.memory * trust.scores + (1 - recipe.memory) * found
    # As a checkpoint holds them: a run that goes on must remember the same.
    scores = found.astype(np.float32)
    weights = np.asarray(recipe.splitter(scores), np.float32)
    if is_first:
        safe, loop["fallback"] = first_split(
            weights, scores, threshold=recipe.threshold, bounds=recipe.bounds,
            fallback=recipe.fallback, bimodal=recipe.bimodal,
        )  # fmt: skip
        if loop["fallback"]:
            warnings.warn(
                f"epoch {epoch}: {loop['fallback']}, so the best {recipe.fallback:.0%} are safe",
                stacklevel=3,
            )
    else:
        count = safe_count(recipe.fraction(loop["first_share"], epoch), len(scores))
        # Weights that were not believed do not say who comes next either.
        choose = most_similar if loop["fallback"] else largest
        safe = choose(weights, scores, count)
    loop["last_split"] = epoch
    trust = Trust(*map(processes.from_first_process, (scores, weights, safe)))
    if trust.safe.sum() < recipe.batch_size:
        warnings.warn(
            f"epoch {epoch}: {trust.safe.sum()} safe pairs are fewer than a batch of "
            f"{recipe.batch_size}, so no image meets its caption",
            stacklevel=3,
        )
    if is_first:
        loop["first_share"] = float(trust.safe.mean())
    return trust


def _batches(
    images: Images, tokens: np.ndarray, rows: np.ndarray, recipe: Recipe, seed: int,
    loop: dict, mesh: Mesh,
) -> Iterator[Any]:  # fmt: skip
    """The pass's batches from where it stands, on their devices, each process its share."""
    # An epoch has two passes at most, each with an order of its own.
    order = rows[data.epoch_order(len(rows), seed=seed, epoch=2 * loop["epoch"] + loop["pass"])]
    size, own, all_ = recipe.batch_size, jax.process_index(), jax.process_count()
    share = slice(own * size // all_, (own + 1) * size // all_)
    chosen = (
        order[k * size : (k + 1) * size][share] for k in range(loop["step"], len(order) // size)
    )
    made = (
        {"image": np.asarray(images[part]), "tokens": tokens[part], "index": part.astype(np.int32)}
        for part in chosen
    )
    return data.prefetch(made, lambda batch: parallel.shard_batch(batch, mesh))


def _same(tree: Any) -> Any:
    return tree


def _run(step, state, trust, loop, kind: str, batches, saver) -> TrainState:
    """One pass, or what is left of it."""
    waiting = []
    for position, batch in enumerate(batches, int(state.step)):
        # Before a step, for after the last one of an epoch its evaluation is still to come.
        if saver.is_due(position):
            _settle(loop, kind, waiting)
            saver.save(position, (state, trust), loop)
        state, metrics = step(state, batch)
        waiting.append(metrics["loss"])
        loop["step"] += 1
    _settle(loop, kind, waiting)
    return state


def _settle(loop: dict, kind: str, waiting: list) -> None:
    """Adds the losses of the last steps up, in their order: a stopped run has the same sums."""
    total, count = loop["losses"].get(kind, (0.0, 0))
    for value in waiting:
        total += float(value)
    loop["losses"][kind] = (total, count + len(waiting))
    waiting.clear()


def _close(loop: dict, state: TrainState, trust: Trust, evaluate) -> None:
    """Notes the epoch and begins the next."""
    entry = {"epoch": loop["epoch"]}
    for kind, (total, count) in loop["losses"].items():
        entry[f"loss_{kind}"] = total / max(count, 1)
        entry[f"steps_{kind}"] = count
    if loop["last_split"]:
        entry |= {"safe_share": float(trust.safe.mean()), "fallback": loop["fallback"]}
    if evaluate is not None:
        found = evaluate(loop["epoch"], state.variables(), trust)
        # As a checkpoint gives it back.
        entry |= json.loads(json.dumps(found, default=lambda value: np.asarray(value).tolist()))
    loop["history"] = [*loop["history"], entry]
    loop.update({"epoch": loop["epoch"] + 1, "pass": 0, "step": 0, "losses": {}})


def _identity(images: Images, tokens: np.ndarray) -> str:
    """Digest of the pairs."""
    digest = hashlib.sha256(stored_images.identity(images))
    digest.update(np.ascontiguousarray(tokens))
    return digest.hexdigest()


def _check(
    clip: Clip, images: Images, tokens: np.ndarray, recipe: Recipe, views: Views | None
) -> None:
    if tokens.ndim != 3 or len(images) != len(tokens):
        raise ValueError(
            f"tokens must be [n, 1 + v, t] for the {len(images)} images, got {tokens.shape}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be whole numbers, got {tokens.dtype}")
    known = clip.config.get("vocabulary", np.inf)
    if tokens.min() < 0 or tokens.max() >= known:
        raise ValueError(
            f"tokens must be in [0, {known}), the network's vocabulary, got {tokens.min()} to "
            f"{tokens.max()}"
        )
    if len(images) < recipe.batch_size:
        raise ValueError(
            f"batch_size must be <= {len(images)}, the number of pairs, got {recipe.batch_size}"
        )
    if recipe.method != "safeclip":
        return
    if recipe.scoring == "agreement" and recipe.neighbours >= len(images):
        raise ValueError(
            f"neighbours must be < {len(images)}, the number of pairs, got {recipe.neighbours}"
        )
    if recipe.scoring == "augmented" and views is None:
        raise ValueError("views must be given for scoring='augmented', got None")
    # Else a splitter that cannot work would say so after days of warm-up.
    scores = np.linspace(-1, 1, len(images))
    recipe.splitter(scores)
    if recipe.bimodal:
        fit_mixture(scores)
