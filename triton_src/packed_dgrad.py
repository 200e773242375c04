"""The gradient of the experts' products in their rows, from packed MXFP4: the same bytes, read across.

The contraction runs over the weights' rows, so they are operand B: a strip of 64 rows by 128 columns is decoded in
registers and stored in shared memory, while the tensor cores multiply by the strip before it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from jmoe.triton_src.dgrad import dgrad_lora_operands
from jmoe.triton_src.lora import lora_constexprs
from jmoe.triton_src.packed_lora import load_adapters, load_shrunk
from jmoe.triton_src.packed_weight import (
    nan_bits,
    scale_offsets,
    scales_layout,
    unpack_strip,
    word_offsets,
    words_layout,
)
from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.tiles import DgradTile, ManyRowsTile


@gluon.jit(do_not_specialize=["pairs"])
def packed_dgrad_kernel(
    grad_ptr,  # gate_up: (P, N) bf16 by position; down: (T, N) bf16
    words_ptr,  # (E, NP / 64, KP / 64, 512) int32
    scales_ptr,  # (E, NP / 64, KP / 64, 32) int32
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position: scale * grad B, or None without LoRA
    lora_a_ptr,  # (A, E, R, K) bf16 or float32, or None without LoRA
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    out_ptr,  # gate_up: (P, K) bf16 by pair; down: (P, K) bf16 by position
    pairs,
    N: gl.constexpr,
    K: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    ADAPTERS: gl.constexpr,
    RANK: gl.constexpr,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    GATE_UP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """As dgrad_kernel, of 128 columns; eight warps. Grid: (cdiv(K, 128), slots)."""
    tile = gl.program_id(1)
    expert = gl.load(tiles_ptr + tile * 3)
    if expert < 0:
        return
    first = gl.load(tiles_ptr + tile * 3 + 1)
    end = gl.load(tiles_ptr + tile * 3 + 2)
    ROW_WARPS: gl.constexpr = min(8, BLOCK_M // 16)
    C: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[ROW_WARPS, 8 // ROW_WARPS], instr_shape=[16, 16 * ROW_WARPS, 16]
    )
    W: gl.constexpr = words_layout(8)
    S: gl.constexpr = scales_layout(8)
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BLOCKS: gl.constexpr = (N + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (K + 63) // 64

    position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X))
    row_ok = (position < end)[:, None]
    row = position
    if not GATE_UP:
        row = gl.load(order_ptr + position, mask=position < end, other=0) // TOP_K
    n_in_stage = gl.arange(0, 64, gl.SliceLayout(0, X))[None, :]
    grad = grad_ptr + row.to(gl.int64)[:, None] * N + n_in_stage
    # For even and for odd blocks of 64 rows of the weights: what is filled is never a buffer of which the tensor cores
    # read a part, and the compiler sees that it needs no barrier for that.
    even_stages = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_M, 64], SHARED)
    odd_stages = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_M, 64], SHARED)
    even_strip = gl.allocate_shared_memory(gl.bfloat16, [64, 128], SHARED)
    odd_strip = gl.allocate_shared_memory(gl.bfloat16, [64, 128], SHARED)
    copy_rows(even_stages.index(0), grad, row_ok, n_in_stage, 0, N)
    copy_rows(odd_stages.index(0), grad, row_ok, n_in_stage, 64, N)
    copy_rows(even_stages.index(1), grad, row_ok, n_in_stage, 128, N)

    # Warps 0 to 3 hold the strip's first block of 64 columns, 4 to 7 the second, which may lie past K.
    block = gl.program_id(0) * 2
    base = expert.to(gl.int64) * (BLOCKS * COLUMN_BLOCKS) + block
    word = word_offsets(8, 128, W)
    scale = scale_offsets(8, 8, S)
    word_ok = block + word // 512 < COLUMN_BLOCKS
    scale_ok = block + scale // 32 < COLUMN_BLOCKS
    words = words_ptr + base * 512 + word
    scales = scales_ptr + base * 32 + scale
    w = ()
    s = ()
    for i in gl.static_range(AHEAD):
        w = w + (load_ahead(words, word_ok, i, COLUMN_BLOCKS * 512, BLOCKS),)
        s = s + (load_ahead(scales, scale_ok, i, COLUMN_BLOCKS * 32, BLOCKS),)

    acc = gl.zeros([BLOCK_M, 128], gl.float32, C)
    if lora_a_ptr is not None:
        # Neither the last stage nor the second strip holds anything yet.
        shared = odd_stages.index(1).slice(0, BLOCK_R, dim=1)
        shared_a = odd_strip.slice(0, BLOCK_R, dim=0)
        if adapter_ids_ptr is None:
            acc = expand_a(
                acc, shared, shared_a, shrunk_ptr, lora_a_ptr, pairs, expert.to(gl.int64) * RANK, first, end,
                K, RANK, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M,
            )  # fmt: skip
        else:
            used = load_adapters(adapter_ids_ptr, order_ptr, first, end, TOP_K, BLOCK_M, gl.SliceLayout(1, C))
            for adapter in range(ADAPTERS):
                mine = used == adapter
                if gl.max(mine.to(gl.int32), axis=0) > 0:
                    expanded = expand_a(
                        gl.zeros([BLOCK_M, 128], gl.float32, C), shared, shared_a, shrunk_ptr, lora_a_ptr, pairs,
                        (adapter * EXPERTS + expert).to(gl.int64) * RANK, first, end,
                        K, RANK, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M,
                    )  # fmt: skip
                    acc = gl.where(mine[:, None], expanded, acc)
    nan = nan_bits(s[0])
    even_strip.store(unpack_strip(w[0], s[0]))
    async_copy.wait_group(2)
    fence_async_shared()
    stage = 0
    for n in range(0, BLOCKS // 2 * 2, 2):
        acc = warpgroup_mma(even_stages.index(stage), even_strip, acc, is_async=True)
        w = w[1:] + (load_ahead(words, word_ok, n + AHEAD, COLUMN_BLOCKS * 512, BLOCKS),)
        s = s[1:] + (load_ahead(scales, scale_ok, n + AHEAD, COLUMN_BLOCKS * 32, BLOCKS),)
        nan = nan | nan_bits(s[0])
        odd_strip.store(unpack_strip(w[0], s[0]))
        copy_rows(odd_stages.index(1 - stage), grad, row_ok, n_in_stage, (n + 3) * 64, N)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        async_copy.wait_group(2)
        fence_async_shared()
        acc = warpgroup_mma(odd_stages.index(stage), odd_strip, acc, is_async=True)
        w = w[1:] + (load_ahead(words, word_ok, n + 1 + AHEAD, COLUMN_BLOCKS * 512, BLOCKS),)
        s = s[1:] + (load_ahead(scales, scale_ok, n + 1 + AHEAD, COLUMN_BLOCKS * 32, BLOCKS),)
        nan = nan | nan_bits(s[0])
        even_strip.store(unpack_strip(w[0], s[0]))
        copy_rows(even_stages.index(stage), grad, row_ok, n_in_stage, (n + 4) * 64, N)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        async_copy.wait_group(2)
        fence_async_shared()
        stage = 1 - stage
    if BLOCKS % 2:
        acc = warpgroup_mma(even_stages.index(stage), even_strip, acc)
    async_copy.wait_group(0)

    acc = gl.where(nan_columns(nan, gl.SliceLayout(0, C))[None, :], float("nan"), acc)
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    out = gl.convert_layout(acc.to(gl.bfloat16), OUT)
    out_position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
    out_row = out_position
    if GATE_UP:
        out_row = gl.load(order_ptr + out_position, mask=out_position < end, other=0)
    column = gl.program_id(0) * 128 + gl.arange(0, 128, gl.SliceLayout(0, OUT))
    ok = (out_position < end)[:, None] & (column < K)[None, :]
    gl.store(out_ptr + out_row.to(gl.int64)[:, None] * K + column[None, :], out, mask=ok)


@gluon.jit
def copy_rows(stage, grad, row_ok, n_in_stage, n, N: gl.constexpr):
    """Starts the copy of 64 columns from n on of the tile's rows into a stage; zeros past the rows and past N."""
    whole = row_ok & (n < N) & (n_in_stage >= 0)
    ok = whole if N % 64 == 0 else row_ok & (n + n_in_stage < N)
    async_copy.async_load(stage, grad + n, mask=ok)
    async_copy.commit_group()


@gluon.jit
def load_ahead(pointers, ok, block, STRIDE: gl.constexpr, BLOCKS: gl.constexpr):
    """A strip's words or scales; zero past the last strip."""
    return gl.load(pointers + block * STRIDE, mask=ok & (block < BLOCKS), other=0)


@gluon.jit
def nan_columns(nan, COLUMNS: gl.constexpr):
    """Which of a strip's 128 columns have a scale of 255 in any row, from nan_bits (8, 8): two rows by two groups."""
    COLUMNS_2D: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [2, 4], [1, 0])
    BLOCKS: gl.constexpr = gl.SliceLayout(1, COLUMNS_2D)
    blocks = nan.reshape([2, 32])
    low = gl.convert_layout(gl.max(((blocks & 0x00008080) != 0).to(gl.int32), axis=1), BLOCKS)
    high = gl.convert_layout(gl.max(((blocks & -2139095040) != 0).to(gl.int32), axis=1), BLOCKS)
    column = gl.arange(0, 64, gl.SliceLayout(0, COLUMNS_2D))[None, :]
    groups = gl.where(column < 32, low[:, None], high[:, None])
    return gl.convert_layout(groups.reshape([128]), COLUMNS) != 0


@gluon.jit
def expand_a(
    acc, shared, shared_a, shrunk_ptr, lora_a_ptr, pairs, rows, first, end,
    K: gl.constexpr,
    RANK: gl.constexpr,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """acc + (scale * grad B) A for the adapter whose rows of A begin at `rows`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    column = gl.program_id(0) * 128 + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    for rank in range(0, RANK_PADDED, BLOCK_R):
        shared.store(load_shrunk(shrunk_ptr, first, end, rank, pairs, RANK_PADDED, SPLITS, BLOCK_M, BLOCK_R, 8))
        ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(1, LAYOUT))
        ok = (ranks < RANK)[:, None] & (column < K)[None, :]
        a = gl.load(lora_a_ptr + (rows + ranks)[:, None] * K + column[None, :], mask=ok, other=0.0)
        shared_a.store(a.to(gl.bfloat16))
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(shared, shared_a, acc)
        gl.barrier()
    return acc


def plan_packed_dgrad(
    projection: str,
    *,
    n: int,
    k: int,
    slots: int,
    pairs: int,
    top_k: int,
    experts: int,
    adapters: int,
    rank: int | None,
    adapter_ids: bool,
    routed: ManyRowsTile,
    tile: DgradTile,
) -> Plan:
    """gate_up: pair_dx [P, H] from pre_activations_grad. down: down_dgrad [P, I] from dy [T, H].

    routed: the tile of the routing and of LoRA's shrink.
    """
    gate_up = projection == "gate_up"
    return Plan(
        kernel=packed_dgrad_kernel,
        grid=(cdiv(k, 128), slots),
        operands={
            "grad_ptr": "pre_activations_grad" if gate_up else "dy",
            "words_ptr": projection,
            "scales_ptr": f"{projection}_scales",
            **dgrad_lora_operands(projection, rank, adapter_ids),
            "order_ptr": "order",
            "tiles_ptr": "tiles",
        },
        scalars={"pairs": pairs},
        outputs={"out_ptr": Buffer("pair_dx" if gate_up else "down_dgrad", (pairs, k), "bfloat16")},
        constexprs={
            "N": n,
            "K": k,
            "EXPERTS": experts,
            "TOP_K": top_k,
            **lora_constexprs(adapters, rank, routed.shrink_splits),
            "GATE_UP": gate_up,
            "BLOCK_M": routed.block_m,
            "AHEAD": tile.ahead,
        },
        num_warps=8,
        num_stages=1,
        # Mixed adapters hold a second accumulator while they are expanded.
        max_registers=None if rank is not None and adapter_ids else tile.max_registers,
        flops=2 * pairs * k * (n + (rank or 0)),
        bytes_accessed=min(pairs, experts) * n * k * 17 // 32 + 2 * pairs * (n + k),
    )
