"""The sum over a token's experts, which the last program to have written some of its columns makes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def sum_where_last(
    p,
    rows,
    tile,
    arrived_ptr,  # (T, H padded to 64, by 16) int32: experts whose 16 columns of the token are written
    y_ptr,  # (T, H) bf16
    program,
    BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr,
):
    """y as of combine_kernel, columns `program` * 16 * ROWS and on of this tile's tokens, where all is there.

    Called by each program of the product p, down, when it has written. All of a token's experts are held here.
    """
    H: gl.constexpr = p.N
    TOP_K: gl.constexpr = rows.TOP_K
    GROUPS: gl.constexpr = (H + 63) // 64 * 4
    S: gl.constexpr = gl.BlockedLayout([1, 1, 8], [16 // ROWS, ROWS, 2], [4, 1, 1], [2, 1, 0])
    COUNTERS: gl.constexpr = gl.SliceLayout(2, S)
    position = tile.first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, COUNTERS))
    row_ok = position < tile.end
    token = gl.load(rows.order_ptr + position, mask=row_ok, other=0) // TOP_K
    group = program * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, COUNTERS))
    ok = row_ok[:, None] & (group * 16 < H)[None, :]
    adapter = gl.zeros([BLOCK_M], gl.int32, gl.SliceLayout(1, COUNTERS))
    if rows.adapter_ids_ptr is not None:
        adapter = gl.load(rows.adapter_ids_ptr + token)
    # What the program has written, then that it has.
    gl.barrier()
    counters = arrived_ptr + token[:, None] * GROUPS + group[None, :]
    before = gl.atomic_add(counters, 1, mask=ok, sem="acq_rel", scope="gpu")
    last = (ok & (before == TOP_K - 1))[:, :, None]
    column = group[None, :, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, S)))[None, None, :]
    at = token.to(gl.int64)[:, None, None] * (TOP_K * H) + column
    mask = last & (column < H)
    acc = gl.zeros([BLOCK_M, ROWS, 16], gl.float32, S)
    for j in gl.static_range(TOP_K):
        acc += gl.load(p.out_ptr + at + j * H, mask=mask, other=0.0).to(gl.float32)
    if rows.adapter_ids_ptr is not None:
        # A token whose adapter does not exist: its result would otherwise be that of no adapter.
        known = (adapter >= -1) & (adapter < rows.ADAPTERS)
        acc = gl.where(known[:, None, None], acc, float("nan"))
    gl.store(y_ptr + token.to(gl.int64)[:, None, None] * H + column, acc.to(gl.bfloat16), mask=mask)
