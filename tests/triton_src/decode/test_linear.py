"""The dense product of few rows, in Triton's interpreter, beside torch in float64."""

import pytest
import torch

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.triton_src.decode.plans import plan_decode
from jmoe.triton_src.tile_tables import own_table

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(
    ("rows", "n", "k", "rank"),
    [(1, 40, 300, None), (1, 71, 1100, 100), (2, 40, 300, 3), (16, 64, 256, 5), (33, 72, 136, 100), (64, 32, 64, 16)],
)
def test_one_layer_of_a_stack(rows: int, n: int, k: int, rank: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    buffers = {"x": normal(rows, k), "weight": normal(3, n, k), "bias": normal(3, n)}
    buffers["weight"][[0, 2]] = float("nan")
    buffers["layer"] = torch.tensor([1], dtype=torch.int32)
    if rank is not None:
        buffers |= {"shrunk": normal(rows, rank), "lora_b": normal(3, 2 * n, rank)}
        buffers["lora_b"][[0, 2]] = buffers["lora_b"][:, n:] = float("nan")
    plans = plan_decode("decode_linear", own_table(90), rows=rows, n=n, k=k, rank=rank, lora_rows=2 * n)
    plans[0].check_names()
    with bfloat16_arithmetic():
        got = launch(plans, buffers)["linear"].double()
    exact = {name: buffer.double() for name, buffer in buffers.items()}
    want = exact["x"] @ exact["weight"][1].T + exact["bias"][1]
    if rank is not None:
        want += exact["shrunk"] @ exact["lora_b"][1, :n].T
    assert float((got - want).norm() / want.norm()) <= 4e-3


@pytest.mark.parametrize(("rows", "rank"), [(1, 5), (7, 3), (16, 100), (33, 16)])
def test_each_row_has_lora_of_its_own_adapter(rows: int, rank: int) -> None:
    """Of 6 adapters that are loaded, one holds NaN and shows in its own rows alone; two are not used, nor read."""
    n, k, adapters, broken = 40, 136, 6, 2
    generator = torch.Generator().manual_seed(rows)
    normal = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    buffers = {"x": normal(rows, k), "weight": normal(3, n, k), "bias": normal(3, n), "layer": torch.tensor([1])}
    buffers["layer"] = buffers["layer"].int()
    buffers |= {"shrunk": normal(rows, rank), "lora_b": normal(3, adapters, n, rank)}
    ids = torch.tensor([4, -1, 1, broken, 0, 1, adapters, -7])[torch.arange(rows) % 8].int()
    buffers["shrunk"][(ids < 0) | (ids >= adapters)] = 0
    buffers["lora_b"][[0, 2]] = buffers["lora_b"][1, [broken, 3, 5]] = float("nan")
    sizes = {"rows": rows, "n": n, "k": k}
    base = {name: buffers[name] for name in ("x", "weight", "bias", "layer")}
    given = buffers | {"lora_b": buffers["lora_b"].flatten(1, 2), "adapter_ids": ids}
    plans = plan_decode("decode_linear", own_table(90), **sizes, rank=rank, lora_rows=adapters * n, adapter_ids=True)
    plans[0].check_names()
    alone = plan_decode("decode_linear", own_table(90), **sizes, rank=rank, lora_rows=n)
    with bfloat16_arithmetic():
        got = launch(plans, given)["linear"]
        without = launch(plan_decode("decode_linear", own_table(90), **sizes), base)["linear"]
        for adapter in (0, 1, 4):
            own = launch(
                alone, base | {"shrunk": buffers["shrunk"], "lora_b": buffers["lora_b"][:, adapter].contiguous()}
            )
            assert torch.equal(got[ids == adapter], own["linear"][ids == adapter])
    assert got[ids == broken].isnan().all()
    nobody = (ids < 0) | (ids >= adapters)
    assert torch.equal(got[nobody], without[nobody])
    assert not torch.equal(got[ids == 4], without[ids == 4])
