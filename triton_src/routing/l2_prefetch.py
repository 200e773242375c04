"""Packed weights on their way into L2 while routing, in which memory is idle, finds out who needs them."""

import dataclasses
from typing import Any

import triton
import triton.language as tl

from jmoe.triton_src.plan import cdiv
from jmoe.triton_src.stacked import Stacked, in_stack


@triton.jit
def fetch_lines(
    words_ptr,  # (matrices, BLOCKS, 16, 32) int32
    scales_ptr,  # (matrices, BLOCKS, 32) int32
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    program,
    MATRICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FETCHED_MATRICES: tl.constexpr,
    FETCHED_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
):
    """Asks for a program's LINES lines of 128 bytes.

    They are of the first FETCHED_BLOCKS blocks of 64 by 64 of the first FETCHED_MATRICES matrices of 64 columns.
    """
    line = program * LINES + tl.arange(0, LINES)
    matrix = line // (17 * FETCHED_BLOCKS)
    line = line % (17 * FETCHED_BLOCKS)  # sixteen a block of words, then one a block of scales
    wanted = matrix < FETCHED_MATRICES
    first = in_stack(matrix, layer_ptr, MATRICES).to(tl.int64) * BLOCKS
    words = words_ptr + (first * 16 + line) * 32
    scales = scales_ptr + (first + line - 16 * FETCHED_BLOCKS) * 32
    at = tl.where(wanted, tl.where(line < 16 * FETCHED_BLOCKS, words.to(tl.int64), scales.to(tl.int64)), 0)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s64 p, $1, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l",
        [at],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@dataclasses.dataclass(frozen=True)
class Fetch:
    """The beginning of gate_up, packed: what the launch after routing reads first, of experts that have tokens."""

    experts: int
    column_blocks: int  # of 64, of an expert
    blocks: int  # of 64 along K
    fetched_experts: int
    fetched_blocks: int
    stacked: Stacked

    def programs(self, lines: int) -> int:
        """Of so many lines of 128 bytes each."""
        return cdiv(self.fetched_experts * self.column_blocks * self.fetched_blocks * 17, lines)

    @property
    def operands(self) -> dict[str, str | None]:
        return {"words_ptr": "gate_up", "scales_ptr": "gate_up_scales", **self.stacked.weights_operand}

    @property
    def constexprs(self) -> dict[str, Any]:
        return {
            "MATRICES": self.experts * self.column_blocks,
            "BLOCKS": self.blocks,
            "FETCHED_MATRICES": self.fetched_experts * self.column_blocks,
            "FETCHED_BLOCKS": self.fetched_blocks,
        }
