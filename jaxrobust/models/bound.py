"""Functions of a model that are equal when the models are: what one compiled serves the other."""

import functools


class Bound(functools.partial):
    """A `functools.partial` that is equal to another of the same function and equal arguments.

    `jax.jit` looks up what it compiled by the equality of what is static, and a plain partial is
    equal to itself alone: the same model built again, as for the next seed of a table, would be
    traced and compiled again. Where an argument cannot be hashed (a module of one's own with a list
    or an array among its fields), each is equal to itself alone, too.
    """

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Bound) and self._identity == other._identity)

    @functools.cached_property
    def _identity(self) -> object:
        identity = self.func, self.args, tuple(sorted(self.keywords.items()))
        try:
            hash(identity)
        except TypeError:
            return object()
        return identity
