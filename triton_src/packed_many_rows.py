"""The experts' two products from packed MXFP4, for many rows an expert: weights in registers, tokens in shared memory.

A warp group's wgmma takes decoded weights as operand A from registers, so they never pass through shared memory, and
tokens as operand B. While one product runs, the warps decode the weights of the next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from jmoe.triton_src.activation import keep_clamped, swiglu_tile
from jmoe.triton_src.grouped_matmul import pre_activations
from jmoe.triton_src.lora import lora_constexprs, lora_operands
from jmoe.triton_src.packed_lora import load_adapters, load_lora_b, load_shrunk
from jmoe.triton_src.packed_weight import (
    nan_bits,
    scale_offsets,
    scales_layout,
    unpack_weights,
    word_offsets,
    words_layout,
)
from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.stacked import Stacked, in_stack
from jmoe.triton_src.tiles import ManyRowsTile


@gluon.jit(do_not_specialize=["pairs"])
def packed_many_rows_kernel(
    x_ptr,  # gate_up: (T, K) bf16; down: (P, K) bf16 by position
    words_ptr,  # (E, NP / 64, KP / 64, 512) int32
    scales_ptr,  # (E, NP / 64, KP / 64, 32) int32
    bias_ptr,  # (E, N) bf16 or float32, or None
    gates_ptr,  # down: (P,) float32, routing weight by pair; gate_up: None
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position, or None without LoRA
    lora_b_ptr,  # (A, E, N, R) bf16 or float32, or None without LoRA
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    out_ptr,  # gate_up: (P, N / 2) bf16 by position; down: (P, N) bf16 by pair
    pre_activations_ptr,  # gate_up: (P, N) bf16 by position, or None unless they are kept for gradients
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
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SMALLEST_M: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """As grouped_matmul_kernel, of 128 columns; eight warps.

    A tile's last rows go through a product of fewer rows where that is enough, down to SMALLEST_M.
    Grid: (cdiv(N, 128), slots).
    """
    tile = gl.program_id(1)
    expert = gl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first = gl.load(tiles_ptr + tile * 3 + 1)
        end = gl.load(tiles_ptr + tile * 3 + 2)
        lora_expert = in_stack(expert, lora_layer_ptr, ADAPTERS * EXPERTS)
        expert = in_stack(expert, layer_ptr, EXPERTS)
        if (end - first <= BLOCK_M // 4) & (BLOCK_M // 4 >= SMALLEST_M):
            packed_tile(
                x_ptr, words_ptr, scales_ptr, bias_ptr, gates_ptr, shrunk_ptr, lora_b_ptr, adapter_ids_ptr, order_ptr,
                out_ptr, pre_activations_ptr, pairs, expert, lora_expert, first, end, N, K, EXPERTS, TOP_K, ADAPTERS,
                RANK, RANK_PADDED, BLOCK_R, SPLITS, GATE_UP, ALPHA, LIMIT, max(BLOCK_M // 4, SMALLEST_M), STAGES, AHEAD,
            )  # fmt: skip
        elif (end - first <= BLOCK_M // 2) & (BLOCK_M // 2 >= SMALLEST_M):
            packed_tile(
                x_ptr, words_ptr, scales_ptr, bias_ptr, gates_ptr, shrunk_ptr, lora_b_ptr, adapter_ids_ptr, order_ptr,
                out_ptr, pre_activations_ptr, pairs, expert, lora_expert, first, end, N, K, EXPERTS, TOP_K, ADAPTERS,
                RANK, RANK_PADDED, BLOCK_R, SPLITS, GATE_UP, ALPHA, LIMIT, max(BLOCK_M // 2, SMALLEST_M), STAGES, AHEAD,
            )  # fmt: skip
        else:
            packed_tile(
                x_ptr, words_ptr, scales_ptr, bias_ptr, gates_ptr, shrunk_ptr, lora_b_ptr, adapter_ids_ptr, order_ptr,
                out_ptr, pre_activations_ptr, pairs, expert, lora_expert, first, end, N, K, EXPERTS, TOP_K, ADAPTERS,
                RANK, RANK_PADDED, BLOCK_R, SPLITS, GATE_UP, ALPHA, LIMIT, BLOCK_M, STAGES, AHEAD,
            )  # fmt: skip


@gluon.jit
def copy_tokens(stages, stage, x, row_ok, k_in_stage, k, K: gl.constexpr):
    """Starts the copy of 128 columns from k on of the tile's rows into a stage; zeros past the rows and past K."""
    async_copy.async_load(stages.index(stage), x + k, mask=row_ok & (k + k_in_stage < K))
    async_copy.commit_group()


@gluon.jit
def load_ahead(pointers, offsets, block, STRIDE: gl.constexpr, BLOCKS: gl.constexpr):
    """A block's words or scales; zero past the last block."""
    return gl.load(pointers + block * STRIDE, mask=(offsets >= 0) & (block < BLOCKS), other=0)


@gluon.jit
def packed_tile(
    x_ptr, words_ptr, scales_ptr, bias_ptr, gates_ptr, shrunk_ptr, lora_b_ptr, adapter_ids_ptr, order_ptr,
    out_ptr, pre_activations_ptr, pairs, expert, lora_expert, first, end,
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
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """One tile of positions of an expert by 128 columns."""
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    W: gl.constexpr = words_layout(8)
    S: gl.constexpr = scales_layout(8)
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BLOCKS: gl.constexpr = (K + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (N + 63) // 64

    position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X))
    row_ok = (position < end)[:, None]
    row = position
    if GATE_UP:
        row = gl.load(order_ptr + position, mask=position < end, other=0) // TOP_K
    k_in_stage = gl.arange(0, 128, gl.SliceLayout(0, X))[None, :]
    x = x_ptr + row.to(gl.int64)[:, None] * K + k_in_stage
    stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, 128], SHARED)
    for i in gl.static_range(STAGES - 1):
        copy_tokens(stages, i, x, row_ok, k_in_stage, 128 * i, K)

    # Of an odd number of tiles the last is taken twice; its second half is not stored.
    tile = gl.program_id(0) * 2
    stride = gl.where(tile + 1 < COLUMN_BLOCKS, BLOCKS, 0)
    tile = (expert.to(gl.int64) * COLUMN_BLOCKS + tile) * BLOCKS
    word = word_offsets(8, 128, W)
    word += word // 512 * (stride * 512 - 512)
    scale = scale_offsets(8, 8, S)
    scale += scale // 32 * (stride * 32 - 32)
    words = words_ptr + tile * 512 + word
    scales = scales_ptr + tile * 32 + scale
    w = ()
    s = ()
    for i in gl.static_range(AHEAD):
        w = w + (load_ahead(words, word, i, 512, BLOCKS),)
        s = s + (load_ahead(scales, scale, i, 32, BLOCKS),)

    acc = gl.zeros([128, BLOCK_M], gl.float32, C)
    if lora_b_ptr is not None:
        # The last stage holds no tokens until the loop below fills it.
        shrunk = stages.index(STAGES - 1).slice(0, BLOCK_R, dim=1)
        if adapter_ids_ptr is None:
            acc = expand(
                acc, shrunk, shrunk_ptr, lora_b_ptr, pairs, lora_expert.to(gl.int64) * N, first, end,
                N, RANK, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M, A,
            )  # fmt: skip
        else:
            # Half of the tile at a time: a whole second accumulator does not fit beside the first.
            HALF: gl.constexpr = BLOCK_M // 2
            low = expand_mixed(
                shrunk.slice(0, HALF, dim=0), shrunk_ptr, lora_b_ptr, adapter_ids_ptr, order_ptr, pairs, lora_expert,
                first, end, N, EXPERTS, TOP_K, ADAPTERS, RANK, RANK_PADDED, BLOCK_R, SPLITS, HALF,
            )  # fmt: skip
            high = expand_mixed(
                shrunk.slice(0, HALF, dim=0), shrunk_ptr, lora_b_ptr, adapter_ids_ptr, order_ptr, pairs, lora_expert,
                first + HALF, end, N, EXPERTS, TOP_K, ADAPTERS, RANK, RANK_PADDED, BLOCK_R, SPLITS, HALF,
            )  # fmt: skip
            both = gl.permute(gl.join(low, high), (0, 2, 1)).reshape([128, BLOCK_M])
            acc = gl.convert_layout(both, C)
    nan = nan_bits(s[0])
    even = unpack_weights(w[0], s[0], A)
    read = 0
    write = STAGES - 1
    for block in range(0, BLOCKS // 2 * 2, 2):
        async_copy.wait_group(STAGES - 2)
        acc = warpgroup_mma(even, stages.index(read).slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
        nan = nan | nan_bits(s[1])
        odd = unpack_weights(w[1], s[1], A)
        ahead_w = ()
        ahead_s = ()
        for i in gl.static_range(2):
            ahead_w = ahead_w + (load_ahead(words, word, block + AHEAD + i, 512, BLOCKS),)
            ahead_s = ahead_s + (load_ahead(scales, scale, block + AHEAD + i, 32, BLOCKS),)
        w = w[2:] + ahead_w
        s = s[2:] + ahead_s
        # The next operand is among what the wait is for, so that it is decoded while the product runs.
        acc, odd = warpgroup_mma_wait(num_outstanding=0, deps=[acc, odd])
        acc = warpgroup_mma(odd, stages.index(read).slice(64, 64, dim=1).permute((1, 0)), acc, is_async=True)
        copy_tokens(stages, write, x, row_ok, k_in_stage, (block + 2 * (STAGES - 1)) * 64, K)
        nan = nan | nan_bits(s[0])
        even = unpack_weights(w[0], s[0], A)
        acc, even = warpgroup_mma_wait(num_outstanding=0, deps=[acc, even])
        read = gl.where(read == STAGES - 1, 0, read + 1)
        write = gl.where(write == STAGES - 1, 0, write + 1)
    if BLOCKS % 2:
        async_copy.wait_group(STAGES - 2)
        acc = warpgroup_mma(even, stages.index(read).slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    async_copy.wait_group(0)
    store_tile(
        acc, nan, bias_ptr, gates_ptr, order_ptr, out_ptr, pre_activations_ptr, expert, first, end,
        N, GATE_UP, ALPHA, LIMIT, BLOCK_M,
    )  # fmt: skip


@gluon.jit
def expand(
    acc, shared, shrunk_ptr, lora_b_ptr, pairs, rows, first, end,
    N: gl.constexpr,
    RANK: gl.constexpr,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    A: gl.constexpr,
):  # fmt: skip
    """acc + B (x A^T)^T for the adapter whose rows of B begin at `rows`."""
    for rank in range(0, RANK_PADDED, BLOCK_R):
        shared.store(load_shrunk(shrunk_ptr, first, end, rank, pairs, RANK_PADDED, SPLITS, BLOCK_M, BLOCK_R, 8))
        b = load_lora_b(lora_b_ptr, rows, gl.program_id(0) * 128, rank, N, RANK, BLOCK_R, A, 8)
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(b, shared.permute((1, 0)), acc)
    return acc


@gluon.jit
def expand_mixed(
    shared, shrunk_ptr, lora_b_ptr, adapter_ids_ptr, order_ptr, pairs, expert, first, end,
    N: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    ADAPTERS: gl.constexpr,
    RANK: gl.constexpr,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """(128, BLOCK_M) B (x A^T)^T of each position's own adapter; others' are selected away, not multiplied by zero."""
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    acc = gl.zeros([128, BLOCK_M], gl.float32, C)
    used = load_adapters(adapter_ids_ptr, order_ptr, first, end, TOP_K, BLOCK_M, gl.SliceLayout(0, C))
    for adapter in range(ADAPTERS):
        mine = used == adapter
        if gl.max(mine.to(gl.int32), axis=0) > 0:
            rows = (adapter * EXPERTS + expert).to(gl.int64) * N
            zero = gl.zeros([128, BLOCK_M], gl.float32, C)
            expanded = expand(
                zero, shared, shrunk_ptr, lora_b_ptr, pairs, rows, first, end,
                N, RANK, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M, A,
            )  # fmt: skip
            acc = gl.where(mine[None, :], expanded, acc)
    return acc


@gluon.jit
def store_tile(
    acc, nan, bias_ptr, gates_ptr, order_ptr, out_ptr, pre_activations_ptr, expert, first, end,
    N: gl.constexpr,
    GATE_UP: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """What follows the product, and the store."""
    column = gl.program_id(0) * 128
    POSITIONS: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    position = first + gl.arange(0, BLOCK_M, POSITIONS)
    pairs = gl.load(order_ptr + position, mask=position < end, other=0)
    # Fragment rows g and g + 8 of a warp's 16 are columns 2g and 2g + 1: gate and up, in one thread.
    even, odd = gl.split(gl.permute(acc.reshape([8, 2, 8, BLOCK_M]), (0, 2, 3, 1)))
    even = even.reshape([64, BLOCK_M])
    odd = odd.reshape([64, BLOCK_M])
    COLUMNS: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    ROWS: gl.constexpr = gl.SliceLayout(0, even.type.layout)
    nan = gl.convert_layout(nan.reshape([64]), COLUMNS)[:, None]
    even = gl.where((nan & 0x00800080) != 0, float("nan"), even)
    odd = gl.where((nan & -2147450880) != 0, float("nan"), odd)
    if bias_ptr is not None:
        pair_column = column + 2 * gl.arange(0, 64, COLUMNS)
        bias = bias_ptr + expert.to(gl.int64) * N + pair_column
        even += gl.load(bias, mask=pair_column < N, other=0.0).to(gl.float32)[:, None]
        odd += gl.load(bias + 1, mask=pair_column < N, other=0.0).to(gl.float32)[:, None]
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 8], [0, 1])
    out_position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    row_ok = out_position < end
    if pre_activations_ptr is not None:
        kept_gate, kept_up = keep_clamped(even, odd, LIMIT)
        store_columns(pre_activations_ptr, kept_gate, kept_up, out_position, row_ok, column, N, BLOCK_M, OUT)
    if GATE_UP:
        out = gl.convert_layout(swiglu_tile(even, odd, ALPHA, LIMIT).to(gl.bfloat16), OUT)
        out_column = column // 2 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
        ok = (out_column < N // 2)[:, None] & row_ok[None, :]
        gl.store(out_ptr + out_position.to(gl.int64)[None, :] * (N // 2) + out_column[:, None], out, mask=ok)
    else:
        gates = gl.load(gates_ptr + pairs, mask=position < end, other=0.0)
        gate = gl.convert_layout(gates, ROWS)[None, :]
        pair = gl.convert_layout(pairs, gl.SliceLayout(0, OUT))
        store_columns(out_ptr, even * gate, odd * gate, pair, row_ok, column, N, BLOCK_M, OUT)


@gluon.jit
def store_columns(out_ptr, even, odd, row, row_ok, column, N: gl.constexpr, BLOCK_M: gl.constexpr, OUT: gl.constexpr):
    """out[row, column + 2i] = even[i], out[row, column + 2i + 1] = odd[i], in bf16."""
    both = gl.permute(gl.join(even.to(gl.bfloat16), odd.to(gl.bfloat16)), (0, 2, 1))
    out = gl.convert_layout(both.reshape([128, BLOCK_M]), OUT)
    out_column = column + gl.arange(0, 128, gl.SliceLayout(1, OUT))
    ok = (out_column < N)[:, None] & row_ok[None, :]
    gl.store(out_ptr + row.to(gl.int64)[None, :] * N + out_column[:, None], out, mask=ok)


def plan_packed_many_rows(
    projection: str,
    *,
    n: int,
    k: int,
    slots: int,
    pairs: int,
    top_k: int,
    experts: int,
    bias: bool,
    adapters: int,
    rank: int | None,
    adapter_ids: bool,
    stacked: Stacked,
    swiglu_alpha: float,
    swiglu_limit: float,
    tile: ManyRowsTile,
    keep: bool = False,
) -> Plan:
    """gate_up: activations [P, I] from x [T, H], and pre_activations [P, 2I] too if `keep`.

    down: pair_out [P, H] from activations.
    """
    gate_up = projection == "gate_up"
    width = n // 2 if gate_up else n
    return Plan(
        kernel=packed_many_rows_kernel,
        grid=(cdiv(n, 128), slots),
        operands={
            "x_ptr": "x" if gate_up else "activations",
            "words_ptr": projection,
            "scales_ptr": f"{projection}_scales",
            "bias_ptr": f"{projection}_bias" if bias else None,
            "gates_ptr": None if gate_up else "weights",
            **lora_operands(projection, rank, adapter_ids),
            "order_ptr": "order",
            "tiles_ptr": "tiles",
            **stacked.weights_operand,
            **stacked.lora_operand,
            **({} if keep else {"pre_activations_ptr": None}),
        },
        scalars={"pairs": pairs},
        outputs={
            "out_ptr": Buffer("activations" if gate_up else "pair_out", (pairs, width), "bfloat16"),
            **(pre_activations(pairs, n) if keep else {}),
        },
        constexprs={
            "N": n,
            "K": k,
            "EXPERTS": experts,
            "TOP_K": top_k,
            **lora_constexprs(adapters, rank, tile.shrink_splits),
            # Of mixed adapters more ranks at once spill, and ptxas then serialises the main loop's products too.
            **({"BLOCK_R": 16} if adapter_ids else {}),
            "GATE_UP": gate_up,
            "ALPHA": swiglu_alpha,
            "LIMIT": swiglu_limit,
            "BLOCK_M": tile.block_m,
            "SMALLEST_M": tile.smallest_m,
            "STAGES": tile.stages,
            "AHEAD": tile.ahead,
        },
        num_warps=8,
        num_stages=1,
        # Mixed adapters hold a second accumulator while they are expanded.
        max_registers=max(128, tile.max_registers) if rank is not None and adapter_ids else tile.max_registers,
        flops=2 * pairs * n * (k + (rank or 0)),
        bytes_accessed=min(pairs, experts) * n * k * 17 // 32 + 2 * pairs * (k + width),
    )
