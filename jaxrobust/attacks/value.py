"""What it is to be an attack: a frozen value whose numbers are leaves of a pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

Number = Any  # a number or an array of numbers, concrete or traced
LossFn = Callable[..., Array]


def attack_value(data: tuple[str, ...], meta: tuple[str, ...]) -> Callable[[type], type]:
    """Makes a frozen dataclass a pytree: `data` are leaves, `meta` is compiled in."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)

    return register
