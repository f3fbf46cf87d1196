"""A small interpreter of the pickle language: plain data come out, and nothing is ever called.

Python's own unpickler imports and calls whatever a file names. Here a file can name only what the
caller lists, and the opcodes are those that plain data and `torch.save` need; anything else is
refused, by name, before anything runs. `pickletools` splits the stream into opcodes.
"""

import pickletools
from collections.abc import Callable, Mapping
from io import BufferedIOBase
from typing import Any, NamedTuple

# Values that functions may be handed, for each byte of the file.
_COPIES = 4
_KEYS = str | bytes | int | float | None  # hashing a deeply nested tuple would exhaust the C stack


class Named(NamedTuple):
    """What a name in the file stands for; `call` is ours, None where it cannot be called."""

    name: str
    call: Callable[..., Any] | None


class _Machine(NamedTuple):
    """The stack below the last mark is kept in `marks`; `memo` holds what is referred to again.

    `room` is a list of one number: how many more values may be handed to functions, which copy
    them. A few bytes can hand them a long list again and again.
    """

    stack: list[Any]
    marks: list[list[Any]]
    memo: dict[int, Any]
    names: Mapping[str, Callable[..., Any] | None]
    storage: Callable[[Any], Any]
    room: list[int]


def interpret(
    stream: BufferedIOBase,
    names: Mapping[str, Callable[..., Any] | None],
    storage: Callable[[Any], Any] | None = None,
) -> Any:
    """The value that one pickle describes; the stream is left just behind it.

    Args:
        stream: seekable, positioned where the pickle begins.
        names: "module.name" -> the function of ours that stands for it, or None for a name that
            is only referred to, as a `Named`.
        storage: makes a value of a persistent id; None refuses them.

    Returns:
        Dicts, lists, tuples, strings, bytes, numbers, None, and what `names` and `storage` return.

    Raises:
        ValueError: the stream is cut off, is no pickle, or asks for anything else; the message
            names the opcode or the object that was refused.
    """
    bounded = _Bounded(stream)
    room = [_COPIES * (bounded.end - stream.tell())]
    machine = _Machine([], [], {}, names, storage or _no_storage, room)
    try:
        for opcode, argument, _ in pickletools.genops(bounded):
            if opcode.name == "STOP":
                return machine.stack.pop()
            if opcode.name in _LITERALS:
                machine.stack.append(argument)
            elif opcode.name in _OPCODES:
                _OPCODES[opcode.name](machine, argument)
            else:
                raise ValueError(f"refused: the pickle opcode {opcode.name}")
    except (IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"damaged pickle: {type(error).__name__}: {error}") from error
    raise ValueError("damaged pickle: it has no end")


class _Bounded:
    """A stream that never sets memory aside for more bytes than there are.

    A damaged length would otherwise be allocated before the read finds too few.
    """

    def __init__(self, stream: BufferedIOBase):
        self.stream = stream
        here = stream.tell()
        self.end = stream.seek(0, 2)
        stream.seek(here)
        self.readline, self.tell = stream.readline, stream.tell

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        return self.stream.read(min(count, self.end - self.stream.tell()))


def plain_dict(items: Any = ()) -> dict[Any, Any]:
    """A dict of (key, value) pairs; the keys must be strings or numbers."""
    out: dict[Any, Any] = {}
    for key, value in items:
        _set(out, key, value)
    return out


def _no_storage(identity: Any) -> Any:
    raise ValueError("refused: a persistent id")


def _set(target: Any, key: Any, value: Any) -> None:
    if not isinstance(target, dict) or not isinstance(key, _KEYS):
        raise ValueError(f"refused: an item of a {type(target).__name__} under a {type(key)}")
    target[key] = value


def _since_mark(machine: _Machine) -> list[Any]:
    """Pop what was pushed since the last mark."""
    items = list(machine.stack)
    machine.stack[:] = machine.marks.pop()
    return items


def _mark(machine: _Machine, _: Any) -> None:
    machine.marks.append(list(machine.stack))
    machine.stack.clear()


def _put(machine: _Machine, index: int | None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _get(machine: _Machine, index: int) -> None:
    machine.stack.append(machine.memo[index])


def _append(machine: _Machine, items: list[Any]) -> None:
    if not isinstance(machine.stack[-1], list):
        raise ValueError(f"refused: appending to a {type(machine.stack[-1]).__name__}")
    machine.stack[-1].extend(items)


def _set_items(machine: _Machine, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        _set(machine.stack[-1], key, value)


def _push_tuple(machine: _Machine, _: Any) -> None:
    items = _since_mark(machine)
    machine.stack.append(tuple(items))


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def run(machine: _Machine, _: Any) -> None:
        if len(machine.stack) < count:
            raise IndexError("too few values for a tuple")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return run


def _global(machine: _Machine, name: str) -> None:
    if name not in machine.names:
        raise ValueError(f"refused: {name}")
    machine.stack.append(Named(name, machine.names[name]))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("damaged pickle: a name that is no string")
    _global(machine, f"{module}.{name}")


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, Named) or function.call is None or type(arguments) is not tuple:
        called = function.name if isinstance(function, Named) else type(function).__name__
        raise ValueError(f"refused: a call of {called}")
    machine.room[0] -= sum(len(one) for one in arguments if isinstance(one, list | tuple))
    if machine.room[0] < 0:
        raise ValueError("refused: more values than the file can have described")
    machine.stack.append(function.call(*arguments))


def _build(machine: _Machine, _: Any) -> None:
    """Drop the attributes of a dict (a state dict's `_metadata`); nothing else may have any."""
    machine.stack.pop()
    if not isinstance(machine.stack[-1], dict):
        raise ValueError(f"refused: attributes of a {type(machine.stack[-1]).__name__}")


_LITERALS = frozenset(
    [
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    ]
)
_OPCODES: Mapping[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "MARK": _mark,
    "POP": lambda m, a: m.stack.pop(),
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "TUPLE": _push_tuple,
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": lambda m, a: _append(m, [m.stack.pop()]),
    "APPENDS": lambda m, a: _append(m, _since_mark(m)),
    "SETITEM": lambda m, a: _set_items(m, [m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, a: _set_items(m, _since_mark(m)),
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _put,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "GLOBAL": lambda m, a: _global(m, a.replace(" ", ".")),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": lambda m, a: m.stack.append(m.storage(m.stack.pop())),
}
