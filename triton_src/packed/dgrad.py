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
from jmoe.triton_src.packed.transposed import STEP, decode_transposed, part_layout, spread_scales, transposed_column
from jmoe.triton_src.packed.weight import nan_bits
from jmoe.triton_src.plan import Plan, cdiv
from jmoe.triton_src.portable.dgrad import dgrad_lora_operands, dgrad_output
from jmoe.triton_src.portable.shrink import lora_constexprs
from jmoe.triton_src.problem import MoeProblem, Projection, RowTile
from jmoe.triton_src.stacked import in_stack
from jmoe.triton_src.tiles import DgradTile

BLOCK_K = 128
"""Columns of a program."""


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
    Grid: (cdiv(K, BLOCK_K), slots).
    """
    pairs = gl.to_tensor(pairs)  # a single one is a constexpr, by jax-triton
    tile = gl.program_id(1)
    expert = gl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first = gl.load(tiles_ptr + tile * 3 + 1)
        end = gl.load(tiles_ptr + tile * 3 + 2)
        lora_expert = in_stack(expert, lora_layer_ptr, ADAPTERS * EXPERTS)
        expert = in_stack(expert, layer_ptr, EXPERTS)
        if (end - first <= BLOCK_M // 4) & (BLOCK_M // 4 >= SMALLEST_M):
            dgrad_tile(
                grad_ptr, words_ptr, scales_ptr, shrunk_ptr, lora_a_ptr, adapter_ids_ptr, order_ptr, out_ptr,
                pairs, expert, lora_expert, first, end, N, K, EXPERTS, TOP_K, ADAPTERS, RANK, RANK_PADDED, BLOCK_R,
                SPLITS, GATE_UP, max(BLOCK_M // 4, SMALLEST_M), BLOCK_K, STAGES, AHEAD,
            )  # fmt: skip
        elif (end - first <= BLOCK_M // 2) & (BLOCK_M // 2 >= SMALLEST_M):
            dgrad_tile(
                grad_ptr, words_ptr, scales_ptr, shrunk_ptr, lora_a_ptr, adapter_ids_ptr, order_ptr, out_ptr,
                pairs, expert, lora_expert, first, end, N, K, EXPERTS, TOP_K, ADAPTERS, RANK, RANK_PADDED, BLOCK_R,
                SPLITS, GATE_UP, max(BLOCK_M // 2, SMALLEST_M), BLOCK_K, STAGES, AHEAD,
            )  # fmt: skip
        else:
            dgrad_tile(
                grad_ptr, words_ptr, scales_ptr, shrunk_ptr, lora_a_ptr, adapter_ids_ptr, order_ptr, out_ptr,
                pairs, expert, lora_expert, first, end, N, K, EXPERTS, TOP_K, ADAPTERS, RANK, RANK_PADDED, BLOCK_R,
                SPLITS, GATE_UP, BLOCK_M, BLOCK_K, STAGES, AHEAD,
            )  # fmt: skip


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
def dgrad_tile(
    grad_ptr, words_ptr, scales_ptr, shrunk_ptr, lora_a_ptr, adapter_ids_ptr, order_ptr, out_ptr,
    pairs, expert, lora_expert, first, end,
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
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """One tile of positions of an expert by BLOCK_K columns."""
    WARPS: gl.constexpr = BLOCK_K // 32
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    W: gl.constexpr = part_layout(WARPS)
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BLOCKS: gl.constexpr = (N + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (K + 63) // 64
    PARTS: gl.constexpr = 64 // STEP

    # Rows past the end are computed from the last one and not stored.
    position = gl.minimum(first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X)), end - 1)
    row = position
    if not GATE_UP:
        row = gl.load(order_ptr + position) // TOP_K
    n_in_stage = gl.arange(0, 128, gl.SliceLayout(0, X))[None, :]
    grad = grad_ptr + row.to(gl.int64)[:, None] * N + n_in_stage
    stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, 128], SHARED)
    for i in gl.static_range(STAGES - 1):
        grad = copy_rows(stages, i, grad, n_in_stage, 128 * i, N)

    # Two warps share a block of 64 columns; the last block's are taken again past K, and not stored.
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, W)))[:, None, None]
    column = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, W)))[None, :, None]
    row_pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, W)))[None, None, :]
    block = gl.minimum(gl.program_id(0) * (BLOCK_K // 64) + warp // 2, COLUMN_BLOCKS - 1)
    block += expert.to(gl.int64) * (BLOCKS * COLUMN_BLOCKS)
    words = words_ptr + block * 512 + row_pair * 16 + column % 4 * 4 + warp % 2 * 2 + column // 4
    scales = scales_ptr + block * 32 + column * 4 + row_pair
    acc = gl.zeros([BLOCK_K, BLOCK_M], gl.float32, C)
    if lora_a_ptr is not None:
        # The last stage holds no rows until the loop below fills it.
        shrunk = stages.index(STAGES - 1).slice(0, BLOCK_R, dim=1)
        if adapter_ids_ptr is None:
            acc = expand(
                acc, shrunk, shrunk_ptr, lora_a_ptr, pairs, lora_expert.to(gl.int64) * RANK, first, end,
                K, RANK, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M, BLOCK_K, A,
            )  # fmt: skip
        else:
            # Half of the tile at a time: a whole second accumulator does not fit beside the first.
            HALF: gl.constexpr = BLOCK_M // 2
            low = expand_mixed(
                shrunk.slice(0, HALF, dim=0), shrunk_ptr, lora_a_ptr, adapter_ids_ptr, order_ptr, pairs, lora_expert,
                first, end, K, EXPERTS, TOP_K, ADAPTERS, RANK, RANK_PADDED, BLOCK_R, SPLITS, HALF, BLOCK_K,
            )  # fmt: skip
            high = expand_mixed(
                shrunk.slice(0, HALF, dim=0), shrunk_ptr, lora_a_ptr, adapter_ids_ptr, order_ptr, pairs, lora_expert,
                first + HALF, end, K, EXPERTS, TOP_K, ADAPTERS, RANK, RANK_PADDED, BLOCK_R, SPLITS, HALF, BLOCK_K,
            )  # fmt: skip
            both = gl.permute(gl.join(low, high), (0, 2, 1)).reshape([BLOCK_K, BLOCK_M])
            acc = gl.convert_layout(both, C)
    w = ()
    s = ()
    for i in gl.static_range(AHEAD):
        w = w + (load_words(words, i, COLUMN_BLOCKS * 512, BLOCKS),)
        s = s + (gl.load(scales + min(i, BLOCKS - 1) * (COLUMN_BLOCKS * 32)),)
    nan = nan_bits(s[0])
    factors = spread_scales(s[0], warp % 2)
    operand = decode_transposed(w[0], factors, 0, A)
    read = 0
    write = STAGES - 1
    for block in range(0, BLOCKS // 2 * 2, 2):
        async_copy.wait_group(STAGES - 2)
        for half in gl.static_range(2):
            for part in gl.static_range(PARTS):
                rows = stages.index(read).slice(64 * half + STEP * part, STEP, dim=1)
                acc = warpgroup_mma(operand, rows.permute((1, 0)), acc, is_async=True)
                if part == PARTS - 1:
                    ahead = block + half + AHEAD
                    w = w[1:] + (load_words(words, ahead, COLUMN_BLOCKS * 512, BLOCKS),)
                    s = s[1:] + (gl.load(scales + gl.minimum(ahead, BLOCKS - 1) * (COLUMN_BLOCKS * 32)),)
                    nan = nan | nan_bits(s[0])
                    factors = spread_scales(s[0], warp % 2)
                if half == 1 and part == PARTS - 1:
                    grad = copy_rows(stages, write, grad, n_in_stage, (block + 2 * (STAGES - 1)) * 64, N)
                # The next operand is among what the wait is for, so that it is decoded while the product runs.
                operand = decode_transposed(w[0], factors, (part + 1) % PARTS, A)
                acc, operand = warpgroup_mma_wait(num_outstanding=0, deps=[acc, operand])
        read = gl.where(read == STAGES - 1, 0, read + 1)
        write = gl.where(write == STAGES - 1, 0, write + 1)
    if BLOCKS % 2:
        async_copy.wait_group(STAGES - 2)
        for part in gl.static_range(PARTS):
            rows = stages.index(read).slice(STEP * part, STEP, dim=1)
            acc = warpgroup_mma(operand, rows.permute((1, 0)), acc, is_async=True)
            operand = decode_transposed(w[0], factors, (part + 1) % PARTS, A)
            acc, operand = warpgroup_mma_wait(num_outstanding=0, deps=[acc, operand])
    async_copy.wait_group(0)
    store_tile(acc, nan, order_ptr, out_ptr, first, end, K, GATE_UP, BLOCK_M, BLOCK_K)


@gluon.jit
def expand(
    acc, shared, shrunk_ptr, lora_a_ptr, pairs, rows, first, end,
    K: gl.constexpr,
    RANK: gl.constexpr,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    A: gl.constexpr,
):  # fmt: skip
    """acc + A^T (scale * grad B)^T for the adapter whose rows of A begin at `rows`."""
    WARPS: gl.constexpr = BLOCK_K // 32
    column = gl.program_id(0) * BLOCK_K + transposed_column(gl.arange(0, BLOCK_K, gl.SliceLayout(1, A)), WARPS)
    for rank in range(0, RANK_PADDED, BLOCK_R):
        shared.store(load_shrunk(shrunk_ptr, first, end, rank, pairs, RANK_PADDED, SPLITS, BLOCK_M, BLOCK_R, WARPS))
        ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(0, A))
        ok = (column < K)[:, None] & (ranks < RANK)[None, :]
        a = gl.load(lora_a_ptr + (rows + ranks)[None, :] * K + column[:, None], mask=ok, other=0.0)
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(a.to(gl.bfloat16), shared.permute((1, 0)), acc)
    return acc


@gluon.jit
def expand_mixed(
    shared, shrunk_ptr, lora_a_ptr, adapter_ids_ptr, order_ptr, pairs, expert, first, end,
    K: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    ADAPTERS: gl.constexpr,
    RANK: gl.constexpr,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
):  # fmt: skip
    """(BLOCK_K, BLOCK_M) expand of each position's own adapter; others' are selected away, not multiplied by zero."""
    C: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[BLOCK_K // 32, 1], instr_shape=[16, BLOCK_M, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    acc = gl.zeros([BLOCK_K, BLOCK_M], gl.float32, C)
    used = load_adapters(adapter_ids_ptr, order_ptr, first, end, TOP_K, BLOCK_M, gl.SliceLayout(0, C))
    for adapter in range(ADAPTERS):
        mine = used == adapter
        if gl.max(mine.to(gl.int32), axis=0) > 0:
            rows = (adapter * EXPERTS + expert).to(gl.int64) * RANK
            zero = gl.zeros([BLOCK_K, BLOCK_M], gl.float32, C)
            expanded = expand(
                zero, shared, shrunk_ptr, lora_a_ptr, pairs, rows, first, end,
                K, RANK, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M, BLOCK_K, A,
            )  # fmt: skip
            acc = gl.where(mine[None, :], expanded, acc)
    return acc


@gluon.jit
def store_tile(
    acc, nan, order_ptr, out_ptr, first, end,
    K: gl.constexpr,
    GATE_UP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
):  # fmt: skip
    """NaN where a scale says so, columns in their order, and the store."""
    WARPS: gl.constexpr = BLOCK_K // 32
    # A warp's columns are of one group: of the first and third bytes' groups in turn.
    group = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, nan.type.layout)))[:, None, None] % 2
    bad = gl.where(group == 0, nan & 0x00008080, nan & -2139095040) != 0
    bad = gl.max(gl.max(bad.to(gl.int32), axis=2), axis=1)
    parts = acc.reshape([2, WARPS, 16, BLOCK_M])
    WARP: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, parts.type.layout)))
    bad = gl.convert_layout(bad, WARP)[None, :, None, None]
    parts = gl.where(bad != 0, float("nan"), parts).to(gl.bfloat16)
    # c, block, group, p, step, quad -> block, group, step, c, quad, p
    parts = parts.reshape([2, WARPS // 2, 2, 2, 2, 4, BLOCK_M])
    parts = gl.permute(parts, (1, 2, 4, 0, 5, 3, 6)).reshape([BLOCK_K, BLOCK_M])
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    out = gl.convert_layout(parts, OUT)
    position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    row = position
    if GATE_UP:
        row = gl.load(order_ptr + position, mask=position < end, other=0)
    column = gl.program_id(0) * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(1, OUT))
    ok = (column < K)[:, None] & (position < end)[None, :]
    gl.store(out_ptr + row.to(gl.int64)[None, :] * K + column[:, None], out, mask=ok)


def plan_packed_dgrad(product: Projection, problem: MoeProblem, tile: DgradTile, routed: RowTile) -> Plan:
    """gate_up: pair_dx [P, H] from pre_activations_grad [P, 2I]. down: down_dgrad [P, I] from dy [T, H].

    routed: the tile of the routing and of LoRA's shrink.
    """
    p, n, k = problem, product.n, product.k
    constants = lora_constexprs(product, p, routed)
    return Plan(
        kernel=packed_dgrad_kernel,
        grid=(cdiv(k, BLOCK_K), p.slots(routed)),
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
