"""The packed kernels' own bodies, run on numpy at odd sizes, against products in float64."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.moe_backward import plan_moe_backward
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.portable.shrink import rank_blocks
from jmoe.triton_src.problem import Layout, MoeProblem, Projection
from jmoe.triton_src.routing.mma_k_order import mma_k_slot, mma_k_width
from jmoe.triton_src.stacked import Stacked
from tests.triton_src.packed.gluon_on_numpy import run_plan
from tests.triton_src.packed.packed_layers import PackedLayer, assert_same, packed_layer, swiglu

MIXED = {"adapters": 3, "gate_up_rank": 5, "down_rank": 40, "adapter_ids": True}
PLAIN = {"adapters": 1, "gate_up_rank": 16, "down_rank": 16}


def problem_of(tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, **change: Any) -> MoeProblem:
    """A layer with biases, whose experts are chosen before."""
    ranks = {name: change.pop(f"{name}_rank", None) for name in ("gate_up", "down")}
    gate_up, down = (
        Projection(name, n, k, Layout.PACKED, bias=change.pop(f"{name}_bias", True), rank=ranks[name])
        for name, n, k in (("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate))
    )
    return MoeProblem(tokens, top_k, experts, None, gate_up, down, SwiGLU(), **change)


LARGE_SCALES = 127
"""Of 127, 128 and 129, the latter two are decoded by a loop of their own, as is NaN."""


def name(value: Any) -> str:
    if not isinstance(value, MoeProblem):
        return str(value)
    p = value
    return f"{p.tokens}-{p.hidden}-{p.intermediate}" + f"-r{p.down.rank}" * (p.adapters > 0)


def layer_of(problem: MoeProblem, plans: list[Plan], scales_from: int = 122) -> tuple[PackedLayer, list[Plan]]:
    """A layer routed into as many tiles as the plans say, and those of the plans that are packed kernels."""
    tiles = next(buffer for plan in plans for buffer in plan.outputs.values() if buffer.name == "tiles").shape[0]
    packed = [plan for plan in plans if plan.name.startswith("packed")]
    return packed_layer(problem, packed[0].constexprs["BLOCK_M"], tiles, scales_from=scales_from), packed


def in_mma_k_order(x: np.ndarray) -> np.ndarray:
    """[T, K] in the order of mma.sync, padded with zeros."""
    out = np.zeros((len(x), mma_k_width(x.shape[1])), x.dtype)
    out[:, mma_k_slot.fn(np.arange(x.shape[1]))] = x
    return out


def shrunk_parts(plan: Plan, layer: PackedLayer, rows: np.ndarray, projection: str, factor: str) -> np.ndarray:
    """[SPLITS, P, padded rank] float32 as LoRA's shrink leaves it, in unequal parts."""
    values = layer.shrunk(rows, projection, factor)
    shape = plan.constexprs["SPLITS"], layer.problem.pairs, rank_blocks(values.shape[1])[1]
    out = np.zeros(shape, np.float32)
    parts = np.arange(1, len(out) + 1) / np.arange(1, len(out) + 1).sum()
    out[:, : len(values), : values.shape[1]] = parts[:, None, None] * values
    return out


SMALL_DECODE, SMALL_GROUPED = problem_of(2, 64, 32, experts=2, top_k=1), problem_of(60, 96, 160, experts=2, top_k=1)


@pytest.mark.parametrize(
    ("problem", "scales_from"),
    [
        (problem_of(1, 160, 96, experts=32, top_k=4), 122),
        (problem_of(3, 96, 160, experts=4, top_k=1, gate_up_bias=False), 122),
        (problem_of(3, 96, 2880, experts=2, top_k=1, **PLAIN), 122),
        (problem_of(9, 96, 160, experts=5, top_k=3, **PLAIN), 122),
        (problem_of(9, 160, 96, experts=5, top_k=3, stacked=Stacked(True, True), **MIXED), 122),
        (problem_of(9, 96, 160, experts=2, top_k=1, **PLAIN), LARGE_SCALES),
    ],
    ids=name,
)
def test_decode(problem: MoeProblem, scales_from: int) -> None:
    layer, (plan,) = layer_of(problem, plan_moe(problem, 90), scales_from)
    out = run_plan(plan, layer.buffers | {"x_in_mma_order": in_mma_k_order(layer.buffers["x"])})
    rows = len(layer.pair)
    slots = mma_k_slot.fn(np.arange(out["activations"].shape[1]))
    activations = out["activations"][:rows, slots]
    assert (activations[:, problem.intermediate :] == 0).all()
    check_layer(layer, activations[:, : problem.intermediate], out["pair_out"])
    assert np.isnan(out["activations"][rows:].astype(np.float32)).all()


def test_decode_by_the_adapters_of_a_tiles_rows_alone() -> None:
    """Of 12, one that holds NaN shows in its own rows alone, and those that nobody has are not read.

    There are as many programs as with one, and base rows have the bits that they have without LoRA.
    """
    sizes = {"hidden": 96, "intermediate": 64, "experts": 3, "top_k": 2}
    problem = problem_of(9, **sizes, adapters=12, gate_up_rank=5, down_rank=20, adapter_ids=True)
    alone = problem_of(9, **sizes, adapters=1, gate_up_rank=5, down_rank=20, adapter_ids=True)
    layer, (plan,) = layer_of(problem, plan_moe(problem, 90))
    assert plan.grid == layer_of(alone, plan_moe(alone, 90))[1][0].grid
    ids = np.array([3, 11, -1, 7, 3, 12, 0, -9, 7], np.int32)
    buffers = layer.buffers | {"x_in_mma_order": in_mma_k_order(layer.buffers["x"]), "adapter_ids": ids}
    broken = {name: buffers[name].copy() for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")}
    for factor in broken.values():
        factor[[1, 2, 4, 5, 6, 7, 8, 9, 10]] = np.nan

    def run(problem: MoeProblem, **given: Any) -> np.ndarray:
        own = {"ready_counters": np.zeros_like(buffers["ready_counters"])}
        _, (plan,) = layer_of(problem, plan_moe(problem, 90))
        return run_plan(plan, buffers | own | given)["pair_out"].astype(np.float32)

    good, got, base = run(problem), run(problem, **broken), run(problem_of(9, **sizes))
    for token, adapter in enumerate(ids):
        own = [pair for pair in layer.pair if pair // 2 == token]
        if adapter == 7:
            assert np.isnan(got[own]).all()
            continue
        np.testing.assert_array_equal(got[own], good[own])
        same = np.array_equal(got[own], base[own], equal_nan=True)
        assert same == (not 0 <= adapter < 12 or not own)


@pytest.mark.parametrize(
    ("problem", "scales_from"),
    [
        (problem_of(40, 160, 96, experts=3, top_k=2), 122),
        (problem_of(70, 96, 160, experts=3, top_k=2, down_bias=False, **PLAIN), 122),
        (problem_of(30, 96, 160, experts=2, top_k=1, stacked=Stacked(True, True), **MIXED), 122),
        (problem_of(2, 2880, 160, experts=2, top_k=1), 122),
        (problem_of(30, 96, 160, experts=2, top_k=1, **PLAIN), LARGE_SCALES),
    ],
    ids=name,
)
def test_grouped(problem: MoeProblem, scales_from: int) -> None:
    layer, plans = layer_of(problem, plan_moe(problem, 90, keep=True), scales_from)
    buffers, rows = dict(layer.buffers), len(layer.pair)
    for plan in plans:
        if "gate_up_shrunk" in plan.operands.values():
            buffers["gate_up_shrunk"] = shrunk_parts(plan, layer, layer.x, "gate_up", "a")
        if "down_shrunk" in plan.operands.values():
            buffers["down_shrunk"] = shrunk_parts(plan, layer, buffers["activations"][:rows], "down", "a")
        buffers = run_plan(plan, buffers)
    check_layer(layer, buffers["activations"][:rows], buffers["pair_out"])
    kept, want = buffers["pre_activations"][:rows].astype(np.float64), layer.product(layer.x, "gate_up")
    assert_same(np.where(np.abs(want) < 6, kept, 0), np.where(np.abs(want) < 6, want, 0))


@pytest.mark.parametrize(
    ("problem", "scales_from"),
    [
        (problem_of(40, 160, 96, experts=3, top_k=2), 122),
        (problem_of(70, 96, 160, experts=3, top_k=2, **PLAIN), 122),
        (problem_of(30, 96, 160, experts=2, top_k=1, stacked=Stacked(True, True), **MIXED), 122),
        (problem_of(2, 64, 1440, experts=2, top_k=1), 122),
        (problem_of(30, 96, 160, experts=2, top_k=1, **PLAIN), LARGE_SCALES),
    ],
    ids=name,
)
def test_dgrad(problem: MoeProblem, scales_from: int) -> None:
    layer, plans = layer_of(problem, plan_moe_backward(problem, {"x": "bfloat16"}, True, 90), scales_from)
    rng, p = np.random.default_rng(1), problem
    dy = rng.standard_normal((p.tokens, p.hidden)).astype(ml_dtypes.bfloat16)
    grad = rng.standard_normal((p.pairs, 2 * p.intermediate)).astype(ml_dtypes.bfloat16)
    rows = {"down": dy[layer.token], "gate_up": grad[: len(layer.pair)]}
    buffers = layer.buffers | {"dy": dy, "pre_activations_grad": grad}
    for plan, (projection, own) in zip(plans, rows.items(), strict=True):
        name = f"{projection}_grad_shrunk"
        if name in plan.operands.values():
            buffers[name] = shrunk_parts(plan, layer, own, projection, "b")
        buffers = run_plan(plan, buffers)
    assert_same(buffers["down_dgrad"][: len(layer.pair)], layer.input_gradient(rows["down"], "down"))
    assert_same(buffers["pair_dx"][layer.pair], layer.input_gradient(rows["gate_up"], "gate_up"))


@pytest.mark.parametrize("problem", [SMALL_DECODE, SMALL_GROUPED, problem_of(9, 96, 160, 5, 3, **PLAIN)], ids=name)
def test_programs_may_start_in_any_order(problem: MoeProblem) -> None:
    layer, (plan,) = layer_of(problem, plan_moe(problem, 90))
    buffers = layer.buffers | {"x_in_mma_order": in_mma_k_order(layer.buffers["x"])}
    in_order = np.arange(plan.grid[0])
    results = []
    for programs in (in_order, in_order[::-1], np.random.default_rng(0).permutation(in_order)):
        own = buffers | {"ready_counters": buffers["ready_counters"].copy()}
        results.append(run_plan(plan, own, programs.tolist())["pair_out"].astype(np.float32))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("problem", [SMALL_DECODE, SMALL_GROUPED], ids=name)
def test_down_does_the_work_of_programs_that_never_start(problem: MoeProblem) -> None:
    layer, (plan,) = layer_of(problem, plan_moe(problem, 90))
    buffers = layer.buffers | {"x_in_mma_order": in_mma_k_order(layer.buffers["x"])}
    own = buffers | {"ready_counters": buffers["ready_counters"].copy()}
    usual = run_plan(plan, own)
    *signals, started = own["ready_counters"]
    of_a_tile = max(signals)
    assert of_a_tile > 0
    assert set(signals) <= {0, of_a_tile}
    alone = run_plan(plan, buffers, range(int(started), plan.grid[0]))
    for buffer in ("activations", "pair_out"):
        np.testing.assert_array_equal(alone[buffer].astype(np.float32), usual[buffer].astype(np.float32))
    *signals, nobody = buffers["ready_counters"]
    assert nobody == 0
    assert min(signals) >= of_a_tile


def check_layer(layer: PackedLayer, activations: np.ndarray, pair_out: np.ndarray) -> None:
    """Both products, down's of the activations that gate_up wrote; pairs that are not here are not written."""
    assert_same(activations, swiglu(layer.product(layer.x, "gate_up")))
    gate = layer.buffers["weights"][layer.pair][:, None]
    assert_same(pair_out[layer.pair], layer.product(activations, "down") * gate)
    others = np.setdiff1d(np.arange(layer.problem.pairs), layer.pair)
    assert np.isnan(pair_out[others].astype(np.float32)).all()
