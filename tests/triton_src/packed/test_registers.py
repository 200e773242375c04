"""The packed kernels assembled for Hopper: they fit its registers and shared memory, and their products overlap."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.problem import Layout
from tests.triton_src.problems import moe_problem

KINDS = {"gate_up": "*i32", "down": "*i32", "gate_up_scales": "*i32", "down_scales": "*i32", "order": "*i32"}
KINDS |= {"gate_up_grad_shrunk": "*fp32", "down_grad_shrunk": "*fp32"}
KINDS |= {"finished": "*i32", "gate_up_scale": "*fp32", "down_scale": "*fp32"}
KINDS |= {"tiles": "*i32", "adapter_ids": "*i32", "weights": "*fp32", "gate_up_shrunk": "*fp32", "down_shrunk": "*fp32"}


def assemble(plan: Plan, tmp_path: Path) -> tuple[str, int]:
    """(ptxas's messages, bytes of shared memory) of a Gluon plan."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(plan.kernel.arg_names):
        name = plan.outputs[parameter].name if parameter in plan.outputs else plan.operands.get(parameter)
        if parameter in plan.scalars:
            signature[parameter] = "i32"
        elif name is None:
            signature[parameter] = "constexpr"
            constants[i,] = plan.constexprs.get(parameter)
        else:
            signature[parameter] = KINDS.get(name, "*bf16")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = GluonASTSource(plan.kernel, signature, constants, aligned)
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "maxnreg": plan.max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    text = tmp_path / "kernel.ptx"
    text.write_text(compiled.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", "--gpu-name=sm_90a", "--regAllocOptLevel=2", text, "-o", tmp_path / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr, compiled.metadata.shared


@pytest.mark.parametrize("tokens", [256, 4096])
@pytest.mark.parametrize("rank", [16, 64, 100])
def test_products_overlap_with_mixed_adapters_too(tokens: int, rank: int, tmp_path: Path) -> None:
    problem = moe_problem(tokens, layout=Layout.PACKED, ranks=(rank, rank), adapters=8, adapter_ids=True)
    for plan in plan_moe(problem, 90):
        if plan.name == "packed_grouped_matmul":
            assert "serialized" not in assemble(plan, tmp_path)[0]


@pytest.mark.parametrize("rank", [None, 16, 64])
@pytest.mark.parametrize(("tokens", "programs"), [(1, 4), (16, 4), (64, 4), (256, 3), (4096, 2)])
def test_several_programs_fit_a_multiprocessor(tokens: int, programs: int, rank: int | None, tmp_path: Path) -> None:
    problem = moe_problem(tokens, layout=Layout.PACKED, ranks=(rank, rank), adapters=0 if rank is None else 1)
    plan = next(plan for plan in plan_moe(problem, 90) if plan.name.startswith("packed"))
    messages, shared = assemble(plan, tmp_path)
    registers = int(messages.split(" registers")[0].split()[-1])
    assert registers * plan.num_warps * 32 * programs <= 65536
    assert (shared + 1024) * programs <= 228 * 1024
    assert "serialized" not in messages
    spilled = int(messages.split(" bytes spill stores")[0].split()[-1])
    assert spilled <= 128
