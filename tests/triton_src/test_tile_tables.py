"""Tables of launch parameters as files: the package's, a user's, and which is used."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from jmoe.triton_src import tile_tables
from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.moe_backward import plan_moe_backward
from jmoe.triton_src.tile_tables import (
    KINDS,
    OWN,
    VERSION,
    as_json,
    file_name,
    origin_of,
    own_table,
    parse,
    read_own,
    read_user_table,
    table_for,
    user_file,
)  # fmt: skip
from jmoe.triton_src.tiles import LaunchTable, tile_for, unbounded
from tests.triton_src.test_plan import PACKED, PROBLEM

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
ONE = dataclasses.replace(own_table(90).grouped_matmul[0], rows=math.inf, block_m=32)


def sections(table: LaunchTable) -> dict[str, tuple[Any, ...]]:
    """A table's sections that have tiles, by name."""
    return {name: getattr(table, name) for name in KINDS if getattr(table, name)}


def test_a_cards_own_table_counts_first_then_its_capabilitys_then_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = sections(own_table(80))
    for name, block_h in ((H200, 32), ("sm_90", 64), ("default", 128)):
        combine = (dataclasses.replace(own_table(80).combine[0], block_h=block_h),)
        content = as_json({**default, "combine": combine}) | ({"device": name} if name == H200 else {})
        (tmp_path / file_name(name)).write_text(json.dumps(content))
    monkeypatch.setattr(tile_tables, "OWN", tmp_path)
    found = [own_table(*gpu).combine[0].block_h for gpu in ((90, H200), (90, "other"), (90,), (100, "other"), (80,))]
    assert found == [32, 64, 64, 128, 128]


def test_no_card_is_called_what_the_other_files_are() -> None:
    assert own_table(90, "default") == own_table(90, "sm_80") == own_table(90) != own_table(80)


def test_the_h200_has_the_h100s_values_until_it_is_measured() -> None:
    assert own_table(90, H200) == own_table(90, H100) == own_table(90, "another Hopper GPU")
    assert origin_of(90, H100) == f"jmoe's own for {H100}"
    assert origin_of(90, H200) == f"jmoe's own, {H100}'s values, of which none was measured on {H200}: run jmoe tune"
    assert origin_of(80, "A") == "jmoe's own, default values, of which none was measured on A: run jmoe tune"


def test_a_card_of_another_architecture_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"^{H200} is sm_90, got sm_80$"):
        own_table(80, H200)


@pytest.mark.parametrize("file", sorted(OWN.glob("*.json")), ids=lambda file: file.stem)
def test_the_packages_files_have_the_form_of_a_users(file: Path) -> None:
    content = read_own(file)
    assert content["version"] == VERSION
    assert ("tiles" in content) != ("same_as" in content)
    if "device" in content:
        assert file.name == file_name(content["device"])
    if "tiles" in content:
        table = tile_tables.table_of_file(file)
        text = json.dumps({"date": "2000-01-01", **as_json(sections(table))})
        assert "Infinity" not in text
        assert parse(text, "file") == sections(table)


def test_a_gpus_file_lies_in_the_users_cache_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "jmoe" / "tiles" / "nvidia_h100_80gb_hbm3.json"
    assert user_file(H100) == file
    assert read_user_table(H100) is None
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(as_json({"grouped_matmul": (ONE,)})))
    assert read_user_table(H100) == {"grouped_matmul": (ONE,)}
    assert read_user_table("another GPU") is None
    # What the user's does not have is the package's.
    own = own_table(90, H100)
    assert table_for(90, H100) == dataclasses.replace(own, grouped_matmul=(ONE,)) != own
    assert table_for(90, H200) == own
    assert origin_of(90, H100) == f"the user's, {file}"


@pytest.mark.parametrize("cache", ["", "relative"])
def test_a_cache_that_is_no_absolute_path_is_the_home_directorys(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", "/home/user")
    assert user_file("A").as_posix() == "/home/user/.cache/jmoe/tiles/a.json"


def changed(section: str = "grouped_matmul", **fields: object) -> dict[str, Any]:
    """A section's last tile with these fields changed, or left out where ... is given."""
    tile = as_json({section: (getattr(own_table(90), section)[-1],)})["tiles"][section][0] | fields
    return {section: [{name: value for name, value in tile.items() if value is not ...}]}


GROUPED, DECODE = "packed_grouped_matmul", "packed_decode"

WRONG = {
    "must be an object, got 3": 3,
    "version must be 2, this jmoe's, got None": {"portable": [], "packed": []},
    "version must be 2, this jmoe's, got 3": {"version": 3, "tiles": {}},
    "tiles must be an object, got None": {"version": VERSION},
}
WRONG |= {
    message: {"version": VERSION, "tiles": tiles}
    for message, tiles in {
        f"portable is not a section, which are {', '.join(KINDS)}": {"portable": []},
        "grouped_matmul must be a list of tiles, got 3": {"grouped_matmul": 3},
        "grouped_matmul must have a tile, got none": {"grouped_matmul": []},
        f"{GROUPED} must have a tile, got none": {GROUPED: []},
        "route_few must have a tile, got none": {"route_few": []},
        "grouped_matmul[0] must be an object, got 1": {"grouped_matmul": [1]},
        "grouped_matmul[0].block_m is missing": changed(block_m=...),
        "grouped_matmul[0].block_q is not a field of GroupedMatmulTile": changed(block_q=1),
        "grouped_matmul[0].block_m must be a power of two from 16 to 256, got '16'": changed(block_m="16"),
        "grouped_matmul[0].block_m must be a power of two from 16 to 256, got 16.0": changed(block_m=16.0),
        "grouped_matmul[0].block_m must be a power of two from 16 to 256, got 48": changed(block_m=48),
        "grouped_matmul[0].block_k must be a power of two from 32 to 256, got 16": changed(block_k=16),
        "grouped_matmul[0].num_warps must be a power of two from 1 to 16, got True": changed(num_warps=True),
        "grouped_matmul[0].num_warps must be a power of two from 1 to 16, got None": changed(num_warps=None),
        "grouped_matmul[0].num_stages must be an integer from 1 to 16, got 0": changed(num_stages=0),
        "grouped_matmul[0].rows must be a positive number or null, got 'all'": changed(rows="all"),
        "grouped_matmul[0].rows must be null, as no tile follows, got 4": changed(rows=4),
        "grouped_matmul must have increasing rows, got [inf, inf]": {"grouped_matmul": changed()["grouped_matmul"] * 2},
        f"{GROUPED}[0].block_m must be 64 or 128, got 32": changed(GROUPED, block_m=32),
        f"{GROUPED}[0].stages must be an integer from 2 to 16, got 1": changed(GROUPED, stages=1),
        f"{DECODE}[0].block_m must be 8 or 16, got 32": changed(DECODE, block_m=32),
        f"{DECODE}[0].column_warps must be 1, 2 or 4, got 3": changed(DECODE, column_warps=3),
        "packed_dgrad[0].block_m must be 128, as no tile follows, got 64": changed("packed_dgrad", block_m=64),
        "packed_dgrad[0].block_m must be 64 or 128, got 256": changed("packed_dgrad", block_m=256),
    }.items()
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_with_a_file_is_said_with_its_place(message: str) -> None:
    with pytest.raises(ValueError, match=r"some/file\.json: ") as error:
        parse(json.dumps(WRONG[message]), "some/file.json")
    assert str(error.value) == f"some/file.json: {message}; remove it or run `jmoe tune` again"


def test_a_file_that_is_no_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"some/file\.json is not JSON: .*; remove it or run `jmoe tune` again"):
        parse("{", "some/file.json")


def test_packed_decode_may_end_anywhere_or_never_be_used() -> None:
    few = (dataclasses.replace(own_table(90).packed_decode[0], rows=3),)
    for tiles in (few, (unbounded(few[0]),), ()):
        assert parse(json.dumps(as_json({DECODE: tiles})), "file") == {DECODE: tiles}


@pytest.mark.parametrize("packed", [False, True])
def test_a_layers_plans_follow_the_table(packed: bool) -> None:
    problem = dataclasses.replace(PACKED if packed else PROBLEM, tokens=512)
    own = own_table(90)
    table = own.over({"grouped_matmul": (ONE,), DECODE: (unbounded(own.packed_decode[0]),)})
    before, after = plan_moe(problem, 90), plan_moe(problem, 90, table)
    assert plan_moe(problem, 90, own) == before
    if packed:
        assert ["decode" in plan.name for plan in after if "packed" in plan.name] == [True]
    else:
        blocks = {plan.constexprs["BLOCK_M"] for plan in after if "BLOCK_M" in plan.constexprs}
        assert blocks == {ONE.block_m}


def test_the_gradient_of_few_rows_on_packed_weights_follows_the_users_table() -> None:
    own = own_table(90)
    (tile,) = parse(json.dumps(as_json({GROUPED: (unbounded(own.packed_grouped_matmul[-1]),)})), "file")[GROUPED]
    assert tile.block_m != own.packed_grouped_matmul[0].block_m
    few = dataclasses.replace(PACKED, tokens=4, router_experts=None)
    for plans in (
        plan_moe(few, 90, own.over({GROUPED: (tile,)}), keep=True),
        plan_moe_backward(few, {"x": "bfloat16"}, True, 90, own.over({GROUPED: (tile,)})),
    ):
        blocks = {plan.constexprs["BLOCK_M"] for plan in plans if "BLOCK_M" in plan.constexprs}
        assert blocks == {tile.block_m}


def test_every_size_of_routings_tile_that_a_table_may_have_has_a_gradient() -> None:
    hints = typing.get_type_hints(KINDS[GROUPED], include_extras=True)
    for block_m in tile_tables.allowed_by(hints["block_m"]).values:
        assert tile_for(own_table(90).packed_dgrad, block_m).block_m == block_m


def test_the_form_of_the_files_is_described() -> None:
    described = re.findall(r'"(\w+)"', str(tile_tables.__doc__))
    assert {"version", "device", "capability", "tiles", "same_as", "measured"} == set(described)
