"""Launch parameters: every one changes a plan, and plans have no others."""

import ast
import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from jmoe.triton_src.decode.plans import plan_decode
from jmoe.triton_src.lora.by_row import LoraByRowProblem, plan_lora_by_row
from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.moe_backward import plan_moe_backward
from jmoe.triton_src.paged.plans import plan_paged
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.problem import Layout, MoeProblem
from jmoe.triton_src.tile_candidates import ALSO
from jmoe.triton_src.tile_tables import KINDS, allowed_by, own_table
from jmoe.triton_src.tiles import LaunchTable, tile_for
from tests.triton_src.problems import moe_problem
from tests.triton_src.test_moe_backward import everything
from tests.triton_src.test_plan import PROBLEM

TOKENS = (1, 4, 16, 64, 300, 1024, 16384)
"""With 32 experts and top-4 they reach every tile of a section by rows."""

DECODE = {
    "cached_attention": {"heads": 64, "key_heads": 8, "slots": 4096, "head_dim": 64},
    "decode_linear": {"n": 5120, "k": 2880},
    "norm_linear": {"n": 32, "k": 2880, "weight_rows": 32},
}
PAGED: dict[str, dict[str, Any]] = {
    "paged_decode_attention": {},
    "paged_prefill_attention": {"sequences": 16},
}


def layer_plans(table: LaunchTable, problem: MoeProblem, tokens: int) -> list[Plan]:
    """Forward, and the gradient of everything."""
    sized = dataclasses.replace(problem, tokens=tokens)
    return plan_moe(sized, 90, table) + plan_moe_backward(sized, everything(sized), True, 90, table)


def every_plan(table: LaunchTable) -> list[list[Plan]]:
    """Of layers and decode operations that together run by all of a table, without what costs the tests time."""
    ranks = (64, 64)
    packed: dict[str, Any] = {"layout": Layout.PACKED, "expert_offset": True}
    problems = [
        PROBLEM,
        moe_problem(**packed),
        moe_problem(**packed, ranks=ranks, adapters=2, adapter_ids=True),
        moe_problem(**packed, ranks=ranks, adapters=1),
    ]
    wide = dataclasses.replace(problems[1], experts=256, router_experts=256)
    plans = [layer_plans(table, problem, tokens) for problem in problems for tokens in TOKENS]
    plans += [layer_plans(table, wide, tokens) for tokens in (16, 300)]
    plans += [plan_decode(name, table, rows=rows, **DECODE[name]) for name in DECODE for rows in (1, 16, 64)]
    pages: dict[str, Any] = {"cache": (12, 1000, 8, 64, 128), "columns": 64, "heads": 64, "window": None}
    plans += [
        plan_lora_by_row(LoraByRowProblem(rows, 5120, 2880, 48, 8), tile_for(table.lora_by_row, rows))
        for rows in (128, 4096)
    ]
    return plans + [
        plan_paged(name, table, rows=rows, **pages, **PAGED[name]) for name in PAGED for rows in (1, 16, 64, 4096)
    ]


TABLE = own_table(90)
PLANS = every_plan(TABLE)


def other_values(section: str, i: int, field: str) -> list[Any]:
    """Values that a field may have and does not: those nearest to it."""
    allowed = allowed_by(typing.get_type_hints(KINDS[section], include_extras=True)[field])
    own = getattr(getattr(TABLE, section)[i], field)
    near = (own // 2, 2 * own, own - 1, own + 1, 4 * own, own // 4, *ALSO.get(field, ()))
    return [value for value in near if value != own and value in allowed]


def matters(section: str, i: int, field: str) -> bool:
    """Whether some other value of a tile's field makes some other plan."""
    tiles = getattr(TABLE, section)
    others = (dataclasses.replace(tiles[i], **{field: value}) for value in other_values(section, i, field))
    return any(every_plan(TABLE.over({section: (*tiles[:i], tile, *tiles[i + 1 :])})) != PLANS for tile in others)


@pytest.mark.parametrize("section", KINDS)
def test_every_tile_and_every_parameter_of_a_table_changes_a_plan(section: str) -> None:
    kind, tiles = KINDS[section], range(len(getattr(TABLE, section)))
    fields = [field.name for field in dataclasses.fields(kind) if field.name != kind.bound]
    assert fields
    for i in tiles:
        assert any(matters(section, i, field) for field in fields), f"{section}[{i}]"
    # Not each field of each tile: where a tile has no tail for example its warps do not matter.
    for field in fields:
        assert any(matters(section, i, field) for i in tiles), f"{section}: {field}"


@pytest.mark.parametrize("section", KINDS)
def test_bounds_part_a_sections_tiles(section: str) -> None:
    tiles = getattr(TABLE, section)
    for i in range(len(tiles) - 1):
        fewer = (*tiles[:i], *tiles[i + 1 :])
        assert every_plan(TABLE.over({section: fewer})) != PLANS, f"{section}[{i}]"


SIZES = ("num_warps", "num_stages", "BLOCK", "LINES", "AHEAD", "STAGES", "SPLITS", "SMALLEST_M")


def test_planners_have_no_sizes_of_their_own() -> None:
    """But for the packed kernels' warps, which are written for so many, and limits: the least that a product takes."""
    for file in sorted(Path("triton_src").rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Plan"):
                continue
            constants = next(keyword.value for keyword in call.keywords if keyword.arg == "constexprs")
            values = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg in SIZES}
            if isinstance(constants, ast.Dict):
                pairs = zip(constants.keys, constants.values, strict=True)
                values |= {key.value: value for key, value in pairs if isinstance(key, ast.Constant)}
            for name, value in values.items():
                sized = str(name).startswith(SIZES)
                if sized and not (file.parent.name == "packed" and str(name).startswith("num_")):
                    assert not isinstance(value, ast.Constant), f"{file}: {name}={ast.unparse(value)}"
