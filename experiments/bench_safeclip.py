"""SAFECLIP's training steps beside a plain CLIP step: time, memory, and the search for neighbours.

    python -m experiments.bench_safeclip                  # the emoji's network, minutes on 2 cores
    python -m experiments.bench_safeclip --preset smoke   # seconds

All steps are timed in turn in one process and on one device, and so are the search in both pools
and their renewal by themselves; their share is of the unimodal step, the only one that asks a pool
of both kinds. For the published size (ResNet-50, 21,845 rows) operations are counted, which needs
no device.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrobust as jr
from experiments import common, records, timing
from experiments.safeclip_settings import RESNET, SMALL, Tower
from jaxrobust import data, losses, safeclip

NAME = "bench_safeclip"
PLAIN, SEARCH = "clip", "search in both pools"
README_POOL = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed."""

    tower: Tower = SMALL
    size: int = 32
    batch_size: int = 256
    pools: tuple[int, ...] = (512, 2048, 21_845)
    kinds: tuple[str, ...] = safeclip.KINDS
    # The published network, whose operations are counted.
    counted: Tower | None = RESNET
    counted_size: int = 224
    counted_batch: int = 512
    counted_pool: int = 21_845
    repeats: int = 15
    seconds: float = 240.0


PRESETS = {
    "full": Config(),
    "gpu": Config(tower=RESNET, size=224, batch_size=512, pools=(21_845,)),
    "smoke": Config(
        tower=dataclasses.replace(SMALL, width=16, depth=1), size=16, batch_size=16, pools=(32,),
        kinds=(PLAIN, "unimodal"), counted=None, repeats=2,
    ),
}  # fmt: skip


def batch_of(tower: Tower, size: int, count: int) -> dict[str, np.ndarray]:
    """Noise with random captions and two views of each."""
    draw = np.random.default_rng(0)
    return {
        "image": draw.random((count, size, size, 3), dtype=np.float32),
        "tokens": draw.integers(1, tower.vocabulary, (count, 3, tower.length)).astype(np.int32),
        "index": np.arange(count, dtype=np.int32),
    }


def step_and_state(tower: Tower, size: int, pool: int, kind: str):
    """(step, create) of one kind of training step."""
    clip, optimizer = tower.build(), safeclip.adamw()
    step = safeclip.training_step(clip, optimizer, kind, views=data.clip_views)
    create = partial(safeclip.create_state, clip, optimizer, shape=(size, size, 3), pool=pool)
    return step, create


def stepping(config: Config, pool: int, kind: str) -> tuple[Callable, dict]:
    """A function that takes one step and waits for it, and what XLA says of its memory."""
    step, create = step_and_state(config.tower, config.size, pool, kind)
    mesh = jr.parallel.data_mesh(1)  # where the search is timed too
    state = jr.parallel.create(create, mesh, jax.random.key(0))
    batch = jr.parallel.shard_batch(batch_of(config.tower, config.size, config.batch_size), mesh)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()

    def once():
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    sizes = {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "working_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    return once, sizes


def searching(config: Config, pool: int) -> Callable[[], Any]:
    """A function that asks two full pools for neighbours and renews them."""
    random = np.random.default_rng(1)
    width = config.tower.dim
    queries = losses.unit_rows(jnp.asarray(random.normal(size=(config.batch_size, width))))
    queries = queries.astype(jnp.float32)
    rows = losses.unit_rows(jnp.asarray(random.normal(size=(pool, width)).astype(np.float32)))
    held = tuple(safeclip.Pool(rows + place, *jnp.array([0, pool])) for place in range(2))

    @partial(jax.jit, donate_argnums=0)
    def run(pools):
        found = [safeclip.nearest(one, queries)[0] for one in pools]
        return tuple(safeclip.push(one, queries) for one in pools), found

    def once():
        nonlocal held
        held, found = run(held)
        jax.block_until_ready((held, found))

    return once


def counted(config: Config) -> dict[str, Any]:
    """Operations of the published steps, and the search's share of them."""
    tower, pool = config.counted, config.counted_pool
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        batch_of(tower, config.counted_size, config.counted_batch),
    )
    found = {}
    for kind in ("clip", "two_views", "unimodal"):
        step, create = step_and_state(tower, config.counted_size, pool, kind)
        state = jax.eval_shape(create, jax.random.key(0))
        found[kind] = jr.flops.count_flops(step, state, shapes).matmul
    search = 2 * 2 * config.counted_batch * tower.dim * pool  # both pools, 2 per product
    return {
        "flops": {**found, "search": search},
        "search_share": search / found["unimodal"],
        "batch_size": config.counted_batch, "pool": pool,
    }  # fmt: skip


def table(cells: list[dict[str, Any]]) -> str:
    """Seconds, memory and shares, as Markdown."""
    rows = []
    for cell in cells:
        figures, key = cell["metrics"], cell["key"]
        if "seconds_median" not in figures:
            continue
        share, memory = figures.get("search_share"), figures.get("working_bytes")
        rows.append(
            [
                str(key["pool"]), key["step"], f"{1e3 * figures['seconds_median']:.1f}",
                f"{figures['times_plain']:.2f}",
                "" if memory is None else f"{memory / 2**20:.0f}",
                "" if memory is None else f"{figures['state_bytes'] / 2**20:.1f}",
                "" if share is None else common.percent(share, 2),
            ]
        )  # fmt: skip
    header = [
        "rows of a pool", "step", "milliseconds", "times the plain step", "working memory, MiB",
        "state, MiB", "% of the unimodal step",
    ]  # fmt: skip
    return common.markdown(header, rows)


def readme_table(path: Path) -> str:
    """The rows of the pool that the authors give small sets."""
    cells = json.loads(path.read_text())["cells"]
    return table([cell for cell in cells if cell["key"]["pool"] == README_POOL])


def main(config: Config, options) -> None:
    """Times and writes."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = options.out / f"{NAME}-{options.preset if options.preset == 'smoke' else kind}.json"
    path.unlink(missing_ok=True)
    results = records.Results(path, NAME, options.preset, config)
    for pool in config.pools:
        begun, runs, sizes = time.monotonic(), {SEARCH: searching(config, pool)}, {}
        for name in config.kinds:
            runs[name], sizes[name] = stepping(config, pool, name)
        timed = timing.interleaved(runs, repeats=config.repeats, seconds=config.seconds)
        for name, figures in timed.items():
            seconds = figures["seconds_median"]
            extra = {"times_plain": seconds / timed[PLAIN]["seconds_median"], **sizes.get(name, {})}
            if name == SEARCH:
                extra["search_share"] = seconds / timed["unimodal"]["seconds_median"]
            results.add(
                {"pool": pool, "step": name}, {**figures, **extra}, time.monotonic() - begun
            )
        print(f"pools of {pool}: {time.monotonic() - begun:.0f} s", flush=True)
    if config.counted is not None:
        begun = time.monotonic()
        figures = counted(config)
        results.add({"pool": config.counted_pool, "step": "published"}, figures,
                    time.monotonic() - begun)  # fmt: skip
        print(f"published size: search {common.percent(figures['search_share'], 2)} % of the FLOPs")
    print(table(results.cells))
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS, default="full")
    main(PRESETS[chosen.preset], chosen)
