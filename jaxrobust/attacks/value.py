"""What it is to be an attack: a frozen value whose numbers are leaves of a pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

Number = Any  # a number or an array of numbers, concrete or traced
LossFn = Callable[..., Array]


def attack_value(data: tuple[str, ...], meta: tuple[str, ...]) -> Callable[[type], type]:
    """Makes a frozen dataclass a pytree: `data` are leaves, `meta` is compiled in."""

    def register(cls):
        cls.__eq__ = _equal
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)

    return register


def _equal(self, other):
    """As a dataclass compares, with arrays by their values: `==` of two would be an array."""
    if type(self) is not type(other):
        return NotImplemented
    (ours, own_tree), (theirs, other_tree) = jax.tree.flatten(self), jax.tree.flatten(other)
    same = lambda a, b: a is b or np.array_equal(a, b)  # noqa: E731
    return own_tree == other_tree and all(map(same, ours, theirs))
