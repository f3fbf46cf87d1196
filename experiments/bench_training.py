"""PGD adversarial training: steps per second against PyTorch, memory, and scaling over devices.

    pip install -e '.[bench]'
    python -m experiments.bench_training                  # about 15 minutes on 2 cores
    python -m experiments.bench_training --preset gpu     # WRN-34-10 too, bfloat16, on accelerators
    python -m experiments.bench_training --preset smoke   # ours alone, seconds

One PGD-10 training step of each network, timed in turn in one process, on the same weights: ours
under the three mappings and both forms of the loop, and the PyTorch twin. Memory is the growth of
the process's largest resident size on CPU (each runner in a process of its own), and the
allocator's peak on an accelerator. Scaling keeps the batch per device (weak) or in all (strong);
on one CPU's fake devices it shows the cost of splitting, not a speed-up.
"""

import dataclasses
import importlib.util
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrobust as jr
from experiments import common, records, timing
from jaxrobust import training

NAME = "bench_training"
MODELS = {
    "mnist_cnn": ({"name": "small_cnn"}, (28, 28, 1)),
    "preact_resnet18": ({"name": "preact_resnet18", "norm": "batch"}, (32, 32, 3)),
    "wrn_34_10": ({"name": "wide_resnet", "depth": 34, "width": 10, "norm": "batch"}, (32, 32, 3)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed."""

    batch: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"mnist_cnn": 64, "preact_resnet18": 32}
    )
    attack_steps: int = 10
    eps: float = 8 / 255
    loops: tuple[str, ...] = ("unrolled", "fused")
    mappings: tuple[str, ...] = jr.parallel.MAPPINGS
    bfloat16: bool = False
    scaling_model: str = "mnist_cnn"
    scaling_devices: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 7
    seconds: float = 60.0
    peers: bool = True


PRESETS = {
    "full": Config(),
    "gpu": Config(
        batch={"mnist_cnn": 512, "preact_resnet18": 512, "wrn_34_10": 128},
        bfloat16=True,
        scaling_model="preact_resnet18",
    ),
    "smoke": Config(
        batch={"mnist_cnn": 8},
        attack_steps=2,
        loops=("unrolled",),
        scaling_devices=(1, 2),
        repeats=2,
        peers=False,
    ),
}


def our_step(
    name: str, config: Config, batch_size: int, devices: int, mapping: str, loop: str, **dtypes
) -> Callable[[], Any]:
    """A function that takes one of our training steps and waits for it."""
    build, shape = MODELS[name]
    model, mesh = jr.models.build(**build), jr.parallel.data_mesh(devices)
    optimizer = training.sgd(0.01)
    attack = jr.linf_pgd(config.eps, config.attack_steps, loop=loop)
    state = jr.parallel.create(
        lambda: training.create_state(model, optimizer, jax.random.key(0), shape), mesh
    )
    step = training.train_step(model, optimizer, training.adversarial(attack), **dtypes)
    run = jr.parallel.data_parallel(step, mesh, mapping=mapping)
    batch = jr.parallel.shard_batch(batch_of(shape, batch_size), mesh)

    def once():
        nonlocal state
        state, metrics = run(state, batch)
        return float(metrics["loss"])

    return once


def batch_of(shape: tuple[int, ...], size: int) -> dict[str, np.ndarray]:
    """A batch of noise with labels."""
    draw = np.random.default_rng(0)
    return {
        "image": draw.random((size, *shape), dtype=np.float32),
        "label": draw.integers(0, 10, size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


def torch_step(name: str, config: Config, batch_size: int, compiled: bool) -> Callable[[], float]:
    """The twin of the step in PyTorch, from the same weights."""
    import torch

    from experiments import torch_twins

    build, shape = MODELS[name]
    model = jr.models.build(**build)
    variables = model.init(jax.random.key(0), shape)
    net = torch_twins.twin(model.config, variables, shape)
    batch = batch_of(shape, batch_size)
    x, y = torch_twins.nchw(batch["image"]), torch.from_numpy(batch["label"]).long()
    start = (torch.rand_like(x) * 2 - 1) * config.eps
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net = torch.compile(net) if compiled else net
    setting = {
        "eps": config.eps,
        "step_size": 2.5 * config.eps / config.attack_steps,
        "steps": config.attack_steps,
    }
    return lambda: torch_twins.train_step(net, optimizer, x, y, start, **setting)


def runners(name: str, config: Config) -> dict[str, Callable[[], Any]]:
    """Everything that is timed on one network."""
    size = config.batch[name]
    most = max(d for d in range(1, _physical() + 1) if size % d == 0)
    runs = {}
    for loop in config.loops:
        runs[f"jaxrobust jit, 1 device, {loop}"] = our_step(name, config, size, 1, "jit", loop)
    for mapping in config.mappings:
        label = f"jaxrobust {mapping}, {most} devices, auto"
        runs[label] = our_step(name, config, size, most, mapping, "auto")
    if config.bfloat16:
        runs["jaxrobust jit, 1 device, bfloat16"] = our_step(
            name, config, size, 1, "jit", "auto", dtype=jnp.bfloat16, attack_dtype=jnp.bfloat16
        )
    if config.peers:
        try:
            runs["torch eager, frozen attack"] = torch_step(name, config, size, False)
            runs["torch.compile, frozen attack"] = torch_step(name, config, size, True)
        except ImportError as error:
            print(f"PyTorch is left out: {error}; pip install -e '.[bench]' brings it")
    return runs


def _physical() -> int:
    """Devices that are not fake: one per core on CPU."""
    if jax.default_backend() == "cpu":
        return min(jax.device_count(), os.cpu_count() or 1)
    return jax.device_count()


def step_flops(name: str, config: Config) -> float:
    """Floating-point operations of one step, in matrix products and convolutions."""
    build, shape = MODELS[name]
    model, optimizer = jr.models.build(**build), training.sgd(0.01)
    attack = jr.linf_pgd(config.eps, config.attack_steps)
    state = jax.eval_shape(
        lambda: training.create_state(model, optimizer, jax.random.key(0), shape)
    )
    step = training.train_step(model, optimizer, training.adversarial(attack))
    return jr.flops.count_flops(step, state, batch_of(shape, config.batch[name])).matmul


def memory_of(name: str, config: Config, library: str) -> int:
    """Bytes that three steps add to the largest resident size of this process."""
    size = config.batch[name]
    before = largest_resident_size()
    if library == "torch":
        run = torch_step(name, config, size, False)
    else:
        run = our_step(name, config, size, 1, "jit", "auto")
    for _ in range(3):
        run()
    stats = jax.devices()[0].memory_stats() or {}
    if library != "torch" and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return largest_resident_size() - before


def largest_resident_size() -> int:
    """Peak resident memory of this process, in bytes.

    Not by `getrusage` on Linux: what it tells of a child begins at the parent's size.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def memory_in_own_process(name: str, preset: str, library: str) -> float:
    """`memory_of`, where nothing else has been loaded or run."""
    program = (
        "from experiments import bench_training as b; "
        f"print(b.memory_of({name!r}, b.PRESETS[{preset!r}], {library!r}))"
    )
    if library == "torch":
        program = "import torch, torch.nn.functional; " + program
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=records.ROOT.parent
    )
    if run.returncode:
        raise RuntimeError(f"measuring the memory of {library} failed: {run.stderr[-500:]}")
    return float(run.stdout.split()[-1])


def scaling(config: Config, results: records.Results) -> None:
    """Weak and strong scaling of the step over devices, for the three mappings."""
    name = config.scaling_model
    counts = [count for count in config.scaling_devices if count <= jax.device_count()]
    for kind in ("strong", "weak"):
        runs = {}
        for count in counts:
            size = config.batch[name] * (count if kind == "weak" else 1)
            for mapping in config.mappings:
                runs[count, mapping] = our_step(name, config, size, count, mapping, "auto")
        begun = time.monotonic()
        timed = timing.interleaved(runs, repeats=config.repeats, seconds=config.seconds)
        for (count, mapping), figures in timed.items():
            size = config.batch[name] * (count if kind == "weak" else 1)
            key = {"scaling": kind, "model": name, "devices": count, "mapping": mapping}
            rate = size / figures["seconds_median"]
            results.add(
                {**key, "batch": size},
                {**figures, "images_per_second": rate},
                time.monotonic() - begun,
            )
            print(
                f"{kind:6} scaling, {count} devices, {mapping:9} {rate:9.1f} images/s", flush=True
            )


def main(config: Config, options) -> None:
    """Times, measures and writes."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = options.out / f"{NAME}-{options.preset if options.preset == 'smoke' else kind}.json"
    path.unlink(missing_ok=True)
    results = records.Results(path, NAME, options.preset, config)
    for name in config.batch:
        flops, begun = step_flops(name, config), time.monotonic()
        timed = timing.interleaved(
            runners(name, config), repeats=config.repeats, seconds=config.seconds
        )
        for runner, figures in timed.items():
            size = config.batch[name]
            key = {"library": runner, "model": name, "batch": size, "steps": config.attack_steps}
            rate = flops / figures["seconds_median"] / 1e9
            extra = {
                "steps_per_second": 1 / figures["seconds_median"],
                "images_per_second": size / figures["seconds_median"],
                "gflop_per_second": rate,
            }
            results.add(key, {**figures, **extra}, time.monotonic() - begun)
            print(
                f"{name:16} {runner:42} {extra['steps_per_second']:8.2f} steps/s  "
                f"{rate:7.1f} GFLOP/s  first {figures['first_seconds']:.1f} s",
                flush=True,
            )
        if jax.default_backend() != "cpu":
            continue  # what is measured next is the host's memory
        peers = ("torch",) if config.peers and importlib.util.find_spec("torch") else ()
        for library in ("jaxrobust", *peers):
            memory = memory_in_own_process(name, options.preset, library)
            key = {"memory": library, "model": name, "batch": config.batch[name]}
            results.add(key, {"bytes": memory}, 0.0)
            print(f"{name:16} {library:42} {memory / 2**20:8.0f} MiB", flush=True)
    scaling(config, results)
    print(f"results: {path}")


if __name__ == "__main__":
    chosen = common.arguments(__doc__, PRESETS, default="full", devices=8)
    main(PRESETS[chosen.preset], chosen)
