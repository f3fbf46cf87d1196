"""Devices: the only file that knows them. Meshes, sharded batches, and the mapping of a step.

A training step is written once, for one device, as `step(state, batch, axis_name)`. It calls
`mean_gradient`, `mean` or `gather` where devices must talk, and `data_parallel` runs it on all of
them by `jax.shard_map`, by `jax.pmap`, or, with `axis_name=None`, from the global view by
`jax.jit`. The three give the same numbers.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
MAPPINGS = ("shard_map", "pmap", "jit")
# Of glibc's malloc.h: blocks of any size come from one heap, whose end is never given back.
_KEEP = {
    -4: 0,  # M_MMAP_MAX
    -1: -1,  # M_TRIM_THRESHOLD, where -1 is never
    -8: 1,  # M_ARENA_MAX: each further heap would fault its own pages in
}

PyTree = Any


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins several hosts into one program; call it before anything touches a device.

    On a TPU pod and under SLURM or MPI the three arguments are found by themselves.

    Args:
        coordinator: "host:port" of process 0.
        processes: how many processes there are.
        process: which one this is, from 0.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process)


def split_host(devices: int) -> None:
    """Makes one CPU count as several devices; call it before anything touches a device.

    XLA spreads a convolution over the cores of one device less well than it runs one batch shard
    on each of two devices, so training on a CPU is faster with one device per core.

    Args:
        devices: how many, at least 1.

    Raises:
        RuntimeError: devices are in use already.
    """
    jax.config.update("jax_num_cpu_devices", devices)


def keep_freed_memory() -> bool:
    """Lets the C library keep what is freed; call it before anything touches a device.

    XLA's programs for CPUs allocate their temporaries anew in every call, and glibc gives large
    blocks back at once, so that each call's pages are faulted in again: two fifths of the time of
    an EfficientNet's gradient of the images, three of that of its weights (BUILD_NOTES.md). The
    process then holds the most memory that it ever needed until it ends.

    Returns:
        Whether the C library took it: glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all(mallopt(option, value) for option, value in _KEEP.items())


def exact_products() -> bool:
    """Whether products of float32 arrays are products of float32 numbers.

    On CPUs they are. GPUs round the factors to TF32 (three decimal digits) and TPUs to bfloat16
    (two), unless `jax.default_matmul_precision` says "highest" around this call: what a model sets
    within itself is not seen.
    """
    wanted = jax.config.jax_default_matmul_precision
    return wanted in ("highest", "float32") or jax.default_backend() == "cpu"


def data_mesh(devices: int | Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh whose axis, "data", splits the batch.

    Args:
        devices: how many of the devices of all processes, or which; all by default.

    Raises:
        ValueError: there are fewer devices than asked for.
    """
    available = jax.devices()
    if devices is None:
        devices = available
    elif isinstance(devices, int):
        if not 1 <= devices <= len(available):
            raise ValueError(f"devices must be in [1, {len(available)}], got {devices}")
        devices = available[:devices]
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Spreads host arrays over a mesh along their first axis.

    Args:
        batch: arrays [b, ...]; on a mesh of several processes, each passes its own share of the
            global batch, in the order of the processes, without typed keys.
        mesh: where to.

    Returns:
        The same tree of global `jax.Array`s.

    Raises:
        ValueError: b is not divisible by the devices of this process.
    """
    local = len(mesh.local_devices)
    for leaf in jax.tree.leaves(batch):
        _check_divisible(leaf.shape[0], local)
    sharding = NamedSharding(mesh, P(AXIS))
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )


def replicate(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays, wherever they are, on every device of this process's mesh, or on the default one."""

    def local(leaf):
        # What lies on the devices of all processes gets to other devices by way of the host.
        afar = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return np.asarray(leaf) if afar else leaf

    where = None if mesh is None else NamedSharding(mesh, P())
    return jax.device_put(jax.tree.map(local, tree), where)


def place(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """A batch of host arrays over the mesh, as of `shard_batch`, or on the default device."""
    return jax.device_put(tree) if mesh is None else shard_batch(tree, mesh)


def rounded(size: int, mesh: Mesh | None) -> int:
    """The next number of examples that the devices share evenly."""
    devices = 1 if mesh is None else mesh.size
    return -(-size // devices) * devices


def create(init: Callable[..., PyTree], mesh: Mesh, *args: Any) -> PyTree:
    """Runs `init(*args)` compiled, with every output replicated over the mesh.

    State is born on its devices: across processes a typed key cannot be put there later. And it is
    born with the types that a step gives back, so that the second step is the first one's program.
    """
    made = jax.jit(init, out_shardings=NamedSharding(mesh, P()))(*args)
    made = jax.tree.map(_strong, made)
    # Ready, for the reason that is given in `data_parallel`.
    return jax.block_until_ready(made)


def _strong(x):
    """As it is, but for the weak type of what came of Python's numbers alone."""
    kind = jax.typeof(x)
    return jax.lax.convert_element_type(x, kind.dtype) if kind.weak_type else x


def data_parallel(
    step: Callable[..., tuple[PyTree, PyTree]],
    mesh: Mesh | None = None,
    *,
    mapping: str = "shard_map",
    donate: bool = True,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Runs a per-device step on every device of a mesh.

    Args:
        step: (state, batch, axis_name) -> (state, metrics). It sees its device's share of the
            batch, and must return the same state and metrics on all devices; under "shard_map" a
            forgotten mean is an error when the step is traced.
        mesh: the devices; all by default.
        mapping: "shard_map", "pmap", or "jit" (the step then gets `axis_name=None` and the whole
            batch, and the compiler splits it).
        donate: whether the old state's memory is reused. The old state is then gone.

    Returns:
        (state, batch) -> (state, metrics), compiled, with global batches [b, ...] as arguments.

    Raises:
        ValueError: an unknown mapping; when called, a batch not divisible by the devices.
    """
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping must be one of {MAPPINGS}, got {mapping!r}")
    mesh = data_mesh() if mesh is None else mesh
    run = _mapped(step, mesh, mapping, (0,) if donate else ())

    # Several devices of one CPU share a thread pool. With two steps in flight, the threads of one
    # can all wait in a collective for a device that has no thread left to get there.
    one_at_a_time = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def call(state, batch):
        for leaf in jax.tree.leaves(batch):
            _check_divisible(leaf.shape[0], mesh.size)
        out = run(state, batch)
        return jax.block_until_ready(out) if one_at_a_time else out

    return call


@functools.lru_cache(maxsize=8)
def _mapped(step, mesh, mapping, donated):
    """Remembered, so that training that goes on with the same step does not compile it again."""
    return _MAP[mapping](step, mesh, donated)


def map_examples(
    fn: Callable[[PyTree, PyTree, str | None], PyTree], mesh: Mesh | None
) -> Callable[[PyTree, PyTree], PyTree]:
    """Runs a function of many examples on every device's share of them.

    Args:
        fn: (shared, examples, axis_name) -> results [b, ...], row by row those of `examples`.
        mesh: the devices; None runs `fn` as it is, with `axis_name=None`.

    Returns:
        (shared, examples) -> results [b, ...], to be called under `jax.jit`; b must be divisible
        by the devices.
    """
    if mesh is None:
        return lambda shared, examples: fn(shared, examples, None)
    return jax.shard_map(
        lambda shared, examples: fn(shared, examples, AXIS),
        mesh=mesh,
        in_specs=(P(), P(AXIS)),
        out_specs=P(AXIS),
    )


def _by_shard_map(step, mesh, donated):
    mapped = jax.shard_map(
        lambda state, batch: step(state, batch, AXIS),
        mesh=mesh,
        in_specs=(P(), P(AXIS)),
        out_specs=(P(), P()),
    )
    return jax.jit(mapped, donate_argnums=donated)


def _by_jit(step, mesh, donated):
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    return jax.jit(
        lambda state, batch: step(state, batch, None),
        in_shardings=(whole, split),
        out_shardings=(whole, whole),
        donate_argnums=donated,
    )


def _by_pmap(step, mesh, donated):
    mapped = jax.pmap(
        lambda state, batch: step(state, batch, AXIS),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=list(mesh.devices.flat),
        donate_argnums=donated,
    )

    def run(state, batch):
        return mapped(state, jax.tree.map(lambda leaf: _stack_shards(leaf, mesh), batch))

    return run


_MAP = {"shard_map": _by_shard_map, "pmap": _by_pmap, "jit": _by_jit}


def _stack_shards(leaf, mesh):
    """[b, ...] as the [local devices, b / devices, ...] that pmap wants, without a copy on host."""
    if isinstance(leaf, jax.Array) and jax.process_count() > 1:
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.stack([np.asarray(shard.data) for shard in shards])
    return leaf.reshape(len(mesh.local_devices), -1, *leaf.shape[1:])


def _check_divisible(size, devices):
    if size % devices:
        raise ValueError(f"batch must be divisible by the {devices} devices, got {size} examples")


def mean(tree: PyTree, axis_name: str | None) -> PyTree:
    """The mean over devices of values that differ between them; as it is without an axis."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def gather(x: jax.Array, axis_name: str | None) -> jax.Array:
    """[b, ...] from each device, joined to [devices * b, ...] on every one."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def gather_to_all(x: jax.Array, axis_name: str | None) -> jax.Array:
    """As `gather`, for what goes into the state: the compiler sees that all devices have the same.

    `all_gather`'s result counts as one that may differ between devices, a sum's does not.
    """
    if axis_name is None:
        return x
    count, own = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    mine = jax.lax.pcast(jnp.arange(count), axis_name, to="varying") == own
    spread = jnp.where(mine.reshape(-1, *[1] * x.ndim), x, 0)
    return jax.lax.psum(spread, axis_name).reshape(-1, *x.shape[1:])


def varying(tree: PyTree, axis_name: str | None) -> PyTree:
    """Marks replicated values as free to differ between devices: their gradients stay local.

    Without it, gradients of replicated parameters come back summed over the devices under
    `shard_map`, and a mean of them is too large by the number of devices.
    """
    if axis_name is None:
        return tree

    def cast(x):
        is_varying = axis_name in jax.typeof(x).manual_axis_type.varying
        return x if is_varying else jax.lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def mean_gradient(
    loss_fn: Callable[[PyTree], tuple[jax.Array, PyTree]], params: PyTree, axis_name: str | None
) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    """Value and gradient of a loss averaged over the global batch.

    Args:
        loss_fn: params -> (mean loss of this device's examples, anything else to keep).
        params: the same on all devices.
        axis_name: the mesh axis, or None.

    Returns:
        ((loss, aux), gradients): loss and gradients averaged over the devices, aux as it came.
    """
    params = varying(params, axis_name)
    (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return (mean(loss, axis_name), aux), mean(gradients, axis_name)
