"""Rows that have adapters of their own: which adapters there are among them, one after another."""

import triton
import triton.language as tl


@triton.jit
def known_adapters(used, ADAPTERS: tl.constexpr):
    """Each row's adapter, -1 for one that does not exist."""
    return tl.where(used < ADAPTERS, used, -1)


@triton.jit
def next_adapter(used, adapter, ADAPTERS: tl.constexpr):
    """The lowest adapter above this one that a row has; ADAPTERS if none has.

    So a loop from next_adapter(used, -1, ADAPTERS) on takes as long as there are adapters among the rows, however many
    are loaded.

    used: each row's, of known_adapters.
    """
    return tl.min(tl.where(used > adapter, used, ADAPTERS), axis=0)
