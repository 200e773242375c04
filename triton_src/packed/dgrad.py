"""The gradient of the experts' products in their rows, from packed MXFP4: the same bytes, read across.

The contraction runs over the weights' rows, so the transposed weights are operand A of wgmma. A word holds two rows by
four columns of the weights. Loaded in another order than in packed_grouped_matmul_kernel, it lies in the lane that
takes these weights transposed, so that weights go from memory to the tensor cores through registers alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from jmoe.triton_src.packed.lora import load_adapters, load_shrunk
from jmoe.triton_src.packed.operands import Lora, OptionalPointer, Rows, Tile
from jmoe.triton_src.packed.transposed import (
    STEP,
    decode_transposed,
    part_layout,
    spread_scales,
    transposed_column,
    transposed_word,
)
from jmoe.triton_src.packed.weight import NAN_OF_FIRST_GROUP, NAN_OF_SECOND_GROUP, any_large, nan_bits, unknown
from jmoe.triton_src.plan import Plan, cdiv
from jmoe.triton_src.portable.dgrad import dgrad_lora_operands, dgrad_output
from jmoe.triton_src.portable.shrink import lora_constexprs
from jmoe.triton_src.problem import MoeProblem, Projection, RowTile
from jmoe.triton_src.row_adapters import next_adapter
from jmoe.triton_src.stacked import in_stack
from jmoe.triton_src.tiles import DgradTile

BLOCK_K = 128
"""Columns of a program."""


@gluon.aggregate
class InputGradient:
    """The gradient of gate_up's rows or of down's."""

    grad_ptr: gl.tensor  # bf16, by position for gate_up and by token for down; (., N)
    words_ptr: gl.tensor  # (E, N / 64, K / 64, 512) int32
    scales_ptr: gl.tensor  # (E, N / 64, K / 64, 32) int32
    layer_ptr: OptionalPointer  # (1,) int32: which layer's weights, of several; None: there is one layer's
    out_ptr: gl.tensor  # (P, K) bf16, by pair for gate_up and by position for down
    lora: Lora  # A, and what B has shrunk
    N: gl.constexpr
    K: gl.constexpr
    GATE_UP: gl.constexpr
    BLOCK_K: gl.constexpr
    STAGES: gl.constexpr  # of rows in shared memory
    AHEAD: gl.constexpr  # blocks of weights in flight


@gluon.jit(do_not_specialize=["pairs"])
def packed_dgrad_kernel(
    grad_ptr,  # gate_up: (P, N) bf16 by position; down: (T, N) bf16
    words_ptr,  # (E, NP / 64, KP / 64, 512) int32
    scales_ptr,  # (E, NP / 64, KP / 64, 32) int32
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position: scale * grad B, or None without LoRA
    lora_a_ptr,  # (A, E, R, K) bf16 or float32, or None without LoRA
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (max_tiles, 3) int32: expert or -1, first position, end position
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
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
    SMALLEST_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """out = grad W[e] + LoRA by tiles of positions that share expert e, of BLOCK_K columns; a warp for each 32 columns.

    A tile's last rows go through a product of fewer rows where that is enough, down to SMALLEST_M.
    AHEAD: blocks of 64 rows of the weights that are loaded ahead.
    Grid: (cdiv(K, BLOCK_K), max_tiles).
    """
    pairs = gl.to_tensor(pairs)  # a single one is a constexpr, by jax-triton
    rows = Rows(order_ptr, tiles_ptr, None, adapter_ids_ptr, pairs, EXPERTS, TOP_K, ADAPTERS, BLOCK_M)
    lora = Lora(lora_a_ptr, None, None, lora_layer_ptr, shrunk_ptr, RANK, RANK_PADDED, BLOCK_R, SPLITS)
    p = InputGradient(
        grad_ptr, words_ptr, scales_ptr, layer_ptr, out_ptr, lora,
        N=N, K=K, GATE_UP=GATE_UP, BLOCK_K=BLOCK_K, STAGES=STAGES, AHEAD=AHEAD,
    )  # fmt: skip
    index = gl.program_id(1)
    expert = gl.load(tiles_ptr + index * 3)
    if expert >= 0:
        first = gl.load(tiles_ptr + index * 3 + 1)
        end = gl.load(tiles_ptr + index * 3 + 2)
        tile = Tile(expert, first, end, None, 0)
        if (end - first <= BLOCK_M // 4) & (BLOCK_M // 4 >= SMALLEST_M):
            dgrad_tile(p, rows, tile, max(BLOCK_M // 4, SMALLEST_M))
        elif (end - first <= BLOCK_M // 2) & (BLOCK_M // 2 >= SMALLEST_M):
            dgrad_tile(p, rows, tile, max(BLOCK_M // 2, SMALLEST_M))
        else:
            dgrad_tile(p, rows, tile, BLOCK_M)


@gluon.jit
def copy_rows(stages, stage, grad, n_in_stage, n, N: gl.constexpr):
    """Starts the copy of 128 columns, from n on, of the tile's rows into a stage; zeros past N. Returns the next's."""
    async_copy.async_load(stages.index(stage), grad, mask=n + n_in_stage < N)
    async_copy.commit_group()
    return grad + 128


@gluon.jit
def load_words(words, block, STRIDE: gl.constexpr, BLOCKS: gl.constexpr):
    """A thread's eight words of a block of 64 rows; the last block's past the last."""
    at = words + gl.minimum(block, BLOCKS - 1) * STRIDE
    loaded = ()
    for i in gl.static_range(8):
        loaded = loaded + (gl.load(at + 64 * i),)
    return loaded


@gluon.jit
def dgrad_tile(p, rows, tile, BLOCK_M: gl.constexpr):
    """BLOCK_K columns of a tile of at most BLOCK_M positions."""
    STAGES: gl.constexpr = p.STAGES
    BLOCK_K: gl.constexpr = p.BLOCK_K
    WARPS: gl.constexpr = BLOCK_K // 32
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    W: gl.constexpr = part_layout(WARPS)
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BLOCKS: gl.constexpr = (p.N + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (p.K + 63) // 64
    PARTS: gl.constexpr = 64 // STEP

    grad, n_in_stage = rows_of_tile(p, rows, tile.first, tile.end, BLOCK_M, X)
    stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, 128], SHARED)
    for i in gl.static_range(STAGES - 1):
        grad = copy_rows(stages, i, grad, n_in_stage, 128 * i, p.N)

    words, scales, group = weights_of(p, rows, tile, gl.program_id(0), W)
    # The last stage holds no rows until the loop below fills it.
    acc = lora_alone(stages.index(STAGES - 1), p, rows, tile, gl.program_id(0), BLOCK_M, C)
    w = ()
    s = ()
    for i in gl.static_range(p.AHEAD):
        w = w + (load_words(words, i, COLUMN_BLOCKS * 512, BLOCKS),)
        s = s + (gl.load(scales + min(i, BLOCKS - 1) * (COLUMN_BLOCKS * 32)),)
    seen = s[0]
    factors = spread_scales(s[0], group, False)
    operand = decode_transposed(w[0], factors, 0, A, False)
    read = 0
    write = STAGES - 1
    for block in range(0, BLOCKS // 2 * 2, 2):
        async_copy.wait_group(STAGES - 2)
        for half in gl.static_range(2):
            for part in gl.static_range(PARTS):
                grads = stages.index(read).slice(64 * half + STEP * part, STEP, dim=1)
                acc = warpgroup_mma(operand, grads.permute((1, 0)), acc, is_async=True)
                if part == PARTS - 1:
                    ahead = block + half + p.AHEAD
                    w = w[1:] + (load_words(words, ahead, COLUMN_BLOCKS * 512, BLOCKS),)
                    s = s[1:] + (gl.load(scales + gl.minimum(ahead, BLOCKS - 1) * (COLUMN_BLOCKS * 32)),)
                    seen = seen | s[0]
                    factors = spread_scales(s[0], group, False)
                if half == 1 and part == PARTS - 1:
                    grad = copy_rows(stages, write, grad, n_in_stage, (block + 2 * (STAGES - 1)) * 64, p.N)
                # The next operand is among what the wait is for, so that it is decoded while the product runs.
                operand = decode_transposed(w[0], factors, (part + 1) % PARTS, A, False)
                acc, operand = warpgroup_mma_wait(num_outstanding=0, deps=[acc, operand])
        read = gl.where(read == STAGES - 1, 0, read + 1)
        write = gl.where(write == STAGES - 1, 0, write + 1)
    if BLOCKS % 2:
        async_copy.wait_group(STAGES - 2)
        for part in gl.static_range(PARTS):
            grads = stages.index(read).slice(STEP * part, STEP, dim=1)
            acc = warpgroup_mma(operand, grads.permute((1, 0)), acc, is_async=True)
            operand = decode_transposed(w[0], factors, (part + 1) % PARTS, A, False)
            acc, operand = warpgroup_mma_wait(num_outstanding=0, deps=[acc, operand])
    async_copy.wait_group(0)
    if any_large(seen):
        acc = multiply_by_any_scale(stages, p, rows, tile, BLOCK_M, C)
    store_tile(acc, p, rows, tile, BLOCK_M)


@gluon.jit
def multiply_by_any_scale(stages, p, rows, tile, BLOCK_M: gl.constexpr, C: gl.constexpr):
    """The accumulators of dgrad_tile, whatever the scales are: NaN where a scale is. Few weights have large ones."""
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    WARPS: gl.constexpr = p.BLOCK_K // 32
    W: gl.constexpr = part_layout(WARPS)
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    BLOCKS: gl.constexpr = (p.N + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (p.K + 63) // 64
    # What follows is computed anew: kept for here, it would take registers from the loops before.
    tile = Tile(unknown(tile.expert), unknown(tile.first), unknown(tile.end), tile.counter, tile.signals)
    program = unknown(gl.program_id(0))
    gl.barrier()
    acc = lora_alone(stages.index(0), p, rows, tile, program, BLOCK_M, C)
    grad, n_in_stage = rows_of_tile(p, rows, tile.first, tile.end, BLOCK_M, X)
    words, scales, group = weights_of(p, rows, tile, program, W)
    nan = gl.zeros([WARPS, 8, 4], gl.int32, W)
    for block in range(BLOCKS):
        gl.barrier()
        copy_rows(stages, 0, grad + block * 64, n_in_stage, block * 64, p.N)
        w = load_words(words, block, COLUMN_BLOCKS * 512, BLOCKS)
        s = gl.load(scales + block * (COLUMN_BLOCKS * 32))
        nan = nan | nan_bits(s)
        factors = spread_scales(s, group, True)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.barrier()
        for part in gl.static_range(64 // STEP):
            grads = stages.index(0).slice(STEP * part, STEP, dim=1)
            acc = warpgroup_mma(decode_transposed(w, factors, part, A, True), grads.permute((1, 0)), acc)
    # A warp's columns are of one group: of the first and third bytes' groups in turn.
    bad = gl.where(group == 0, nan & NAN_OF_FIRST_GROUP, nan & NAN_OF_SECOND_GROUP) != 0
    bad = gl.max(gl.max(bad.to(gl.int32), axis=2), axis=1)
    parts = acc.reshape([2, WARPS, 16, BLOCK_M])
    WARP: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, parts.type.layout)))
    bad = gl.convert_layout(bad, WARP)[None, :, None, None]
    parts = gl.where(bad != 0, float("nan"), parts)
    return gl.convert_layout(parts.reshape([p.BLOCK_K, BLOCK_M]), C)


@gluon.jit
def rows_of_tile(p, rows, first, end, BLOCK_M: gl.constexpr, X: gl.constexpr):
    """(pointers to the tile's rows of the gradient, columns of a stage), by a stage's layout."""
    # Rows past the end are computed from the last one and not stored.
    position = gl.minimum(first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X)), end - 1)
    row = position
    if not p.GATE_UP:
        row = gl.load(rows.order_ptr + position) // rows.TOP_K
    n_in_stage = gl.arange(0, 128, gl.SliceLayout(0, X))[None, :]
    return p.grad_ptr + row.to(gl.int64)[:, None] * p.N + n_in_stage, n_in_stage


@gluon.jit
def weights_of(p, rows, tile, program, W: gl.constexpr):
    """(pointers to a thread's first words, to its scales, its warp's group of 32 columns) of a program's columns."""
    WARPS: gl.constexpr = p.BLOCK_K // 32
    BLOCKS: gl.constexpr = (p.N + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (p.K + 63) // 64
    # Two warps share a block of 64 columns; the last block's are taken again past K, and not stored.
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, W)))[:, None, None]
    column = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, W)))[None, :, None]
    row_pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, W)))[None, None, :]
    block = gl.minimum(program * (p.BLOCK_K // 64) + warp // 2, COLUMN_BLOCKS - 1)
    matrix = in_stack(tile.expert, p.layer_ptr, rows.EXPERTS)
    block += matrix.to(gl.int64) * (BLOCKS * COLUMN_BLOCKS)
    words = transposed_word(p.words_ptr + block * 512, warp, column, row_pair)
    return words, p.scales_ptr + block * 32 + column * 4 + row_pair, warp % 2


@gluon.jit
def lora_alone(stage, p, rows, tile, program, BLOCK_M: gl.constexpr, C: gl.constexpr):
    """The accumulators (BLOCK_K, BLOCK_M) before any weight: LoRA's part of them, or zeros. A stage is room for it."""
    acc = gl.zeros([p.BLOCK_K, BLOCK_M], gl.float32, C)
    if p.lora.a_ptr is not None:
        expert = in_stack(tile.expert, p.lora.layer_ptr, rows.ADAPTERS * rows.EXPERTS)
        shrunk = stage.slice(0, p.lora.BLOCK_R, dim=1)
        if rows.adapter_ids_ptr is None:
            acc = expand(acc, shrunk, p, rows, expert, tile.first, tile.end, program, BLOCK_M)
        else:
            # Half of the tile at a time: a whole second accumulator does not fit beside the first.
            HALF: gl.constexpr = BLOCK_M // 2
            part_of_shrunk = shrunk.slice(0, HALF, dim=0)
            low = expand_mixed(part_of_shrunk, p, rows, expert, tile.first, tile.end, program, HALF)
            high = expand_mixed(part_of_shrunk, p, rows, expert, tile.first + HALF, tile.end, program, HALF)
            both = gl.permute(gl.join(low, high), (0, 2, 1)).reshape([p.BLOCK_K, BLOCK_M])
            acc = gl.convert_layout(both, C)
    return acc


@gluon.jit
def expand(acc, shared, p, rows, matrix, first, end, program, BLOCK_M: gl.constexpr):
    """acc + A^T (scale * grad B)^T for the matrix of an adapter and expert."""
    lora = p.lora
    WARPS: gl.constexpr = p.BLOCK_K // 32
    A: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    fragment_row = gl.arange(0, p.BLOCK_K, gl.SliceLayout(1, A))
    column = program * p.BLOCK_K + transposed_column(fragment_row, WARPS)
    first_rank = matrix.to(gl.int64) * lora.RANK
    for rank in range(0, lora.RANK_PADDED, lora.BLOCK_R):
        shared.store(load_shrunk(lora, first, end, rank, rows.pairs, BLOCK_M, WARPS))
        ranks = rank + gl.arange(0, lora.BLOCK_R, gl.SliceLayout(0, A))
        ok = (column < p.K)[:, None] & (ranks < lora.RANK)[None, :]
        a = gl.load(lora.a_ptr + (first_rank + ranks)[None, :] * p.K + column[:, None], mask=ok, other=0.0)
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(a.to(gl.bfloat16), shared.permute((1, 0)), acc)
    return acc


@gluon.jit
def expand_mixed(shared, p, rows, expert, first, end, program, BLOCK_M: gl.constexpr):
    """(BLOCK_K, BLOCK_M) expand of each position's own adapter; others' are selected away, not multiplied by zero."""
    C: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[p.BLOCK_K // 32, 1], instr_shape=[16, BLOCK_M, 16]
    )
    acc = gl.zeros([p.BLOCK_K, BLOCK_M], gl.float32, C)
    used = load_adapters(rows, first, end, BLOCK_M, gl.SliceLayout(0, C))
    adapter = next_adapter(used, -1, rows.ADAPTERS)
    while adapter < rows.ADAPTERS:
        zero = gl.zeros([p.BLOCK_K, BLOCK_M], gl.float32, C)
        expanded = expand(zero, shared, p, rows, adapter * rows.EXPERTS + expert, first, end, program, BLOCK_M)
        acc = gl.where((used == adapter)[None, :], expanded, acc)
        adapter = next_adapter(used, adapter, rows.ADAPTERS)
    return acc


@gluon.jit
def store_tile(acc, p, rows, tile, BLOCK_M: gl.constexpr):
    """Columns in their order, and the store."""
    BLOCK_K: gl.constexpr = p.BLOCK_K
    WARPS: gl.constexpr = BLOCK_K // 32
    # c, block, group, p, step, quad -> block, group, step, c, quad, p
    parts = acc.to(gl.bfloat16).reshape([2, WARPS // 2, 2, 2, 2, 4, BLOCK_M])
    parts = gl.permute(parts, (1, 2, 4, 0, 5, 3, 6)).reshape([BLOCK_K, BLOCK_M])
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    out = gl.convert_layout(parts, OUT)
    position = tile.first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    row = position
    if p.GATE_UP:
        row = gl.load(rows.order_ptr + position, mask=position < tile.end, other=0)
    column = gl.program_id(0) * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(1, OUT))
    ok = (column < p.K)[:, None] & (position < tile.end)[None, :]
    gl.store(p.out_ptr + row.to(gl.int64)[None, :] * p.K + column[:, None], out, mask=ok)


def plan_packed_dgrad(product: Projection, problem: MoeProblem, tile: DgradTile, routed: RowTile) -> Plan:
    """gate_up: pair_dx [P, H] from pre_activations_grad [P, 2I]. down: down_dgrad [P, I] from dy [T, H].

    routed: the tile of the routing and of LoRA's shrink.
    """
    p, n, k = problem, product.n, product.k
    constants = lora_constexprs(product, p, routed)
    return Plan(
        kernel=packed_dgrad_kernel,
        grid=(cdiv(k, BLOCK_K), p.max_tiles(routed)),
        operands={
            "grad_ptr": "pre_activations_grad" if product.is_gate_up else "dy",
            "words_ptr": product.name,
            "scales_ptr": f"{product.name}_scales",
            **dgrad_lora_operands(product, p),
            "order_ptr": "order",
            "tiles_ptr": "tiles",
            **p.stacked.weights_operand,
            **p.stacked.lora_operand,
        },
        scalars={"pairs": p.pairs},
        outputs=dgrad_output(product, p),
        constexprs={
            "N": n,
            "K": k,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            **constants,
            # More ranks at once spill.
            "BLOCK_R": min(constants["BLOCK_R"], tile.mixed_block_r if p.adapter_ids else tile.block_r),
            "GATE_UP": product.is_gate_up,
            "BLOCK_M": routed.block_m,
            "SMALLEST_M": tile.smallest_m,
            "BLOCK_K": BLOCK_K,
            "STAGES": tile.stages,
            "AHEAD": tile.ahead,
        },
        num_warps=BLOCK_K // 32,
        num_stages=1,
        max_registers=tile.max_registers,
        flops=2 * p.pairs * k * (n + (product.rank or 0)),
        bytes_accessed=p.active_experts * product.layout.bytes(n, k) + 2 * p.pairs * (n + k),
    )
