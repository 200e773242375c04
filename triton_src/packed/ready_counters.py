"""Programs that wait for others of their launch: a counter for each tile, and tickets in the order of which they wait.

Why they cannot wait for ever: CUDA does not promise to start programs in the order of their numbers, so that a number
stands for no work here. A program takes a ticket when it starts, and has the work of that ticket. It waits for work of
smaller tickets alone: a tile's shrink and gate_up have smaller ones than its down. Whoever has a smaller ticket took it
before, so it has started, and CUDA lets threads that have started go on, whatever others do. Of the programs that have
not ended, then, the one with the smallest ticket waits for nobody; it ends, and so do all.

Routing zeroes the counters and the tickets in each call, in a launch before.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def take_ticket(ready_counters_ptr, max_tiles):
    """The number of this program, in the order in which programs start; one thread asks, for all of them."""
    return gl.atomic_add(ready_counters_ptr + max_tiles, 1, sem="relaxed", scope="gpu")


@gluon.jit
def wait(counter, COUNT: gl.constexpr):
    """Until COUNT programs have signalled; what they wrote before is there then."""
    if COUNT > 0:
        signalled = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while signalled < COUNT:
            signalled = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@gluon.jit
def signal(counter):
    """Tells those who wait that this program has written."""
    gl.barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")
