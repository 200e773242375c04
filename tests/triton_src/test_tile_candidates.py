"""Which launch parameters are tried, and the sections that measurements make."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.triton_src.tile_candidates import ROWS, assemble, candidates, cut, forced
from jmoe.triton_src.tile_tables import KINDS, as_json, own_table, parse
from jmoe.triton_src.tiles import GroupedMatmulTile, bound_of, layer_tile, tile_for, unbounded

TABLE = own_table(90)
ONE = unbounded(TABLE.grouped_matmul[0])


def differences(a: Any, b: Any) -> list[str]:
    """The fields but their bound in which two tiles of one kind differ."""
    names = [field.name for field in dataclasses.fields(a) if field.name != a.bound]
    return [name for name in names if getattr(a, name) != getattr(b, name)]


@pytest.mark.parametrize("section", ROWS)
def test_by_rows_the_tables_tiles_are_tried_and_those_one_field_away(section: str) -> None:
    tiles = getattr(TABLE, section)
    for start in tiles:
        tried = candidates(section, tiles, bound_of(start))
        assert all(len(content) == 1 and bound_of(content[0]) == math.inf for content in tried)
        found = [content[0] for content in tried]
        assert not differences(found[0], start)
        assert len(set(found)) == len(found)
        entries = {unbounded(tile) for tile in tiles}
        assert entries < set(found)
        assert {len(differences(tile, start)) for tile in set(found) - entries} == {1}


@pytest.mark.parametrize("section", sorted(set(KINDS) - set(ROWS)))
def test_elsewhere_one_field_of_one_tile_differs_and_no_bound(section: str) -> None:
    tiles = getattr(TABLE, section)
    first, *others = candidates(section, tiles, 1)
    assert first == tiles
    assert others
    for content in others:
        assert [bound_of(tile) for tile in content] == [bound_of(tile) for tile in tiles]
        assert sum(len(differences(a, b)) for a, b in zip(content, tiles, strict=True)) == 1


@pytest.mark.parametrize("section", KINDS)
def test_all_that_is_tried_can_be_written(section: str) -> None:
    tiles = getattr(TABLE, section)
    for content in candidates(section, tiles, bound_of(tiles[-1])):
        assert parse(json.dumps(as_json({section: content})), "file") == {section: content}


def test_few_fields_can_be_tried_alone() -> None:
    tried = candidates("packed_decode", TABLE.packed_decode, 1, ("shrink_splits", "block_r"))
    assert {name for (tile,) in tried[1:] for name in differences(tile, tried[0][0])} == {"shrink_splits", "block_r"}


def test_the_grouped_kernel_is_tried_where_decodes_would_run() -> None:
    tile = unbounded(TABLE.packed_grouped_matmul[0])
    assert layer_tile(forced(TABLE, "packed_grouped_matmul", (tile,)), 1, packed=True) is tile
    decode = unbounded(TABLE.packed_decode[0])
    assert layer_tile(forced(TABLE, "packed_decode", (decode,)), 1000, packed=True) is decode


def tile(block_m: int, rows: float = math.inf) -> GroupedMatmulTile:
    """A tile that differs from others in block_m."""
    return dataclasses.replace(ONE, block_m=block_m, rows=rows)


def test_between_two_measurements_the_geometric_mean_parts_tiles() -> None:
    best = [(1.0, tile(16)), (4.0, tile(32)), (16.0, tile(32)), (64.0, tile(64))]
    assert assemble(best) == (tile(16, 2.0), tile(32, 32.0), tile(64))
    assert assemble([]) == ()


def test_a_section_is_cut_at_a_number_of_rows() -> None:
    section = (tile(16, 2.0), tile(32, 32.0), tile(64))
    assert cut(section, math.inf) == section
    assert cut(section, 40) == (*section[:2], tile(64, 40))
    assert cut(section, 32) == section[:2]
    assert cut(section, 1) == (tile(16, 1),)
    assert cut(section, 0) == ()


@given(st.lists(st.tuples(st.integers(1, 1000), st.sampled_from([16, 32, 64])), min_size=1, unique_by=lambda p: p[0]))
def test_an_assembled_section_gives_what_was_best_where_it_was_measured(best: list[tuple[int, int]]) -> None:
    points = sorted(best)
    section = assemble([(float(rows), tile(block_m)) for rows, block_m in points])
    read = parse(json.dumps(as_json({"grouped_matmul": section})), "file")["grouped_matmul"]
    for rows, block_m in points:
        assert tile_for(read, rows).block_m == block_m
