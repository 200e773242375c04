"""Which weights and which tokens' values a lane takes: those of its fragments, by the packed layout's docstring.

Fragments are those of mma m16n8k16 in the PTX ISA, and of wgmma with A in registers, which are the same a warp: lane
4g + q has of A the rows g + 8h and of B the column g, of both the places 8c + 2q + p along K, for h, c, p in (0, 1).
"""

from typing import Any

import numpy as np
import pytest

from jmoe.triton_src.packed.decode_product import first_fragment, to_k_part
from jmoe.triton_src.packed.grouped_product import in_column_blocks
from jmoe.triton_src.packed.lora import packed_column
from jmoe.triton_src.packed.tokens import tokens_layout
from jmoe.triton_src.packed.weight import scale_offset, scales_layout, word_offset, words_layout
from jmoe.triton_src.routing.mma_k_order import from_mma_k_order, mma_k_slot, to_mma_k_order
from tests.triton_src.packed.gluon_on_numpy import python_body

H, C, P = np.ix_(range(2), range(2), range(2))


def held(layout: Any) -> tuple[np.ndarray, ...]:
    """A layout's indices by warp, lane and register, an array for each axis."""
    registers, lanes, warps = (
        [list(basis) for basis in bases] for bases in (layout.reg_bases, layout.lane_bases, layout.warp_bases)
    )
    shape = [1 << len(bases) for bases in (warps, lanes, registers)]
    at = np.zeros((len(layout.shape), *shape), np.int64)
    for axis, bases in enumerate((warps, lanes, registers)):
        number = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        for bit, basis in enumerate(bases):
            at ^= np.reshape(basis, (-1, 1, 1, 1)) * (number >> bit & 1)
    return tuple(at)


def weights_of_words(words: np.ndarray, k_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the weights, by register h + 2c and half p, of words of a matrix: jmoe.PackedMxfp4's text."""
    block, word = words // 512, words % 512
    warp, g, quad, step = word // 128, word // 16 % 8, word // 4 % 4, word % 4
    row = block // k_blocks * 64 + 16 * warp + 2 * g
    column = block % k_blocks * 64 + 16 * step + 2 * quad
    return np.broadcast_arrays(row[..., None, None, None] + H, (column[..., None, None, None] + 8 * C) + P)


def fragment(warps: int) -> tuple[np.ndarray, ...]:
    """(warp, g, q, product) by warp, lane and register, for a word's product in a block of 64."""
    warp, lane, product = np.ix_(range(warps), range(32), range(4))
    return np.broadcast_arrays(warp, lane // 4, lane % 4, product)


def ends(count: int) -> list[int]:
    """The first two and the last two of so many."""
    return sorted({0, min(1, count - 1), max(0, count - 2), count - 1})


@pytest.mark.parametrize(("n", "k"), [(320, 96), (96, 160), (2880, 2880)])
@pytest.mark.parametrize("column_warps", [1, 2, 4])
def test_a_lane_of_the_decode_product_loads_its_own_fragments(column_warps: int, n: int, k: int) -> None:
    k_parts, k_blocks = 4 // column_warps, -(-k // 64)
    (word_warp, row_pair, quad, step), (scale_warp, scale_row_pair) = held(words_layout(4)), held(scales_layout(4))
    word = word_offset.fn(word_warp, row_pair, quad, step, 128) + to_k_part.fn(word_warp, column_warps, 128, 512)
    scale = scale_offset.fn(scale_warp, scale_row_pair, 8) + to_k_part.fn(scale_warp, column_warps, 8, 32)
    warp, g, q, product = fragment(4)
    for program in ends(-(-n // (16 * column_warps))):
        column_block, quarter = python_body(first_fragment)(program, column_warps, n)
        for k_step in range(-(-k_blocks // k_parts)):
            block = column_block * k_blocks + k_step * k_parts
            rows, columns = weights_of_words(block * 512 + quarter * 128 + word, k_blocks)
            mine = program * 16 * column_warps + warp % column_warps * 16
            part = k_step * k_parts + warp // column_warps
            there = part < k_blocks  # the others are masked
            want = mine[..., None, None, None] + packed_column.fn(g[..., None, None, None] + 8 * H)
            np.testing.assert_array_equal(rows[there], np.broadcast_to(want, rows.shape)[there])
            want = (part * 64 + product * 16 + 2 * q)[..., None, None, None] + 8 * C + P
            np.testing.assert_array_equal(columns[there], np.broadcast_to(want, columns.shape)[there])
            # A word of scales is for 16 words of weights, those of its row pair.
            np.testing.assert_array_equal(quarter * 8 + scale, (quarter * 128 + word[..., :1]) // 16)


@pytest.mark.parametrize(("n", "k"), [(320, 96), (96, 160), (2880, 2880)])
def test_a_lane_of_the_grouped_product_loads_its_own_fragments(n: int, k: int) -> None:
    k_blocks, column_blocks = -(-k // 64), -(-n // 64)
    word_warp, row_pair, quad, step = held(words_layout(8))
    warp, g, q, product = fragment(8)
    for program in ends(-(-n // 128)):
        stride = k_blocks if program * 2 + 1 < column_blocks else 0
        word = in_column_blocks.fn(word_offset.fn(word_warp, row_pair, quad, step, 128), stride, 512)
        for block in range(k_blocks):
            rows, columns = weights_of_words((program * 2 * k_blocks + block) * 512 + word, k_blocks)
            mine = (program * 128 + warp * 16)[..., None, None, None]
            want = mine + packed_column.fn(g[..., None, None, None] + 8 * H)
            stored = np.broadcast_to(want < column_blocks * 64, rows.shape)
            np.testing.assert_array_equal(rows[stored], np.broadcast_to(want, rows.shape)[stored])
            want = (block * 64 + product * 16 + 2 * q)[..., None, None, None] + 8 * C + P
            np.testing.assert_array_equal(columns, np.broadcast_to(want, columns.shape))


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(("k_parts", "column_warps"), [(4, 1), (2, 2), (1, 4)])
def test_a_lane_reads_its_own_tokens(k_parts: int, column_warps: int, tokens: int) -> None:
    token, slot = held(tokens_layout(tokens, k_parts, column_warps))
    for warp in range(4):
        for lane in range(32):
            g, q = lane // 4, lane % 4
            k = np.ravel(warp // column_warps * 64 + 16 * np.arange(4)[:, None, None] + 8 * C[0] + 2 * q + P[0])
            mine = {(g + 8 * i, value) for i in range(tokens // 8) for value in mma_k_slot.fn(k)}
            assert set(zip(token[warp, lane], slot[warp, lane], strict=True)) == mine
            # Eight registers at a time are one load of 16 bytes.
            assert (slot[warp, lane].reshape(-1, 8) == slot[warp, lane][::8, None] + np.arange(8)).all()


def test_tokens_blocks_and_columns_go_to_the_same_slots() -> None:
    blocks = np.arange(128).reshape(2, 64)
    moved = python_body(to_mma_k_order)(blocks)
    np.testing.assert_array_equal(moved[:, mma_k_slot.fn(np.arange(64))], blocks)
    np.testing.assert_array_equal(python_body(from_mma_k_order)(moved), blocks)
    np.testing.assert_array_equal(mma_k_slot.fn(64 + np.arange(64)), 64 + mma_k_slot.fn(np.arange(64)))
