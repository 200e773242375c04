"""The suite that others' functions are tried by: jmoe's pass, and each kind of fault is named."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jmoe.interop import conformance
from jmoe.interop.conformance import Case, Finding, cases, check, random_case

CPU = torch.device("cpu")
SMALL = random_case("small", 5, 64, 64, 3, 2)


def right(x: torch.Tensor, router_logits: torch.Tensor, *, top_k: int, **weights: Any) -> torch.Tensor:
    """The reference itself."""
    return conformance.exact(Case("", {"x": x, "router_logits": router_logits, **weights}, top_k)).bfloat16()


def found(function: Callable[..., Any], case: Case = SMALL, arrays: conformance.Arrays = "torch") -> Finding:
    return check(function, case, arrays, CPU)


def test_the_reference_passes_every_case() -> None:
    findings = [found(right, case) for case in cases()]
    assert all(finding.passed for finding in findings), findings
    assert len(findings) == len({finding.case for finding in findings}) > 10


def test_jmoe_passes_on_jax_arrays() -> None:
    from jmoe.conformance import layer

    assert found(layer, arrays="jax") == (SMALL.name, True, pytest.approx(0, abs=5e-3), "as it should be")


def test_what_is_read_past_an_end_is_named() -> None:
    def reads_one_row_more(x: torch.Tensor, *rest: Any, gate_up_scales: torch.Tensor, **named: Any) -> torch.Tensor:
        end = gate_up_scales.storage_offset() + gate_up_scales.numel()
        beyond = torch.as_strided(gate_up_scales, (64,), (1,), end)
        factor = torch.where(beyond == 255, math.nan, 1.0).mean().bfloat16()
        return right(x, *rest, gate_up_scales=gate_up_scales, **named) * factor

    said = found(reads_one_row_more).said
    assert said == "NaN or infinity where there is none, in 5 of 5 tokens: reads past the ends of gate_up_scales"


def test_what_is_written_is_named() -> None:
    def writes(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        y = right(x, *rest, **named)
        torch.as_strided(x, (1,), (1,), x.storage_offset() - 1)[:] = 0
        named["down_bias"][0, 0] += 1
        return y

    assert found(writes).said == "writes to or beside x, down_bias"


def test_wrong_numbers_shapes_and_errors_are_told() -> None:
    assert found(lambda *a, **k: 2 * right(*a, **k)).said == (
        "off by 1.0e+00, more than 5e-03, whatever lies beside the buffers"
    )
    assert found(lambda *a, **k: right(*a, **k)[:3]).said.startswith(
        "returns torch.bfloat16 [3, 64] where bfloat16 [5, 64] was expected"
    )

    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such size\nand more")

    assert found(refuses)[1::2] == (False, "raises RuntimeError: no such size")


def test_a_nan_that_is_missing_is_told() -> None:
    (case,) = (case for case in cases() if case.name == "scale byte 255")
    finding = found(lambda *a, **k: right(*a, **k).nan_to_num(), case)
    assert finding.said.startswith("finite where NaN should be, in ")


@pytest.mark.slow
def test_the_command_prints_a_table_and_fails_if_anything_is_found(tmp_path: Path) -> None:
    (tmp_path / "ones.py").write_text("import jax.numpy as jnp\nlayer = lambda x, *_, **__: jnp.ones_like(x)\n")
    command = [sys.executable, "-m", "jmoe.conformance", "jmoe.conformance:layer", "--only", "one token"]
    good = subprocess.run(command, capture_output=True, text=True)
    assert (good.returncode, good.stdout.count(" ok ")) == (0, 1), good.stderr
    bad = subprocess.run([*command, f"{tmp_path}/ones.py:layer"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout.count("FAIL")) == (1, 1), bad.stderr
    unknown = subprocess.run([*command[:3], "nowhere:layer"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "No module named 'nowhere'" in unknown.stderr
