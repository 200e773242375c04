"""jmoe's own functions on a GPU by the suite that others' are tried by."""

import pytest
import torch

from jmoe import conformance

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["layer", "packed_layer", "torch_layer"])
def test_every_case_passes(name: str) -> None:
    from jmoe.interop.conformance import try_all

    if name == "packed_layer" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels for packed weights need compute capability 9.0")
    arrays = "torch" if name == "torch_layer" else "jax"
    findings = list(try_all(getattr(conformance, name), arrays, torch.device("cuda"), lambda case: True))
    assert all(finding.passed for finding in findings), findings
