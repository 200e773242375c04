"""Plans of packed kernels assembled for Hopper, for tests of what the assembler says."""

import re
import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from jmoe.triton_src.plan import Plan

KINDS = {"gate_up": "*i32", "down": "*i32", "gate_up_scales": "*i32", "down_scales": "*i32", "order": "*i32"}
KINDS |= {"gate_up_grad_shrunk": "*fp32", "down_grad_shrunk": "*fp32"}
KINDS |= {"ready_counters": "*i32", "gate_up_scale": "*fp32", "down_scale": "*fp32"}
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
    messages = done.stdout + done.stderr
    # Inline PTX's shared memory. Triton's follows it, of which wgmma takes 1024 bytes at once.
    own = re.search(r"(\d+) bytes smem", messages)
    before = int(own[1]) if own else 0
    assert before % 1024 == 0
    # For more than 48 KiB in all CUDA must be asked, and launchers ask where Triton's alone is more.
    assert compiled.metadata.shared > 48 * 1024 or before + compiled.metadata.shared <= 48 * 1024
    return messages, before + compiled.metadata.shared


def check_programs_fit(plan: Plan, programs: int, tmp_path: Path) -> None:
    """Fails unless so many programs fit a multiprocessor, products overlap, and next to nothing is spilled."""
    messages, shared = assemble(plan, tmp_path)
    registers = int(messages.split(" registers")[0].split()[-1])
    assert registers * plan.num_warps * 32 * programs <= 65536
    assert (shared + 1024) * programs <= 228 * 1024
    assert "serialized" not in messages
    spilled = int(messages.split(" bytes spill stores")[0].split()[-1])
    assert spilled <= 136
