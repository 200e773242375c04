"""Programs that wait for others of their launch.

Programs start in the order of their numbers: when one starts, those with smaller numbers run or have ended, so that it
may wait for them. CUDA does not promise it, but its GPUs do so; CUB's scans rest on the same.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait(counter, COUNT: gl.constexpr):
    """Until COUNT programs have called finish; what they wrote before is there then."""
    if COUNT > 0:
        finished = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while finished < COUNT:
            finished = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@gluon.jit
def signal(counter):
    """Tells those who wait that this program has written."""
    gl.barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")
