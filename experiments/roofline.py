"""What a compiled program moves and sends, read from its optimised HLO, and a bound on its time.

XLA's own `cost_analysis()` counts the body of a loop once. Here every computation counts as often
as it runs, so an attack of ten steps moves ten times the bytes of one.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Peaks of one accelerator chip.

    Attributes:
        name: as its maker calls it.
        flops: bfloat16 operations per second; a multiplication with its addition counts as two.
        hbm_bandwidth: bytes per second.
        hbm_bytes: memory.
        ici_bandwidth: bytes per second that a chip sends, over all its links.
        links: links per chip of a full two-dimensional torus.
        hop_seconds: latency of one link.
        clock: cycles per second.
    """

    name: str
    flops: float
    hbm_bandwidth: float
    hbm_bytes: float
    ici_bandwidth: float
    links: int
    hop_seconds: float
    clock: float


# cloud.google.com/tpu/docs/v5e, "System architecture": 197 TFLOP/s in bfloat16, 16 GB at 819 GB/s,
# interchip interconnect 1,600 Gbit/s over four ports (the newer page says 400 GB/s, both ways
# added up). The clock is not published: four matrix units of 128 x 128 reach 197 TFLOP/s at
# 1.5 GHz. About a microsecond per hop: "How to Scale Your Model" (Austin et al. 2025), part 2.
V5E = Chip("TPU v5e", 197e12, 819e9, 16e9, 1600e9 / 8, 4, 1e-6, 197e12 / (4 * 128 * 128 * 2))

# jax.lax.Precision: how many bfloat16 products stand for one float32 product on a TPU.
FLOAT32_PASSES = {"default": 1, "high": 3, "highest": 6}


class Instruction(NamedTuple):
    """One line of HLO text; the operands are names, of a constant its value."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Cost(NamedTuple):
    """What one chip does in one run of a program, loops counted as often as they run.

    Attributes:
        bytes: read and written by all instructions, in whichever memory.
        hbm_bytes: the part of it in main memory. Logical sizes: padding to tiles is not counted.
        bytes_loops_once: `bytes` with every loop body counted once, as XLA's cost analysis does.
        cycles: the compiler's own estimates added up, 0 where it wrote none.
        collectives: {kind: {"count", "bytes", "asynchronous"}}; bytes is what a chip contributes.
    """

    bytes: int
    hbm_bytes: int
    bytes_loops_once: int
    cycles: int
    collectives: dict[str, dict[str, int]]


_BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(body|calls|to_apply|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%[\w.\-]+)"
)
_COLLECTIVE = re.compile(
    r"^(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$"
)
# What moves nothing: names for values, and control flow whose work is in what it calls.
# fmt: off
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start",
    "async-update", "async-done", "copy-done", "slice-done", "all-reduce-done", "all-gather-done",
    "collective-permute-done", "send-done", "recv-done",
}
# fmt: on
_ENTERED = ("while", "call", "conditional", "async-start")


def read_hlo(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry computation, and every computation's instructions, of HLO text."""
    entry, computations, current = "", {}, []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            current.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError("text must be an HLO module with an ENTRY computation")
    return entry, computations


def _instruction(name, rest):
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    opcode, inside = rest[:opening], rest[opening + 1 : closing]
    operands = (inside,) if opcode == "constant" else tuple(_NAME.findall(inside))
    return Instruction(name, kind, opcode, operands, rest[closing + 1 :])


def _closing(text, opening):
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def arrays(kind: str) -> list[tuple[int, bool]]:
    """(bytes, whether in main memory) of every array in an HLO type."""
    out = []
    for dtype, shape, layout in _ARRAY.findall(kind):
        size = math.prod(int(n) for n in shape.split(",") if n)
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0]) if dtype != "token" else 0
        out.append((-(-size * bits // 8), re.search(r"S\([1-9]", layout) is None))
    return out


def trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
    """How often a while loop runs, as the compiler noted or as its condition says.

    Raises:
        ValueError: the length depends on values.
    """
    if noted := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    condition = computations[re.search(r"condition=%([\w.\-]+)", loop.attributes)[1]]
    text = " ".join(i.opcode + i.attributes for i in condition)
    limits = [i for i in condition if i.opcode == "constant" and i.type.startswith("s32[]")]
    # Loops of `fori_loop` and `scan` count from 0 while smaller than a constant.
    if "direction=LT" in text and len(limits) == 1:
        return int(limits[0].operands[0])
    raise ValueError(f"the number of trips of {loop.name} must be known from its condition")


def runs(entry: str, computations: Mapping[str, list[Instruction]]) -> Iterator[tuple]:
    """(instructions, times, loops once, fused) of every computation that the program enters.

    `fused` ones work on values that never leave the chip's registers and local memory.
    """
    todo = [(entry, 1, False)]
    while todo:
        name, times, fused = todo.pop()
        yield computations[name], times, fused
        for instruction in computations[name]:
            inside = fused or instruction.opcode not in _ENTERED
            if inside and instruction.opcode not in ("fusion", *_ENTERED):
                continue
            factor = trip_count(instruction, computations) if instruction.opcode == "while" else 1
            for _, called in _CALLED.findall(instruction.attributes):
                todo += [(child, times * factor, inside) for child in _NAME.findall(called)]


def program_cost(text: str) -> Cost:
    """What the program of an optimised HLO text does on one chip.

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: a loop whose length depends on values.
    """
    entry, computations = read_hlo(text)
    total = collections.Counter()
    collective: dict[str, dict[str, int]] = {}
    for instructions, times, fused in runs(entry, computations):
        types = {i.name: i.type for i in instructions}
        for instruction in instructions:
            if found := _COLLECTIVE.match(instruction.opcode):
                sums = collective.setdefault(found[1], {"count": 0, "bytes": 0, "asynchronous": 0})
                sums["count"] += times
                sums["bytes"] += times * sum(
                    size for name in instruction.operands for size, _ in arrays(types[name])
                )
                sums["asynchronous"] += times * bool(found[2])
            if fused:
                continue
            moved = _moved(instruction, types)
            everywhere = sum(size for size, _ in moved)
            total["bytes"] += times * everywhere
            total["bytes_loops_once"] += everywhere
            total["hbm_bytes"] += times * sum(size for size, main in moved if main)
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
                total["cycles"] += times * int(cycles[1])
    names = ("bytes", "hbm_bytes", "bytes_loops_once", "cycles")
    return Cost(*(total[name] for name in names), collective)


def _moved(instruction, types):
    """(bytes, in main memory) of all that an instruction reads and writes."""
    if instruction.opcode in _FREE or "ConcatBitcast" in instruction.attributes:
        return []
    out = arrays(instruction.type)
    inputs = [a for name in instruction.operands for a in arrays(types.get(name, ""))]
    if instruction.opcode == "copy-start":  # (destination, source, a flag)
        return out[:2]
    if instruction.opcode in ("slice-start", "slice", "dynamic-slice", "gather"):
        # Reads as much as it writes, of a larger array.
        target = out[len(inputs)] if instruction.opcode == "slice-start" else out[0]
        return [target, (target[0], inputs[0][1])]
    if instruction.opcode == "dynamic-update-slice":
        return [inputs[1], (inputs[1][0], out[0][1])]
    return inputs + out


def memory_use(compiled: Any, chip: Chip) -> dict[str, Any]:
    """Bytes per chip that the compiled program needs at once, by purpose."""
    stats = compiled.memory_analysis()
    sizes = {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "aliased_bytes": stats.alias_size_in_bytes,
        "temporary_bytes": stats.temp_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
    }
    # Donated outputs lie where the arguments lay.
    needed = sum(sizes.values()) - 2 * sizes["aliased_bytes"]
    return {**sizes, "needed_bytes": needed, "fits": needed <= chip.hbm_bytes}


def too_large(error: Exception) -> dict[str, Any]:
    """What the compiler says of a program that does not fit; any other error is raised again."""
    found = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm", str(error))
    if found is None:
        raise error
    unit = {"G": 2**30, "M": 2**20}
    return {"fits": False, "needed_bytes": int(float(found[1]) * unit[found[2]])}


def collective_seconds(
    collectives: Mapping[str, Mapping[str, int]], sides: tuple[int, ...], chip: Chip
) -> float:
    """An estimate of the time of a program's collectives on a mesh of chips, one after the other.

    all-reduce: 2 V (n - 1) / n / B;  others: V (n - 1) / B for all-gather, else V (n - 1) / n / B
    and the latency of the hops that a message takes across the mesh, twice for an all-reduce.

    Args:
        collectives: of `program_cost`.
        sides: of the mesh, such as (16, 16). A v5e side of 16 closes to a ring; a shorter one does
            not, which halves the bandwidth B and doubles the distance.
        chip: its links.

    Source: Austin et al. 2025 (How to Scale Your Model), part 3.
    """
    chips, rings = math.prod(sides), [side >= 16 for side in sides]
    if chips == 1:
        return 0.0
    bandwidth = chip.ici_bandwidth * sum(1.0 if ring else 0.5 for ring in rings) / len(rings)
    hops = sum(side // 2 if ring else side - 1 for side, ring in zip(sides, rings, strict=True))
    passes = {"all-reduce": 2 / chips, "all-gather": 1.0}
    seconds = 0.0
    for kind, sums in collectives.items():
        sent = sums["bytes"] * (chips - 1) * passes.get(kind, 1 / chips)
        seconds += sent / bandwidth
        seconds += sums["count"] * hops * chip.hop_seconds * (2 if kind == "all-reduce" else 1)
    return seconds


def estimate(
    product_flops: float, cost: Cost, sides: tuple[int, ...], chip: Chip
) -> dict[str, float]:
    """Bounds on a step's time and on weak-scaling efficiency; nothing here was measured.

    Args:
        product_flops: per chip, of matrix products, in bfloat16 passes.
        cost: per chip.
        sides: of the mesh.
        chip: its peaks.

    Returns:
        Numbers whose names begin with "estimated_". The best case hides the smaller of compute and
        memory time behind the larger, and communication behind both; the plain case adds
        communication; efficiencies are relative to the same chips without communication.
    """
    compute, memory = product_flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth
    sent = collective_seconds(cost.collectives, sides, chip)
    local = max(compute, memory)
    return {
        "estimated_compute_seconds": compute,
        "estimated_memory_seconds": memory,
        "estimated_collective_seconds": sent,
        "estimated_step_seconds_overlapped": max(local, sent),
        "estimated_step_seconds_not_overlapped": local + sent,
        "estimated_step_seconds_nothing_overlapped": compute + memory + sent,
        "estimated_compiler_seconds": cost.cycles / chip.clock,
        "estimated_efficiency_overlapped": local / max(local, sent),
        "estimated_efficiency_not_overlapped": local / (local + sent),
    }
