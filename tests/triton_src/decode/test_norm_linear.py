"""The norm and a narrow product of it, in Triton's interpreter, beside torch in float64."""

import pytest
import torch

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.triton_src.decode.plans import plan_decode
from jmoe.triton_src.tile_tables import own_table

pytestmark = pytest.mark.interpret

EPS = 1e-5


def inputs(rows: int, k: int, weight_rows: int, *parts: str) -> dict[str, torch.Tensor]:
    """Of three layers, of which the outer hold NaN."""
    generator = torch.Generator().manual_seed(rows)
    normal = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    stacks = {
        "norm": 1 + 0.1 * normal(3, k),
        "weight": normal(3, weight_rows, k),
        "scale": normal(3, weight_rows).float(),
        "bias": normal(3, weight_rows),
    }
    for stack in stacks.values():
        stack[[0, 2]] = float("nan")
    buffers = {"x": normal(rows, k), "addend": normal(rows, k), **stacks, "layer": torch.tensor([1], dtype=torch.int32)}
    return {name: buffers[name] for name in ("x", "layer", *parts)}


def run(buffers: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    rows, k = buffers["x"].shape
    given = {name: name in buffers for name in ("addend", "norm", "scale", "bias", "adapter_ids")}
    weight_rows = buffers["weight"].shape[1] if n else 0
    plans = plan_decode("norm_linear", own_table(90), rows=rows, k=k, n=n, weight_rows=weight_rows, eps=EPS, **given)
    plans[0].check_names()
    with bfloat16_arithmetic():
        return launch(plans, buffers)


def normal_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As float32 has it before it is rounded."""
    wide = x.float()
    return weight[1].float() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 300, 48), (7, 64, 5), (16, 136, 32), (64, 48, 9)])
def test_sum_norm_and_product_of_one_layer(rows: int, k: int, n: int) -> None:
    """The router: its logits are of the rounded norm of the rounded sum, and have a bias."""
    buffers = inputs(rows, k, n, "addend", "norm", "weight", "bias")
    got = run(buffers, n)
    want_sum = (buffers["x"].float() + buffers["addend"].float()).bfloat16()
    assert torch.equal(got["sum"], want_sum)
    assert relative_error(got["normal"], normal_of(want_sum, buffers["norm"])) <= 2.5e-3
    exact = got["normal"].double() @ buffers["weight"][1].double().T + buffers["bias"][1].double()
    assert relative_error(got["product"], exact) <= 2.5e-3


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 64, 16), (16, 300, 3)])
def test_a_product_without_norm_of_the_first_rows_of_the_weight(rows: int, k: int, n: int) -> None:
    """LoRA on o: the rows after its own are other adapters'."""
    buffers = inputs(rows, k, 2 * n, "weight", "scale")
    buffers["weight"][1, n:] = buffers["scale"][1, n:] = float("nan")
    got = run(buffers, n)
    exact = buffers["x"].double() @ buffers["weight"][1, :n].double().T * buffers["scale"][1, :n].double()
    assert relative_error(got["product"], exact) <= 2.5e-3
    assert not {"sum", "normal"} & got.keys()


def test_the_norm_alone_of_one_layer() -> None:
    buffers = inputs(5, 100, 1, "norm")
    assert relative_error(run(buffers, 0)["normal"], normal_of(buffers["x"], buffers["norm"])) <= 2.5e-3


def test_nan_stays_in_its_row() -> None:
    buffers = inputs(7, 100, 6, "addend", "norm", "weight", "bias")
    buffers["addend"][3, 5] = float("nan")
    got = run(buffers, 6)
    for name in ("normal", "product"):
        assert torch.equal(got[name].isnan().all(1), torch.arange(7) == 3)
        assert torch.equal(got[name].isnan().any(1), torch.arange(7) == 3)


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 64, 16), (16, 300, 3), (37, 48, 9)])
def test_each_row_takes_the_weight_of_its_own_adapter(rows: int, k: int, n: int) -> None:
    """Others may hold NaN. The product of rows without adapter is zero, whatever x is."""
    adapters, broken = 5, 3
    buffers = inputs(rows, k, adapters * n, "weight", "scale")
    ids = torch.tensor([4, 4, -1, 0, 1, 1, broken, adapters, -2])[torch.arange(rows) % 9].int()
    buffers["weight"][1, broken * n : (broken + 1) * n] = buffers["scale"][1, 2 * n : 3 * n] = float("nan")
    buffers["x"][ids == -2] = float("inf")
    got = run(buffers | {"adapter_ids": ids}, n)["product"]
    for adapter in (0, 1, 4):
        own = slice(adapter * n, (adapter + 1) * n)
        alone = run(buffers | {part: buffers[part][:, own].contiguous() for part in ("weight", "scale")}, n)["product"]
        assert torch.equal(got[ids == adapter], alone[ids == adapter])
        assert alone[ids == adapter].isfinite().all()
    assert got[ids == broken].isnan().all()
    assert not got[(ids < 0) | (ids >= adapters)].any()


def test_norm_and_product_by_each_rows_adapter() -> None:
    """LoRA on q, k and v."""
    buffers = inputs(6, 100, 3 * 8, "addend", "norm", "weight", "scale")
    ids = torch.tensor([2, 0, -1, 2, 1, 0], dtype=torch.int32)
    got = run(buffers | {"adapter_ids": ids}, 8)
    weight, scale = (buffers[name][1].double().unflatten(0, (3, 8))[ids.clamp(0)] for name in ("weight", "scale"))
    exact = torch.einsum("tk,tnk->tn", got["normal"].double(), weight) * scale * (ids >= 0)[:, None]
    assert relative_error(got["product"], exact) <= 2.5e-3
