"""The form of an attack's loop, chosen per backend here and nowhere else.

On accelerators the whole attack is one compiled loop. On CPU, XLA lays out the input gradients of
convolutions badly inside its loops (jax issue 12868): an attack called from the host runs a
compiled, donated step from Python instead, which is fast for any model. Inside a trace the loop is
fused all the same: the convolutions of `jaxrobust.models` keep their speed there. For a model with
convolutions of its own, `loop="unrolled"` trades compile time for theirs. All forms give the same
result.
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
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((carry, operands)))
    form = choose(form, traced)
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
    """The loop's form for this backend: `form` itself unless it is "auto".

    Raises:
        ValueError: an unknown form, or "stepped" inside a trace.
    """
    if form not in FORMS:
        raise ValueError(f"loop must be one of {FORMS}, got {form!r}")
    if form == "stepped" and traced:
        raise ValueError("loop='stepped' runs from the host: use 'auto' inside jit, vmap or grad")
    if form != "auto":
        return form
    return "stepped" if jax.default_backend() == "cpu" and not traced else "fused"


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _compiled_step(step, static, i, carry, operands):
    return step(static, i, carry, operands)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _fused(step, static, steps, carry, operands):
    body = lambda i, carry: step(static, i, carry, operands)  # noqa: E731
    return jax.lax.fori_loop(0, steps, body, carry)
