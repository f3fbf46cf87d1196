"""Torch files read without torch: tensors, plain containers, numbers and strings, nothing else.

`torch.save` writes a zip archive since 1.6 (data.pkl and one record per storage) and wrote, before
that and on request, pickles one after the other with the storages behind them. Both are read here,
and safetensors files beside them. A storage is read when a tensor that lies in it is asked for, so
an optimizer's state costs nothing.
"""

import functools
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrobust.files import CheckpointError
from jaxrobust.models.pickles import Named, interpret, plain_dict
from jaxrobust.weights import read_arrays

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before 1.6
_PROTOCOL = 1001
_DTYPES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": jnp.dtype("bfloat16"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
# Where training scripts put the weights in what they save.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "last", "best")
# What zipfile and files raise on damaged input, whose sizes and offsets may be anything.
_UNREADABLE = (ValueError, EOFError, OSError, OverflowError, RuntimeError, struct.error)
_UNREADABLE += (zipfile.BadZipFile,)
_ADVICE = (
    "only tensors, plain containers, numbers and strings are read; if you trust the file, load it "
    "with torch and save the state dict alone"
)


def renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """`name` with every (theirs, ours) replaced, in this order."""
    for theirs, ours in renames:
        name = name.replace(theirs, ours)
    return name


def linen_entry(name: str, array: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """(path in a Linen module's variables, array in its order of axes) of a module's entry.

    A "weight" of one axis is a norm's scale, of two a dense layer's kernel, of four a
    convolution's.
    """
    *path, leaf = name.split(".")
    if leaf.startswith("running_"):
        return ("batch_stats", *path, leaf.removeprefix("running_")), array
    if leaf == "weight":
        leaf = "scale" if array.ndim == 1 else "kernel"
        array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else None)
    return ("params", *path, leaf), array


class _Storage(NamedTuple):
    dtype: np.dtype
    numel: int
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: str | os.PathLike, key: str | None = None) -> dict[str, np.ndarray]:
    """The named arrays of a torch or safetensors file; nothing in the file is ever run.

    A state dict inside a training checkpoint is found under the usual names, and "module." and
    "model." are taken off where every name begins so. Numbers and strings beside the tensors of a
    state dict are left out.

    Args:
        path: the file, as `torch.save` (either format) or safetensors wrote it.
        key: where the state dict lies ("ema", or "a.b" for a dict in a dict); None looks for it.
            In a safetensors file, what the names begin with ("ema" for "ema.conv1.weight").

    Returns:
        {name: array}, in the file's names, layouts and dtypes.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or foreign, names something other than tensors and
            plain data, or holds no state dict, or several and `key` does not say which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a torch or safetensors file, found none")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            file.seek(0)
            if start[8:] == b"{":
                return _without_prefix(_under(read_arrays(path), key))
            content, read = _open_zip(file) if start[:2] == b"PK" else _open_legacy(file, start)
            state = _state_dict(content, key)
            tensors = {k: v for k, v in state.items() if isinstance(v, _Tensor)}
            cached = functools.cache(read)
            return _without_prefix({str(k): _array(v, cached) for k, v in tensors.items()})
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        raise CheckpointError(f"{path}: {error}") from error


def _open_zip(file: BufferedIOBase) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    """The content and a reader of storages, of an archive as torch 1.6 and later write it."""
    archive = zipfile.ZipFile(file)
    found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError("expected a torch file, found a zip archive without one data.pkl")
    folder = found[0].removesuffix("data.pkl")

    def record(name: str) -> bytes:
        # Torch never compresses, and a compressed record could be a thousand times its size.
        if archive.getinfo(folder + name).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"refused: the compressed record {name}")
        return archive.read(folder + name)

    if folder + "byteorder" in archive.namelist() and record("byteorder") != b"little":
        raise ValueError("refused: a big-endian file")

    def read(storage: _Storage) -> np.ndarray:
        if f"{folder}data/{storage.key}" not in archive.namelist():
            raise ValueError(f"damaged: storage {storage.key} is missing")
        data = record(f"data/{storage.key}")
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"damaged: storage {storage.key} has {len(data)} bytes")
        return np.frombuffer(data, storage.dtype)

    return _interpret(io.BytesIO(record("data.pkl")), _storage), read


def _open_legacy(
    file: BufferedIOBase, start: bytes
) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    """The same of a file in the older format: pickles, then every storage behind its size."""
    if start[:1] != b"\x80":
        size = os.fstat(file.fileno()).st_size
        raise ValueError(
            f"expected a torch or safetensors file, found {size} bytes that begin with {start!r}"
        )
    if _interpret(file) != _MAGIC:
        raise ValueError("expected a torch file, found a pickle of another kind")
    protocol, system = _interpret(file), _interpret(file)
    if protocol != _PROTOCOL or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("refused: another protocol than 1001, or a big-endian file")
    storages: dict[str, _Storage] = {}

    def note(identity: Any) -> _Storage:
        storage = _storage(identity)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"damaged: two storages have the key {storage.key}")
        return storage

    content = _interpret(file, note)
    places = dict(_places(file, _interpret(file), storages))

    def read(storage: _Storage) -> np.ndarray:
        file.seek(places[storage.key])
        data = file.read(storage.numel * storage.dtype.itemsize)
        return np.frombuffer(data, storage.dtype)

    return content, read


def _places(
    file: BufferedIOBase, keys: Any, storages: Mapping[str, _Storage]
) -> Iterator[tuple[str, int]]:
    """Where every storage's numbers begin; the file is checked to hold them all."""
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise ValueError("damaged: no list of storages")
    if set(keys) != set(storages) or len(keys) != len(storages):
        raise ValueError(f"damaged: {len(storages)} storages are used and {len(keys)} listed")
    place, size = file.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        file.seek(place)
        numel = int.from_bytes(file.read(8), "little", signed=True)
        end = place + 8 + storages[key].numel * storages[key].dtype.itemsize
        if end > size:
            raise ValueError(f"damaged: cut off in storage {key}, {end - size} bytes are missing")
        if numel != storages[key].numel:
            raise ValueError(f"damaged: storage {key} has {numel} numbers")
        yield key, place + 8
        place = end


def _interpret(stream: BufferedIOBase, storage: Callable[[Any], Any] | None = None) -> Any:
    try:
        return interpret(stream, _NAMES, storage)
    except ValueError as error:
        advice = f" ({_ADVICE})" if str(error).startswith("refused") else ""
        raise ValueError(f"{error}{advice}") from error


def _storage(identity: Any) -> _Storage:
    """("storage", type, key, device, numel), and None fifth in the older format."""
    match identity:
        case ("storage", Named(name, _), str(key), str(), int(numel), *rest) if (
            name in _DTYPES and numel >= 0 and rest in ([], [None])
        ):
            return _Storage(_DTYPES[name], numel, key)
    # Not printed: a few bytes can describe a tuple whose text fills the memory.
    raise ValueError(f"refused: a persistent id that is no storage, a {type(identity).__name__}")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    whole = [offset, *_sizes(shape), *_sizes(strides)]
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("damaged: a tensor without a storage, or with a wrong shape")
    if not all(isinstance(n, int) and n >= 0 for n in whole):
        raise ValueError("damaged: a tensor's offset, shape or strides are no counts")
    count = math.prod(shape)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count > storage.numel or (count and offset + last >= storage.numel):
        raise ValueError(f"damaged: a tensor of shape {shape} in {storage.numel} numbers")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


# Of numpy's arrays.
_MOST_AXES = 32


def _sizes(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list) or len(value) > _MOST_AXES:
        raise ValueError(f"damaged: a tensor's shape is a {type(value).__name__}")
    return tuple(value)


# Hooks, gradients and whatever else follows the data are dropped.
_NAMES: Mapping[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": plain_dict,
    "torch.Size": _sizes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    **dict.fromkeys(_DTYPES),
}


def _array(tensor: _Tensor, read: Callable[[_Storage], np.ndarray]) -> np.ndarray:
    numbers = read(tensor.storage)
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, numbers.dtype)
    strides = [s * numbers.dtype.itemsize for s in tensor.strides]
    view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides)
    return np.array(view, order="C")


def _state_dict(content: Any, key: str | None) -> Mapping[Any, Any]:
    """The dict of tensors in what the file holds."""
    for part in key.split(".") if key else ():
        if not isinstance(content, dict) or part not in content:
            raise ValueError(f"key must lead to a dict in the file, got {key!r}: {_held(content)}")
        content = content[part]
    for _ in range(4):
        if not isinstance(content, dict):
            break
        inner = [k for k in CONTAINERS if isinstance(content.get(k), dict)]
        if not inner and any(isinstance(v, _Tensor) for v in content.values()):
            return content
        if len(inner) > 1:
            raise ValueError(f"holds several state dicts: key must be one of {', '.join(inner)}")
        if not inner:
            break
        content = content[inner[0]]
    raise ValueError(f"expected a state dict: {_held(content)}")


def _under(arrays: dict[str, np.ndarray], key: str | None) -> dict[str, np.ndarray]:
    """The arrays of a flat file whose names begin with a key, without it."""
    if key is None:
        return arrays
    found = {n.removeprefix(f"{key}."): a for n, a in arrays.items() if n.startswith(f"{key}.")}
    if not found:
        raise ValueError(
            f"key must be what names in the file begin with, got {key!r}: {_held(arrays)}"
        )
    return found


def _held(content: Any) -> str:
    if isinstance(content, dict):
        names = ", ".join(str(k)[:60] for k in list(content)[:20])
        return f"found a dict of {len(content)}: {names or 'nothing'}"
    return f"found a {type(content).__name__}"


def _without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in ("module.", "model.", "module."):
        if arrays and all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): a for name, a in arrays.items()}
    return arrays
