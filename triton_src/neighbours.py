"""Which work a program has, so that those of one multiprocessor read the same rows: out of its L1, not out of L2."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MULTIPROCESSORS = gl.constexpr(132)
"""Of an H100. With another number each program still has its own work, but not beside its neighbours."""


@gluon.jit
def neighbouring(program, programs, RESIDENT: gl.constexpr):
    """A permutation of `programs` programs: of those that start together RESIDENT on a multiprocessor are consecutive.

    GPUs start programs in the order of their numbers, one on each multiprocessor in turn.
    """
    TOGETHER: gl.constexpr = MULTIPROCESSORS * RESIDENT
    begin = program // TOGETHER * TOGETHER
    nth = program - begin
    neighbour = begin + nth % MULTIPROCESSORS * RESIDENT + nth // MULTIPROCESSORS
    return gl.where(begin + TOGETHER <= programs, neighbour, program)
