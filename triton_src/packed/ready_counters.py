"""Programs that wait for others of their launch: a counter for each tile, and tickets for the work that is waited for.

Why they cannot wait for ever: CUDA does not promise to start programs in the order of their numbers, so that a number
stands for none of the work that others wait for. Each piece of that has a ticket, and is done by the program that takes
the ticket. A piece of work waits for work of smaller tickets alone: a tile's down-shrink has a larger one than its
gate_up, and that a larger one than its shrink. Whoever has a smaller ticket took it before, so it has started, and CUDA
lets threads that have started go on, whatever others do. Of the tickets that are taken and not done, then, the smallest
is waited for and waits for nobody; its work ends, and so does that of all.

Nobody waits for the rest, down: it is the work of the programs after the first `tickets`, by their numbers. Such a
program waits for work of tickets, so it begins when all have been taken, which it sees by a look at their number; till
then it takes tickets itself. The first programs take one each, and find none left if others were there before them.
In the order in which GPUs do start programs, one of down's looks once, and takes none.

A ticket costs a trip to L2 and back, which a number does not. So does the look, but it is shorter and has one barrier.
One thread looks for all: others take tickets meanwhile, and threads that had seen different numbers would go different
ways and meet at different barriers.

Routing zeroes the counters and the tickets in each call, in a launch before.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# One thread asks, and the others read its answer in shared memory. The instructions read %tid.x themselves and have
# memory of their own: with gl.atomic_add LLVM and ptxas have the thread's number and Triton's shared memory from the
# beginning on, compute what depends on them before the loops, and keep it in registers that the loops lack. The memory
# is 1024 bytes since Triton's follows it, which wgmma takes in blocks of 1024. Threads may still read the last ticket
# before the first barrier.
_TAKE = gl.constexpr("""{ .reg .pred p; .reg .b32 t; .shared .align 1024 .b8 ticket[1024];
 mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
 @p atom.relaxed.gpu.global.add.u32 t, [$1], 1;
 bar.sync 0; @p st.shared.b32 [ticket], t;
 bar.sync 0; ld.shared.b32 $0, [ticket]; }""")

# Once in a program, before it takes a ticket: nobody reads this memory before.
_LOOK = gl.constexpr("""{ .reg .pred p; .reg .b32 t; .shared .align 1024 .b8 taken[1024];
 mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
 @p ld.relaxed.gpu.global.b32 t, [$1];
 @p st.shared.b32 [taken], t;
 bar.sync 0; ld.shared.b32 $0, [taken]; }""")


@gluon.jit
def take_ticket(tickets_ptr, OWN_MEMORY: gl.constexpr):
    """How many tickets had been taken before: the number of this one.

    OWN_MEMORY: by the instructions above, for kernels with less than 46 KiB of Triton's shared memory. For more than 48
    KiB in all CUDA must be asked, and launchers ask where Triton's alone is more.
    """
    if not OWN_MEMORY:
        return gl.atomic_add(tickets_ptr, 1, sem="relaxed", scope="gpu")
    return gl.inline_asm_elementwise(_TAKE, "=r,l", [tickets_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tickets_taken(tickets_ptr, OWN_MEMORY: gl.constexpr):
    """How many tickets have been taken, the same for all threads; OWN_MEMORY as in take_ticket."""
    if not OWN_MEMORY:
        return gl.atomic_add(tickets_ptr, 0, sem="relaxed", scope="gpu")
    return gl.inline_asm_elementwise(_LOOK, "=r,l", [tickets_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tickets_to_take(tickets_ptr, program, tickets, OWN_MEMORY: gl.constexpr):
    """How often a program takes a ticket: one of the first `tickets` once, another while there are any, if there are.

    There may be none left when it does.
    """
    times = 1
    if program >= tickets:
        times = tickets - tickets_taken(tickets_ptr, OWN_MEMORY)
    return times


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
