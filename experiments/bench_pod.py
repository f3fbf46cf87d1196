"""A PGD-10 adversarial training step compiled for TPU v5e slices, without a TPU: an estimate.

    pip install -e '.[tpu]'
    python -m experiments.bench_pod                   # hours on 2 cores; resumes program by program
    python -m experiments.bench_pod --only vit_b_16_remat --chips 4
    python -m experiments.bench_pod --preset quick    # WideResNet-10-4 on 4 chips
    python -m experiments.bench_pod --preset smoke    # fake CPU devices, no libtpu, seconds

The TPU compiler runs on a plain CPU machine and gives the program of one chip: its memory, its
collectives and what it moves. FLOPs are counted on the jaxpr. From these and the chip's published
peaks comes a roofline bound on the time of a step and on weak-scaling efficiency. Nothing ran on a
TPU: every such figure is named "estimated", and it is a bound that real steps do not reach.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrobust as jr
from experiments import common, records, roofline
from jaxrobust import training

NAME = "bench_pod"
CHIP = roofline.V5E

WRN = {"name": "wide_resnet", "norm": "batch", "depth": 34, "width": 10}
VIT = {"name": "vit_preset", "size": "B/16", "classes": 1000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One training step.

    Attributes:
        model: for `jaxrobust.models.build`.
        shape: of an image.
        batch: images per chip.
        dtype: compute dtype of the training forward and backward; the attack's is float32.
        precision: of float32 products. On a TPU "default" multiplies in bfloat16, once, and
            "highest" in six passes that reach float32.
        accumulate: parts that the batch is worked off in.
        slices: sides of the meshes of chips that it is compiled for; (2, 2), (8, 8) and (16, 16)
            are 4, 64 and 256 chips.
    """

    model: Mapping[str, Any]
    shape: tuple[int, int, int]
    batch: int
    dtype: str = "bfloat16"
    precision: str = "default"
    accumulate: int = 1
    slices: tuple[tuple[int, int], ...] = ((2, 2),)


ALL_SLICES = ((2, 2), (8, 8), (16, 16))
CIFAR, IMAGENET = (32, 32, 3), (224, 224, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is compiled."""

    programs: Mapping[str, Program]
    attack_steps: int = 10
    eps: float = 8 / 255
    platform: str = "tpu"


PRESETS = {
    "full": Config(
        programs={
            "wrn_34_10": Program(model=WRN, shape=CIFAR, batch=128, slices=ALL_SLICES),
            "wrn_34_10_float32": Program(
                model=WRN, shape=CIFAR, batch=128, dtype="float32", precision="highest"
            ),
            "vit_b_16": Program(model=VIT, shape=IMAGENET, batch=128),
            "vit_b_16_remat": Program(
                model={**VIT, "remat": True}, shape=IMAGENET, batch=128, slices=ALL_SLICES
            ),
            "vit_b_16_accumulate4": Program(model=VIT, shape=IMAGENET, batch=128, accumulate=4),
        }
    ),
    "quick": Config(
        programs={
            "wrn_10_4": Program(model={**WRN, "depth": 10, "width": 4}, shape=CIFAR, batch=128)
        }
    ),
    "smoke": Config(
        programs={
            "wrn_10_1": Program(
                model={**WRN, "depth": 10, "width": 1},
                shape=(8, 8, 3),
                batch=4,
                dtype="float32",
                slices=((1, 1), (2, 1)),
            ),
        },
        attack_steps=3,
        platform="cpu",
    ),
}


def require_libtpu() -> None:
    """Stops with the command that installs the TPU compiler where it is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit(
            f"bench_pod needs the TPU compiler libtpu: pip install 'jax[tpu]=={jax.__version__}'"
        )


def quiet_tpu() -> None:
    """Keeps libtpu from looking for a TPU and from writing about not finding one."""
    jax.config.update("jax_platforms", "cpu")
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # A compiler takes no chip: two may run, and one that was killed must not block the next.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def mesh_of(platform: str, sides: tuple[int, int]) -> jax.sharding.Mesh:
    """A slice's chips, real or described, on the axis that splits the batch."""
    if platform == "cpu":
        return jr.parallel.data_mesh(math.prod(sides))
    from jax.experimental import topologies

    name = f"v5e:{sides[0]}x{sides[1]}"
    return jr.parallel.data_mesh(
        list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    )


def mapped_step(
    program: Program, config: Config, mesh: jax.sharding.Mesh, *, attack_steps: int | None = None
) -> tuple:
    """The step over the mesh and its abstract arguments; `attack_steps=0` trains on clean images.

    Returns:
        (function of (state, batch), state, batch).
    """
    model = jr.models.build(**program.model)
    optimizer = training.sgd(0.1, momentum=0.9, weight_decay=5e-4)
    steps = config.attack_steps if attack_steps is None else attack_steps
    # The form of the loop that an accelerator gets; "auto" would look at this host's CPU.
    attack = jr.linf_pgd(config.eps, steps=max(steps, 1), loop="fused")
    objective = training.adversarial(attack) if steps else training.standard()
    dtype = None if program.dtype == "float32" else jnp.dtype(program.dtype)
    step = training.train_step(
        model, optimizer, objective, accumulate=program.accumulate, dtype=dtype
    )
    state = jax.eval_shape(
        lambda key: training.create_state(model, optimizer, key, program.shape), jax.random.key(0)
    )
    size = program.batch * mesh.size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *program.shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    whole, split = (NamedSharding(mesh, spec) for spec in (P(), P(jr.parallel.AXIS)))
    return (
        jr.parallel.data_parallel(step, mesh),
        _sharded(state, whole),
        _sharded(batch, split),
    )


def _sharded(tree, sharding):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def flop_counts(program: Program, config: Config, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """FLOPs of a step per chip, counted on its jaxpr, and in bfloat16 passes."""

    def count(program, steps, **options):
        arguments = mapped_step(program, config, mesh, attack_steps=steps)
        counts = jr.flops.count_flops(*arguments, **options)
        return counts.total / mesh.size, counts.matmul / mesh.size

    total, products = count(program, config.attack_steps)
    _, trained = count(program, 0)
    # What XLA counts: of loops one trip, of convolutions no padding.
    part = dataclasses.replace(program, accumulate=1, batch=program.batch // program.accumulate)
    once, _ = count(part, 1, count_padding=False)
    passes = roofline.FLOAT32_PASSES[program.precision]
    train_passes = 1 if program.dtype == "bfloat16" else passes
    return {
        "flops": total,
        "product_flops": products,
        "attack_product_flops": products - trained,
        "flops_loops_once": once,
        "product_flops_in_bfloat16_passes": (products - trained) * passes + trained * train_passes,
    }


def cell(program: Program, config: Config, sides: tuple[int, int]) -> dict[str, Any]:
    """Compiles a program for a slice of chips and reads what one chip does in a step."""
    mesh = mesh_of(config.platform, sides)
    with jax.default_matmul_precision(program.precision):
        counts = flop_counts(program, config, mesh)
        step, state, batch = mapped_step(program, config, mesh)
        # Donation is an option of the outer function too: an inner one's is not looked at.
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {**counts, **roofline.too_large(error)}
    analysis = compiled.cost_analysis()
    cost = roofline.program_cost(compiled.as_text())
    return {
        **counts,
        "xla_flops_loops_once": analysis["flops"],
        "bytes_accessed": cost.bytes,
        "bytes_accessed_hbm": cost.hbm_bytes,
        "bytes_accessed_loops_once": cost.bytes_loops_once,
        "xla_bytes_accessed_loops_once": analysis["bytes accessed"],
        **roofline.memory_use(compiled, CHIP),
        "collectives": cost.collectives,
        **roofline.estimate(counts["product_flops_in_bfloat16_passes"], cost, sides, CHIP),
    }


HEADER = [
    "program (estimated for TPU v5e; not run)",
    "chips",
    "TFLOP per chip",
    "memory needed, GB of 16",
    "all-reduces",
    "MB reduced",
    "estimated step, ms: overlapped / not",
    "estimated images/s",
    "estimated weak-scaling efficiency, overlapped / not",
]


def table(results: records.Results, config: Config) -> str:
    """The cells as Markdown; what was not compiled says so."""
    rows = []
    for name, program in config.programs.items():
        first = results.find(key_of(name, program, program.slices[0]))
        for sides in program.slices:
            found = results.find(key_of(name, program, sides))
            rows.append(_row(name, program, sides, found and found["metrics"], first))
    return common.markdown(HEADER, rows)


def readme_table(path: Path) -> str:
    """The table of a results file of the preset "full"."""
    config = PRESETS["full"]
    if not path.exists():
        raise SystemExit(f"{path} is not there: run python -m experiments.{NAME}")
    return table(records.Results(path, NAME, "full", config), config)


def _row(name, program, sides, metrics, first):
    chips = math.prod(sides)
    if metrics is None:
        return [name, str(chips), "not run", *[""] * 6]
    memory = f"{metrics['needed_bytes'] / 1e9:.2f}"
    work = [name, str(chips), f"{metrics['flops'] / 1e12:.2f}"]
    if not metrics["fits"]:
        return [*work, memory + " (does not fit)", *[""] * 5]
    kinds = ("overlapped", "not_overlapped")
    times = [metrics[f"estimated_step_seconds_{kind}"] for kind in kinds]
    base = first["metrics"] if first and first["metrics"]["fits"] else metrics
    sums = metrics["collectives"].get("all-reduce", {"count": 0, "bytes": 0})
    return [
        *work,
        memory,
        str(sums["count"]),
        f"{sums['bytes'] / 1e6:.1f}",
        " / ".join(f"{1e3 * t:.1f}" for t in times),
        f"{chips * program.batch / times[1]:.0f}",
        " / ".join(
            common.percent(base[f"estimated_step_seconds_{kind}"] / t) + " %"
            for kind, t in zip(kinds, times, strict=True)
        ),
    ]


def key_of(name: str, program: Program, sides: tuple[int, int]) -> dict[str, Any]:
    """A cell's key in the results file."""
    options = {k: getattr(program, k) for k in ("batch", "dtype", "precision", "accumulate")}
    topology = f"{sides[0]}x{sides[1]}"
    return {"program": name, "chips": math.prod(sides), "topology": topology, **options}


def main(
    config: Config, results: records.Results, only: set[str] | None, chips: set[int] | None
) -> None:
    """Compiles what is asked for and not in the results yet, then prints the table."""
    wanted = [
        (name, program, sides)
        for name, program in config.programs.items()
        for sides in program.slices
        if (not only or name in only) and (not chips or math.prod(sides) in chips)
    ]
    todo = [work for work in wanted if results.find(key_of(*work)) is None]
    if todo and config.platform == "tpu":
        require_libtpu()
        # Programs for a TPU that is not there can be written to the cache but not read back.
        jax.config.update("jax_enable_compilation_cache", False)
    for number, (name, program, sides) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {name} for {sides[0]}x{sides[1]} ...", file=sys.stderr)
        begun = time.perf_counter()
        metrics = cell(program, config, sides)
        results.add(key_of(name, program, sides), metrics, time.perf_counter() - begun)
    print(table(results, config))


def selection() -> tuple[set[str], set[int]]:
    """`--only` and `--chips`, taken out of the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", nargs="+", default=[], help="names of programs")
    parser.add_argument("--chips", nargs="+", type=int, default=[], help="sizes of slices")
    found, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return set(found.only), set(found.chips)


if __name__ == "__main__":
    quiet_tpu()
    only, chips = selection()
    options = common.arguments(__doc__, PRESETS, default="full", devices=2)
    config = PRESETS[options.preset]
    ending = "tpu-v5e" if options.preset == "full" else options.preset
    path = options.out / f"{NAME}-{ending}.json"
    main(config, records.Results(path, NAME, options.preset, config), only, chips)
