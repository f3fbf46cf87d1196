"""Functions of a model that are equal when the models are: what one compiled serves the other."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import linen as nn

# What Flax keeps beside the fields of a module that is bound to nothing.
_BOOKKEEPING = {"_id", "_parent_ref", "_state", "scope"}


class Bound(functools.partial):
    """A `functools.partial` that is equal to another of the same function and equal arguments.

    `jax.jit` looks up what it compiled by the equality of what is static, and a plain partial is
    equal to itself alone: the same model built again, as for the next seed of a table, would be
    traced and compiled again. Modules are equal when their fields are, numbers also in type. Where
    that would say too little (a field without a hash, such as a list or an array, or an attribute
    that is no field) each is equal to itself alone, too.
    """

    def __new__(cls, func: Callable[..., Any], /, *args: Any, **keywords: Any) -> "Bound":
        """Bind arguments, as `functools.partial` does."""
        self = super().__new__(cls, func, *args, **keywords)
        identity = func, _identity(args), _identity(tuple(sorted(keywords.items())))
        try:
            hash(identity)
        except TypeError:
            identity = object()
        self._identity = identity
        return self

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Bound) and self._identity == other._identity)


def _identity(value: Any) -> Any:
    """What two arguments must share for one compiled program to serve both."""
    if isinstance(value, nn.Module):
        # Not by the module's own equality, which may leave fields out.
        fields = {field.name for field in dataclasses.fields(value)} - {"parent"}
        if vars(value).keys() - fields - _BOOKKEEPING:
            return object()
        return type(value), *((name, _identity(getattr(value, name))) for name in sorted(fields))
    if type(value) is tuple:
        return tuple(_identity(part) for part in value)
    return (type(value), value) if isinstance(value, int | float | np.generic) else value
