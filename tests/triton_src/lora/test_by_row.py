"""LoRA of many rows by their own adapters, in Triton's interpreter, beside torch in float64."""

import pytest
import torch

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.triton_src.lora.by_row import LoraByRowProblem, plan_lora_by_row
from jmoe.triton_src.tile_tables import own_table

pytestmark = pytest.mark.interpret

ADAPTERS, BROKEN = 6, 2
(TILE,) = own_table(90).lora_by_row


def inputs(ids: torch.Tensor, n: int, k: int, rank: int) -> dict[str, torch.Tensor]:
    """Of three layers, of which the outer hold NaN, as do in the middle one an adapter and two that no row has."""
    generator = torch.Generator().manual_seed(rank)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    stacks = {
        "a": normal(3, ADAPTERS, rank, k).bfloat16(),
        "scale": normal(3, ADAPTERS, rank),
        "b": normal(3, ADAPTERS, n, rank).bfloat16(),
    }
    for stack in stacks.values():
        stack[[0, 2]] = stack[1, [BROKEN, 3, 5]] = float("nan")
    rows = len(ids)
    return {
        "x": normal(rows, k).bfloat16(),
        "product": normal(rows, n),
        "bias": normal(n).bfloat16(),
        "adapter_ids": ids.int(),
        "layer": torch.tensor([1], dtype=torch.int32),
        **stacks,
    }


@pytest.mark.parametrize(
    ("ids", "n", "k", "rank"),
    [
        (torch.tensor([4] * 50 + [-1] * 3 + [0] * 20 + [BROKEN] * 7 + [1, ADAPTERS, -5]), 40, 136, 5),
        (torch.tensor([4, -1, BROKEN, 0, 1, 4, ADAPTERS, -3] * 9), 72, 64, 20),
        (torch.tensor([1]), 16, 300, 80),
        (torch.tensor([-1] * 65), 24, 32, 3),
    ],
    ids=["sequences", "mixed", "one", "base"],
)
def test_each_row_has_lora_of_its_own_adapter(ids: torch.Tensor, n: int, k: int, rank: int) -> None:
    buffers = inputs(ids, n, k, rank)
    plans = plan_lora_by_row(LoraByRowProblem(len(ids), n, k, rank, ADAPTERS), TILE)
    for plan in plans:
        plan.check_names()
    with bfloat16_arithmetic():
        got = launch(plans, buffers)["with_lora"]
    nobody, broken = (ids < 0) | (ids >= ADAPTERS), ids == BROKEN
    base = buffers["product"] + buffers["bias"].float()
    assert torch.equal(got[nobody], base[nobody].bfloat16())
    assert got[broken].isnan().all()
    good = ~nobody & ~broken
    own = {name: buffers[name][1].double()[ids[good]] for name in ("a", "scale", "b")}
    shrunk = torch.einsum("tk,trk->tr", buffers["x"][good].double(), own["a"]) * own["scale"]
    want = base[good].double() + torch.einsum("tr,tnr->tn", shrunk, own["b"])
    assert float((got[good].double() - want).norm()) <= 5e-3 * float(want.norm())


def test_the_launches_do_not_grow_with_the_adapters_that_are_loaded() -> None:
    few, many = (plan_lora_by_row(LoraByRowProblem(4096, 5120, 2880, 48, adapters), TILE) for adapters in (8, 32))
    assert [plan.grid for plan in few] == [plan.grid for plan in many]
