"""Programs that wait for others of their launch: a counter for each tile, and a proof that nobody waits for ever.

CUDA does not promise to start programs in the order of their numbers. What it promises is that threads that have
started go on, whatever others do. So a program may wait without a bound only for programs that have started, and these
may not wait for it. One word beside the counters is for that, and there are two ways.

By number, where gate_up waits for nobody: without LoRA, or with LoRA's shrink in a launch before. gate_up's programs do
the work of their numbers, and add to the word as they start, which they do not wait for. One of down's looks at the
word. If all of gate_up's have started, they end, since they wait for nobody, and it may wait for their counters. Till
then it looks again, LOOKS times at most; then it does all of gate_up's work itself, for which it waits for nobody, and
then adds to each tile's counter what all programs of the tile would. Its own wait is over then. Nobody is misled: a
tile's counter comes to its programs' number if each of them has signalled once, or if somebody has done all their work;
whoever does their work does not signal piece by piece. What is written twice has the same bits. If gate_up's have all
started before that work is done, the rest of it is left to them. In the order in which GPUs do start programs, one of
down's looks once, beside the load of its tile's expert.

By ticket, with LoRA's shrinks in the launch: gate_up waits for these. Each piece of work that is waited for has a
ticket, and is done by the program that takes the ticket. A piece of work waits for work of smaller tickets alone: a
tile's down-shrink has a larger one than its gate_up, and that a larger one than its shrink. Whoever has a smaller
ticket took it before, so it has started. Of the tickets that are taken and not done, then, the smallest is waited for
and waits for nobody; its work ends, and so does that of all. Nobody waits for the rest, down: it is the work of the
programs after the first `tickets`, by their numbers. Such a program waits for work of tickets, so it begins when all
have been taken, which it sees by a look at their number; till then it takes tickets itself. The first programs take one
each, and find none left if others were there before them. A ticket costs a trip to L2 and back and two barriers, at 1
token a fifth of the launch.

One answer is for all threads of a program: others start and take tickets meanwhile, and threads that had seen different
numbers would go different ways and meet at different barriers.

Routing zeroes the counters and the word in each call, in a launch before.
"""

import triton.language as tl
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


# One thread tells. The result is there since Triton wants one.
_TELL = gl.constexpr("""{ .reg .pred p; .reg .b32 t; mov.b32 $0, 0;
 mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
 @p red.relaxed.gpu.global.add.u32 [$1], 1; }""")

# Each thread looks; the barrier makes one answer of theirs, without shared memory. Without an expert it is yes.
_ALL_STARTED = gl.constexpr("""{ .reg .pred p; .reg .b32 t;
 ld.relaxed.gpu.global.b32 t, [$1];
 setp.ge.s32 p, t, $2; setp.lt.or.s32 p, $3, 0, p;
 bar.red.and.pred p, 0, p; selp.b32 $0, 1, 0, p; }""")

LOOKS = gl.constexpr(64)
"""Some tens of microseconds: programs that have started tell within one or two."""


@gluon.jit
def take_ticket(tickets_ptr):
    """How many tickets had been taken before: the number of this one.

    For kernels with less than 46 KiB of Triton's shared memory: for more than 48 KiB in all CUDA must be asked, and
    launchers ask where Triton's alone is more.
    """
    return gl.inline_asm_elementwise(_TAKE, "=r,l", [tickets_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tickets_taken(tickets_ptr):
    """How many tickets have been taken, the same for all threads."""
    return gl.inline_asm_elementwise(_LOOK, "=r,l", [tickets_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tickets_to_take(tickets_ptr, program, tickets):
    """How often a program takes a ticket: one of the first `tickets` once, another while there are any, if there are.

    There may be none left when it does.
    """
    times = 1
    if program >= tickets:
        times = tickets - tickets_taken(tickets_ptr)
    return times


@gluon.jit
def tell_started(started_ptr):
    """Counts this program among those that have started, and waits for nothing."""
    gl.inline_asm_elementwise(_TELL, "=r,l", [started_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def all_started(started_ptr, programs, expert):
    """1 if so many programs have started, the same for all threads, or if the expert is -1 and nobody waits; else 0."""
    return gl.inline_asm_elementwise(
        _ALL_STARTED, "=r,l,r,r", [started_ptr.to(gl.int64), programs, expert], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def all_start(started_ptr, programs, expert):
    """As all_started, once they have or after LOOKS looks."""
    started = all_started(started_ptr, programs, expert)
    looks = 1
    while (started == 0) & (looks < LOOKS):
        started = all_started(started_ptr, programs, expert)
        looks += 1
    return started


@gluon.jit
def start(started_ptr, program, programs, pieces, expert_ptr):
    """(begin, step) of the work that a program does, of pieces that the first `programs` programs share.

    These tell that they start. Another one looks, and does nothing of it if all of them have started, else everything.
    expert_ptr: of its tile; without an expert it waits for nobody.
    """
    begin = program
    step = programs
    if program < programs:
        tell_started(started_ptr)
    else:
        begin = 0
        step = 1
        if all_start(started_ptr, programs, gl.load(expert_ptr)) != 0:
            begin = pieces
    return begin, step


@gluon.jit
def is_mine(started_ptr, program, programs):
    """Whether a program shall do its next piece: others' only as long as they have not all started."""
    started = 0
    if program >= programs:
        started = all_started(started_ptr, programs, 0)
    return started == 0


@gluon.jit
def signal_all(counters_ptr, tiles, count):
    """signal to each tile's counter."""
    for tile in tl.range(0, tiles, disable_licm=True):
        signal(counters_ptr + tile, count)


@gluon.jit
def wait(counter, COUNT: gl.constexpr):
    """Until COUNT programs have signalled; what they wrote before is there then."""
    if COUNT > 0:
        signalled = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while signalled < COUNT:
            signalled = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@gluon.jit
def signal(counter, count):
    """Tells those who wait that this program has written, what `count` programs should."""
    gl.barrier()
    gl.atomic_add(counter, count, sem="release", scope="gpu")
