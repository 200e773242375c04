"""Tiles against the shared memory of the GPUs that use them."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.problem import Layout
from tests.triton_src.problems import moe_problem

KIB_A_BLOCK = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability * 10 -> KiB of shared memory a block may have (CUDA C++ Programming Guide)."""

KINDS = {"order": "*i32", "tiles": "*i32", "adapter_ids": "*i32", "weights": "*fp32"}
KINDS |= {f"{projection}_shrunk": "*fp32" for projection in ("gate_up", "down")}


def shared_bytes(plan: Plan, capability: int, mxfp4: bool) -> int:
    """Shared memory of the compiled kernel."""
    constants, signature = dict(plan.constexprs), {}
    for parameter in plan.kernel.arg_names:
        name = plan.operands.get(parameter)
        if parameter in plan.outputs:
            signature[parameter] = KINDS.get(plan.outputs[parameter].name, "*bf16")
        elif parameter in plan.scalars:
            signature[parameter] = "i32"
        elif name is None:
            signature[parameter] = "constexpr"
            constants.setdefault(parameter, None)
        elif name.endswith("_scale"):
            signature[parameter] = "*fp32"
        elif mxfp4 and (name in ("gate_up", "down") or name.endswith("_scales")):
            signature[parameter] = "*u8"
        else:
            signature[parameter] = KINDS.get(name, "*bf16")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(plan.kernel, signature, constants, aligned)
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


@pytest.mark.parametrize("mxfp4", [True, False])
@pytest.mark.parametrize("capability", KIB_A_BLOCK)
def test_the_largest_tiles_fit(capability: int, mxfp4: bool) -> None:
    layout = Layout.MXFP4 if mxfp4 else Layout.DENSE
    problem = moe_problem(4096, layout=layout, ranks=(64, 64), adapters=2, adapter_ids=True)
    plans = [plan for plan in plan_moe(problem, capability) if plan.name in ("shrink", "grouped_matmul")]
    sizes = [shared_bytes(plan, capability, mxfp4) for plan in plans[:2]]  # down has the tiles of gate_up
    assert len(sizes) == 2
    assert 0 < max(sizes) <= KIB_A_BLOCK[capability] * 1024
