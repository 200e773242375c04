"""A user's tile tables: their file, and what is used because of it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.triton_src import tile_tables
from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.moe import MoeProblem, plan_moe
from jmoe.triton_src.tile_tables import as_json, assemble, built_in, candidates, parse, read_user_table, user_table
from jmoe.triton_src.tiles import PACKED_TILES, TILES, PackedTile, Tile, TileTables, choose_packed_tile, choose_tile

DEVICE = "NVIDIA H100 80GB HBM3"
ONE = dataclasses.replace(TILES[80][0], rows=math.inf, block_m=32)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_packages_own_tables_survive_a_file(capability: int) -> None:
    tables = built_in(capability)
    assert tables.portable == TILES[capability]
    assert tables.packed == PACKED_TILES.get(capability, ())
    text = json.dumps({"date": "2000-01-01", **as_json(tables)})
    assert "Infinity" not in text
    assert parse(text, "file") == tables


def test_a_gpus_file_lies_in_the_users_cache_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "jmoe" / "tiles" / "nvidia_h100_80gb_hbm3.json"
    assert user_table(DEVICE) == file
    assert read_user_table(DEVICE) is None
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(as_json(TileTables((ONE,), ()))))
    assert read_user_table(DEVICE) == TileTables((ONE,), ())
    assert read_user_table("another GPU") is None


@pytest.mark.parametrize("cache", ["", "relative"])
def test_a_cache_that_is_no_absolute_path_is_the_home_directorys(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", "/home/user")
    assert user_table("A").as_posix() == "/home/user/.cache/jmoe/tiles/a.json"


def changed(**fields: object) -> dict[str, Any]:
    """Tables of one portable tile with these fields changed, or left out where None is given as ...; no packed ones."""
    tile = as_json(TileTables((ONE,), ()))["portable"][0] | fields
    return {"portable": [{name: value for name, value in tile.items() if value is not ...}], "packed": []}


WRONG = {
    "portable must be a list of tiles, got None": {"packed": []},
    "packed must be a list of tiles, got 3": {"portable": [], "packed": 3},
    "must be an object, got 3": 3,
    "portable[0] must be an object, got 1": {"portable": [1], "packed": []},
    "portable[0].kind must be Tile, got 'Tiles'": changed(kind="Tiles"),
    "portable[0].kind must be Tile, got []": changed(kind=[]),
    "portable[0].block_m is missing": changed(block_m=...),
    "portable[0].block_q is no field of Tile": changed(block_q=1),
    "portable[0].block_m must be a positive integer, got '16'": changed(block_m="16"),
    "portable[0].block_m must be a positive integer, got 16.0": changed(block_m=16.0),
    "portable[0].num_warps must be a positive integer, got True": changed(num_warps=True),
    "portable[0].num_warps must be a positive integer, got None": changed(num_warps=None),
    "portable[0].num_stages must be a positive integer, got 0": changed(num_stages=0),
    "portable[0].rows must be a positive number or null, got 'all'": changed(rows="all"),
    "portable[0].rows must be null, as no tile follows, got 4": changed(rows=4),
    "portable must have increasing rows, got [inf, inf]": {"portable": changed()["portable"] * 2, "packed": []},
}


@pytest.mark.parametrize("tile", [PACKED_TILES[90][0], PACKED_TILES[90][-1]], ids=lambda tile: type(tile).__name__)
def test_a_stage_cannot_be_filled_while_it_is_read(tile: PackedTile) -> None:
    one_stage = as_json(TileTables((), (dataclasses.replace(tile, rows=math.inf, stages=1),)))
    with pytest.raises(ValueError, match=r"packed\[0\]\.stages must be at least 2, .*, got 1; remove it or run"):
        parse(json.dumps(one_stage), "file")


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_with_a_file_is_said_with_its_place(message: str) -> None:
    with pytest.raises(ValueError, match=r"some/file\.json: ") as error:
        parse(json.dumps(WRONG[message]), "some/file.json")
    assert str(error.value) == f"some/file.json: {message}; remove it or run `jmoe tune` again"


def test_a_file_that_is_no_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"some/file\.json is not JSON: .*; remove it or run `jmoe tune` again"):
        parse("{", "some/file.json")


def test_tables_are_used_where_they_are_given() -> None:
    tables = TileTables((ONE,), (dataclasses.replace(PACKED_TILES[90][1], rows=math.inf),))
    for pairs in (1, 128, 100_000):
        assert choose_tile(90, pairs, 32, tables) is tables.portable[0]
        assert choose_packed_tile(90, pairs, 32, tables) is tables.packed[0]
        empty = TileTables((), ())
        assert choose_tile(90, pairs, 32, empty) is choose_tile(90, pairs, 32)
        assert choose_packed_tile(90, pairs, 32, empty) is choose_packed_tile(90, pairs, 32)


@pytest.mark.parametrize("packed", [False, True])
def test_a_layers_plans_follow_the_tables(packed: bool) -> None:
    shapes = {"x": (512, 128), "router_logits": (512, 8), "gate_up": (8, 256, 4, 16), "down": (8, 128, 4, 16)}
    shapes |= {"gate_up_scales": (8, 256, 4), "down_scales": (8, 128, 4)}
    problem = MoeProblem.from_shapes(shapes, intermediate=128, packed=packed, top_k=4, activation=SwiGLU())
    own, other = PACKED_TILES[90][-1], PACKED_TILES[90][0]
    tables = TileTables((ONE,), (dataclasses.replace(other, rows=math.inf),))
    assert type(own) is not type(other)
    before, after = plan_moe(problem, 90), plan_moe(problem, 90, tables)
    assert plan_moe(problem, 90, TileTables((), ())) == before
    if packed:
        assert [plan.name for plan in before] != [plan.name for plan in after]
    else:
        assert {plan.constexprs["BLOCK_M"] for plan in after if "BLOCK_M" in plan.constexprs} == {ONE.block_m}


def differences(a: Any, b: Any) -> list[str]:
    """The fields but rows in which two tiles of one kind differ."""
    return [f.name for f in dataclasses.fields(a) if f.name != "rows" and getattr(a, f.name) != getattr(b, f.name)]


@pytest.mark.parametrize("table", [TILES[90], PACKED_TILES[90]])
def test_candidates_are_the_tables_tiles_and_those_one_field_away(table: tuple[Any, ...]) -> None:
    for start in table:
        tried = candidates(table, start)
        assert not differences(tried[0], start)
        assert len(set(tried)) == len(tried)
        assert {tile.rows for tile in tried} == {math.inf}
        entries = {dataclasses.replace(tile, rows=math.inf) for tile in table}
        assert entries <= set(tried)
        assert len(tried) > len(entries)
        for tile in set(tried) - entries:
            assert len(differences(tile, start)) == 1


def test_every_kind_of_tile_can_be_written() -> None:
    assert {type(tile).__name__ for tile in PACKED_TILES[90]} == set(tile_tables.KINDS["packed"])


def tile(block_m: int, rows: float = math.inf) -> Tile:
    """A tile that differs from others in block_m."""
    return dataclasses.replace(ONE, block_m=block_m, rows=rows)


def test_between_two_measurements_the_geometric_mean_parts_tiles() -> None:
    best = [(1.0, tile(16)), (4.0, tile(32)), (16.0, tile(32)), (64.0, tile(64))]
    assert assemble(best) == (tile(16, 2.0), tile(32, 32.0), tile(64))
    assert assemble([]) == ()


@given(st.lists(st.tuples(st.integers(1, 1000), st.sampled_from([16, 32, 64])), min_size=1, unique_by=lambda p: p[0]))
def test_an_assembled_table_gives_what_was_best_where_it_was_measured(best: list[tuple[int, int]]) -> None:
    points = sorted(best)
    table = assemble([(float(rows), tile(block_m)) for rows, block_m in points])
    tables = parse(json.dumps(as_json(TileTables(table, ()))), "file")
    for rows, block_m in points:
        assert choose_tile(90, 32 * rows, 32, tables).block_m == block_m
