"""Packed weights on their way into L2 while routing, in which memory is idle, finds out who needs them."""

import dataclasses

import triton
import triton.language as tl

from jmoe.triton_src.plan import cdiv
from jmoe.triton_src.stacked import Stacked, in_stack


@triton.jit
def prefetch_lines(
    words_ptr,  # (matrices, BLOCKS, 16, 32) int32
    scales_ptr,  # (matrices, BLOCKS, 32) int32
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    program,
    MATRICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PREFETCHED_MATRICES: tl.constexpr,
    PREFETCHED_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
):
    """Asks for a program's LINES lines of 128 bytes.

    They are of the first PREFETCHED_BLOCKS blocks of 64 by 64 of the first PREFETCHED_MATRICES matrices of 64 columns.
    """
    line = program * LINES + tl.arange(0, LINES)
    matrix = line // (17 * PREFETCHED_BLOCKS)
    line = line % (17 * PREFETCHED_BLOCKS)  # sixteen a block of words, then one a block of scales
    wanted = matrix < PREFETCHED_MATRICES
    first = in_stack(matrix, layer_ptr, MATRICES).to(tl.int64) * BLOCKS
    words = words_ptr + (first * 16 + line) * 32
    scales = scales_ptr + (first + line - 16 * PREFETCHED_BLOCKS) * 32
    at = tl.where(wanted, tl.where(line < 16 * PREFETCHED_BLOCKS, words.to(tl.int64), scales.to(tl.int64)), 0)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s64 p, $1, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l",
        [at],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """The beginning of gate_up, packed: what the launch after routing reads first, of experts that have tokens."""

    experts: int
    n: int
    k: int
    most_experts: int
    most_blocks: int  # of 64 along K
    stacked: Stacked

    def programs(self, lines: int) -> int:
        """Of so many lines of 128 bytes each."""
        sizes = self.constexprs
        return cdiv(sizes["PREFETCHED_MATRICES"] * sizes["PREFETCHED_BLOCKS"] * 17, lines)

    @property
    def operands(self) -> dict[str, str | None]:
        return {"words_ptr": "gate_up", "scales_ptr": "gate_up_scales", **self.stacked.weights_operand}

    @property
    def constexprs(self) -> dict[str, int]:
        column_blocks, blocks = cdiv(self.n, 64), cdiv(self.k, 64)
        return {
            "MATRICES": self.experts * column_blocks,
            "BLOCKS": blocks,
            "PREFETCHED_MATRICES": min(self.experts, self.most_experts) * column_blocks,
            "PREFETCHED_BLOCKS": min(blocks, self.most_blocks),
        }
