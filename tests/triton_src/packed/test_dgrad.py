"""The packed gradient's kernel: which weight a thread holds, and what its assembled programs take."""

from pathlib import Path

import numpy as np
import pytest

from jmoe.ops.mxfp4 import Mxfp4
from jmoe.ops.packed import pack_weight
from jmoe.triton_src.packed.dgrad import plan_packed_dgrad
from jmoe.triton_src.packed.transposed import transposed_column
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.problem import Layout
from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import tile_for
from tests.triton_src.packed.test_registers import assemble
from tests.triton_src.problems import moe_problem


def plan_of(projection: str, block_m: int, rank: int | None = None, adapters: int = 1) -> Plan:
    """A plan at gpt-oss-20b's sizes; more adapters than one are mixed."""
    table = own_table(90)
    routed = next(tile for tile in table.packed_grouped_matmul if tile.block_m == block_m)
    problem = moe_problem(4096, layout=Layout.PACKED, ranks=(rank, rank), adapters=adapters, adapter_ids=adapters > 1)
    product = problem.gate_up if projection == "gate_up" else problem.down
    return plan_packed_dgrad(product, problem, tile_for(table.packed_dgrad, block_m), routed)


def test_each_weight_stands_in_the_transposed_fragment_of_its_column() -> None:
    codes = np.arange(64 * 128).reshape(64, 128)
    at = np.zeros((64, 128), np.int64)
    # One bit of the weights' numbers at a time, as the codes 0 and 1, tells where each weight went.
    for bit in range(13):
        nibbles = (codes >> bit & 1).astype(np.uint8)
        blocks = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).reshape(1, 64, 4, 16)
        words = np.asarray(pack_weight(Mxfp4(blocks, np.full((1, 64, 4), 127, np.uint8))).words).reshape(-1)
        for row in range(128):
            c, warp, p, column = row // 64, row % 64 // 16, row % 16 // 8, row % 8
            for n in range(64):
                part, row_pair, h = n // 8, n % 8 // 2, n % 2
                word = words[
                    warp // 2 * 512 + part * 64 + row_pair * 16 + column % 4 * 4 + warp % 2 * 2 + column // 4
                ].item()
                # The lowest bit of a weight's code: by register 2c + h and half p.
                mantissa = (6, 0, 10, 4)[2 * c + h] + 16 * p
                at[n, row] |= (word >> mantissa & 1) << bit
    columns = [transposed_column.fn(row, 4) for row in range(128)]
    assert sorted(columns) == list(range(128))
    np.testing.assert_array_equal(at, codes[:, columns])


@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize("rank", [None, 16, 64])
@pytest.mark.parametrize(("block_m", "programs"), [(64, 3), (128, 2)])
def test_several_programs_fit_a_multiprocessor(
    projection: str, block_m: int, programs: int, rank: int | None, tmp_path: Path
) -> None:
    plan = plan_of(projection, block_m, rank)
    plan.check_names()
    messages, shared = assemble(plan, tmp_path)
    registers = int(messages.split(" registers")[0].split()[-1])
    assert registers * plan.num_warps * 32 * programs <= 65536
    assert (shared + 1024) * programs <= 228 * 1024
    assert "serialized" not in messages
    assert " 0 bytes spill stores" in messages


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("block_m", [64, 128])
def test_products_overlap_with_mixed_adapters_too(block_m: int, rank: int, tmp_path: Path) -> None:
    assert "serialized" not in assemble(plan_of("gate_up", block_m, rank, adapters=8), tmp_path)[0]


def test_every_tile_of_the_routing_has_one() -> None:
    table = own_table(90)
    routed = [tile.block_m for tile in table.packed_grouped_matmul]
    assert [tile_for(table.packed_dgrad, block_m).block_m for block_m in routed] == routed
