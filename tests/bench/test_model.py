"""Measurements of a whole model, as far as a CPU can take them."""

import pytest

from jmoe.bench.model.case import CPU_CASES, ModelCase
from jmoe.bench.model.parts import by_part, parts_of_operations
from jmoe.bench.model.run import measure, run
from jmoe.bench.profile import Kernel

PROGRAM = """
%fused_computation.1 (param_0: f32[2]) -> f32[2] {
  %param_0 = f32[2]{0} parameter(0)
  %multiply.1 = f32[2]{0} multiply(%param_0, %param_0), metadata={op_name="jit(f)/while/body/attention/mul"}
  ROOT %add.1 = f32[2]{0} add(%multiply.1, %param_0), metadata={op_name="jit(f)/while/body/attention/add"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %fusion = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused_computation.1
  %custom-call.2 = f32[2]{0} custom-call(%fusion), metadata={op_name="jit(f)/while/body/experts/triton_kernel_call"}
  ROOT %copy.1 = f32[2]{0} copy(%custom-call.2), metadata={op_name="jit(f)/copy"}
}
"""


def test_an_operation_is_of_its_own_scope_or_of_what_it_calls() -> None:
    parts = parts_of_operations(PROGRAM)
    assert {name: parts.get(name) for name in ("fusion", "custom-call.2", "copy.1")} == {
        "fusion": "attention",
        "custom-call.2": "experts",
        "copy.1": None,
    }
    kernels = [Kernel("a", 3.0, "fusion"), Kernel("b", 5.0, "custom-call.2"), Kernel("c", 2.0, "copy.1")]
    assert by_part(kernels, parts, steps=2) == {
        "attention": 1.5,
        "router": 0.0,
        "experts": 2.5,
        "head": 0.0,
        "other": 1.0,
    }


def test_a_failure_is_a_reason_and_the_next_case_runs() -> None:
    (wrong, reason), (right, figures) = run([ModelCase("load", "no such size"), ModelCase("load", "tiny", rank=0)])
    assert (wrong.size, reason) == ("no such size", {"error": "KeyError: 'no such size'"})
    assert right.size == "tiny"
    assert figures["load_seconds"] > 0


@pytest.mark.slow
def test_a_cpu_measures_a_tiny_model() -> None:
    assert measure(CPU_CASES[0])["decode_step_ms"] > 0
