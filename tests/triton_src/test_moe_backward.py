"""A gradient's launch plans: values that can be checked without a device."""

import pytest

from jmoe.triton_src.moe_backward import plan_moe_backward
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.problem import Layout, MoeProblem
from tests.triton_src.problems import with_both
from tests.triton_src.test_plan import CAPABILITIES, PROBLEM, VARIANTS

LORA = {f"{projection}_{part}": "bfloat16" for projection in ("gate_up", "down") for part in "ab"}
BIASES = {"gate_up_bias": "float32", "down_bias": "bfloat16"}
KEPT = {"x", "dy", "experts", "weights", "gate_up", "down", "gate_up_scales", "down_scales", "adapter_ids"}
KEPT |= {"expert_offset", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias", *LORA}


def everything(problem: MoeProblem) -> dict[str, str]:
    """All gradients that a problem has."""
    lora = {} if problem.gate_up.rank is None else LORA
    router = "weights" if problem.router_experts is None else "router_logits"
    return {"x": "bfloat16", router: "bfloat16", **lora, **(BIASES if problem.gate_up.bias else {})}


def plans_of(problem: MoeProblem, wanted: dict[str, str], capability: int = 90, kept: bool = True) -> list[Plan]:
    return plan_moe_backward(problem, wanted, kept, capability)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("problem", [*VARIANTS, with_both(PROBLEM, layout=Layout.PACKED)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_plans_name_every_parameter_and_read_only_what_was_written(
    problem: MoeProblem, capability: int, kept: bool
) -> None:
    if problem.packed and capability != 90:
        pytest.skip("packed weights are read on compute capability 9.0")
    wanted = everything(problem)
    given = KEPT | ({"pre_activations"} if kept else set())
    for plan in plans_of(problem, wanted, capability, kept):
        plan.check_names()
        assert {name for name in plan.operands.values() if name} <= given
        given |= {buffer.name for buffer in plan.outputs.values()}
        assert 1 <= plan.grid[0] < 2**31
        assert all(1 <= size <= 65535 for size in plan.grid[1:])
    assert {f"{name}_grad" for name in wanted} <= given


@pytest.mark.parametrize(
    ("wanted", "unneeded"),
    [
        (["x"], {"lora_grad", "bias_grad", "route_backward"}),
        (["router_logits"], {"lora_grad", "bias_grad", "combine"}),
        (["down_a"], {"combine", "bias_grad", "route_backward"}),
        (["down_bias"], {"dgrad", "swiglu_backward", "shrink", "lora_grad", "combine"}),
    ],
)
def test_what_is_not_wanted_is_not_launched(wanted: list[str], unneeded: set[str]) -> None:
    every = {plan.name for plan in plans_of(PROBLEM, everything(PROBLEM))}
    some = {plan.name for plan in plans_of(PROBLEM, dict.fromkeys(wanted, "bfloat16"))}
    assert unneeded <= every
    assert not unneeded & some
    assert some < every


def test_a_router_that_is_not_trained_leaves_the_second_dgrad_of_a_first_layer_out() -> None:
    adapters = [plan.name for plan in plans_of(PROBLEM, LORA)]
    assert adapters.count("dgrad") == 1


def test_gradients_have_the_dtype_of_what_they_are_of() -> None:
    wanted = {"gate_up_a": "float32", "gate_up_b": "bfloat16", "router_logits": "float32"}
    found = {
        buffer.name: (buffer.dtype, buffer.shape)
        for plan in plans_of(PROBLEM, wanted)
        for buffer in plan.outputs.values()
    }
    assert found["gate_up_a_grad"] == ("float32", (2, 32, 8, 2880))
    assert found["gate_up_b_grad"] == ("bfloat16", (2, 32, 5760, 8))
    assert found["router_logits_grad"] == ("float32", (16, 32))
