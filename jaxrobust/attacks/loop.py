"""The form of an attack's loop, chosen per backend here and nowhere else.

One compiled loop is the fastest form, with one exception: on CPU, XLA lays out the input gradients
of its convolutions badly inside loops (jax issue 12868). The convolutions of `jaxrobust.models` are
free of that. A loss with XLA's own, called from the host, is stepped: a compiled, donated step runs
from Python. Inside a trace there is no stepping; `loop="unrolled"` then trades compile time for
speed. All forms give the same result.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

FORMS = ("auto", "fused", "stepped", "unrolled")

PyTree = Any


def iterate(
    step: Callable[..., PyTree],
    carry: PyTree,
    steps: int,
    *,
    operands: PyTree = (),
    static: tuple = (),
    form: str = "auto",
) -> PyTree:
    """Applies `carry = step(static, i, carry, operands)` for i = 0 .. steps - 1.

    Args:
        step: a pure function, the same object at every call so that it compiles once.
        carry: arrays; donated.
        steps: how often, at least 1.
        operands: arrays that all iterations share.
        static: hashable values, compiled in.
        form: "fused" (one XLA loop), "stepped" (a Python loop over a compiled step; from the host
            only), "unrolled" (no loop, for use inside a trace), or "auto".
    """
    leaves, tree = jax.tree.flatten((carry, operands))
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    form = choose(form, traced)
    if form == "auto":
        shapes = tuple(jax.typeof(leaf) for leaf in leaves)
        slow = _has_slow_convolution(step, static, steps, tree, shapes)
        form = "stepped" if slow else "fused"
    if form == "stepped":
        for i in range(steps):
            carry = _compiled_step(step, static, i, carry, operands)
        return carry
    if form == "unrolled":
        for i in range(steps):
            carry = step(static, i, carry, operands)
        return carry
    return _fused(step, static, steps, carry, operands)


def choose(form: str, traced: bool) -> str:
    """The loop's form for this backend; "auto" where it depends on what the step computes.

    Raises:
        ValueError: an unknown form, or "stepped" inside a trace.
    """
    if form not in FORMS:
        raise ValueError(f"loop must be one of {FORMS}, got {form!r}")
    if form == "stepped" and traced:
        raise ValueError("loop='stepped' runs from the host: use 'auto' inside jit, vmap or grad")
    if form != "auto":
        return form
    return "auto" if jax.default_backend() == "cpu" and not traced else "fused"


@functools.lru_cache(maxsize=64)
def _has_slow_convolution(step, static, steps, tree, shapes):
    """Whether the step's program holds a convolution of XLA's.

    It is asked of the fused form's own trace, which a fused call then finds in JAX's cache.
    """
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in shapes]
    carry, operands = jax.tree.unflatten(tree, structs)
    program = _fused.trace(step, static, steps, carry, operands).jaxpr
    return "conv_general_dilated" in str(program)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _compiled_step(step, static, i, carry, operands):
    return step(static, i, carry, operands)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _fused(step, static, steps, carry, operands):
    body = lambda i, carry: step(static, i, carry, operands)  # noqa: E731
    return jax.lax.fori_loop(0, steps, body, carry)
