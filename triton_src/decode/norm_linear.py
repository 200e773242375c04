"""A norm and a narrow product of what it makes, for few rows, in one launch: both are bound by starting it.

The weights are read in place from stacks of layers. Each program makes the norm of its rows anew.
"""

import dataclasses

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.tiles import NormLinearTile


@triton.jit(do_not_specialize=["rows"])
def norm_linear_kernel(
    x_ptr,  # (T, K) bf16
    addend_ptr,  # (T, K) bf16, or None
    norm_ptr,  # (L, K) bf16, or None: no norm
    weight_ptr,  # (L, P, K) bf16, N rows of each adapter, or None: no product
    scale_ptr,  # (L, P) float32, or None
    bias_ptr,  # (L, P) bf16, or None
    adapter_ids_ptr,  # (T,) int32: whose rows of weight, scale and bias a row takes, -1 for none; None: the first N
    layer_ptr,  # (1,) int32
    sum_ptr,  # (T, K) bf16: x + addend, or None without
    normal_ptr,  # (T, K) bf16, or None
    product_ptr,  # (T, N) bf16, or None
    rows,
    EPS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum = x + addend; normal = norm[layer] * sum / sqrt(mean(sum²) + EPS); product = scale * normal W^T + bias.

    Each is rounded once; the product of a row without adapter is zero. Grid: (cdiv(T, ROWS), cdiv(N, BLOCK_N)).
    """
    layer = tl.load(layer_ptr)
    k = tl.arange(0, BLOCK_K)
    k_ok = k < K
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < N
    # Loaded before the norm, so that they are there when it is.
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + layer * K + k, mask=k_ok, other=0.0)
    if adapter_ids_ptr is not None:
        held = tl.full((), -1, tl.int32)
        weight = tl.zeros((BLOCK_N, BLOCK_K), weight_ptr.dtype.element_ty)
    elif weight_ptr is not None:
        at = (layer * P + column).to(tl.int64)[:, None] * K
        weight = tl.load(weight_ptr + at + k[None, :], mask=column_ok[:, None] & k_ok[None, :], other=0.0)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        ok = k_ok & (row < rows)
        if adapter_ids_ptr is not None:
            adapter = tl.load(adapter_ids_ptr + row, mask=row < rows, other=-1)
            known = (adapter >= 0) & (adapter < P // N)
            first = layer * P + adapter * N
            if known & (adapter != held):
                own = weight_ptr + (first + column).to(tl.int64)[:, None] * K
                weight = tl.load(own + k[None, :], mask=column_ok[:, None] & k_ok[None, :], other=0.0)
                held = adapter
        x = tl.load(x_ptr + row * K + k, mask=ok, other=0.0)
        if addend_ptr is not None:
            addend = tl.load(addend_ptr + row * K + k, mask=ok, other=0.0)
            x = (x.to(tl.float32) + addend.to(tl.float32)).to(x.dtype)
            if tl.program_id(1) == 0:
                tl.store(sum_ptr + row * K + k, x, mask=ok)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / K + EPS)
            x = (gain.to(tl.float32) * wide).to(x.dtype)
            if tl.program_id(1) == 0:
                tl.store(normal_ptr + row * K + k, x, mask=ok)
        if weight_ptr is not None:
            product = tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
            if adapter_ids_ptr is None:
                first = layer * P
                there = column_ok
            else:
                there = column_ok & known
            if scale_ptr is not None:
                product *= tl.load(scale_ptr + first + column, mask=there, other=0.0)
            if bias_ptr is not None:
                product += tl.load(bias_ptr + first + column, mask=there, other=0.0).to(tl.float32)
            if adapter_ids_ptr is not None:
                # Set, not multiplied by zero: x may hold infinities, and the weight is another row's.
                product = tl.where(known, product, 0.0)
            tl.store(
                product_ptr + row * N + column,
                product.to(product_ptr.dtype.element_ty),
                mask=column_ok & (row < rows),
            )


@dataclasses.dataclass(frozen=True)
class NormLinearProblem:
    """Which steps there are, of a sum, a norm and a product, for rows of k values."""

    rows: int
    k: int
    n: int = 0  # columns of the product, 0 for none
    weight_rows: int = 0  # of the weight in each layer, n of each adapter
    eps: float = 0.0
    addend: bool = False
    norm: bool = False
    scale: bool = False
    bias: bool = False
    adapter_ids: bool = False  # each row has an adapter of its own, where the first is all rows' otherwise


def plan_norm_linear(problem: NormLinearProblem, tile: NormLinearTile) -> list[Plan]:
    """Some of sum, normal and product, from x, layer [1] and what is there of the other operands."""
    p = problem
    there = {"addend": p.addend, "norm": p.norm, "weight": p.n > 0, "scale": p.scale, "bias": p.bias}
    there |= {"adapter_ids": p.adapter_ids}
    results = {
        "sum_ptr": Buffer("sum", (p.rows, p.k), "bfloat16") if p.addend else None,
        "normal_ptr": Buffer("normal", (p.rows, p.k), "bfloat16") if p.norm else None,
        "product_ptr": Buffer("product", (p.rows, p.n), "bfloat16") if p.n else None,
    }
    return [
        Plan(
            kernel=norm_linear_kernel,
            grid=(cdiv(p.rows, tile.block_m), cdiv(max(p.n, 1), tile.block_n)),
            operands={
                "x_ptr": "x",
                "layer_ptr": "layer",
                **{f"{name}_ptr": name if given else None for name, given in there.items()},
                **{parameter: None for parameter, buffer in results.items() if buffer is None},
            },
            scalars={"rows": p.rows},
            outputs={parameter: buffer for parameter, buffer in results.items() if buffer is not None},
            constexprs={
                "EPS": p.eps,
                "N": p.n,
                "P": p.weight_rows,
                "K": p.k,
                "ROWS": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": next_power_of_2(p.k),
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            flops=2 * p.rows * p.k * (p.n + 2),
            bytes_accessed=2 * (p.n * p.k + p.rows * (4 * p.k + p.n)),
        )
    ]
