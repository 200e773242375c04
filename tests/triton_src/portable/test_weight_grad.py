"""Gradients that are sums over an expert's rows, in Triton's interpreter, beside torch in float64."""

import pytest
import torch

from tests.tolerances import BFLOAT16
from tests.torch_layers import relative_error
from tests.triton_src.launched_layer import ADAPTERS, EXPERTS, LaunchedLayer, launched_layer

pytestmark = pytest.mark.interpret

ROWS = {
    "gate_up_a": lambda on: (on.shrunk("gate_up_grad_shrunk"), on.layer.x.detach().double()[on.token]),
    "gate_up_b": lambda on: (on["pre_activations_grad"], on.shrunk("gate_up_shrunk_again")),
    "down_a": lambda on: (on.shrunk("down_grad_shrunk"), on["weighted_activations"]),
    "down_b": lambda on: (on["dy"][on.token], on.shrunk("down_shrunk_again")),
}
"""Whose products, [P, M] by [P, N], are summed into each gradient."""


@pytest.mark.parametrize("name", ROWS)
def test_lora_sums_over_the_rows_of_its_adapter_and_expert(name: str) -> None:
    on: LaunchedLayer = launched_layer()
    left, right = ROWS[name](on)
    want = torch.zeros(ADAPTERS, EXPERTS, left.shape[1], right.shape[1], dtype=torch.float64)
    for p, (adapter, expert) in enumerate(zip(on.adapter, on.expert, strict=True)):
        if adapter >= 0:
            want[adapter, expert] += left[p, :, None] * right[p]
    assert relative_error(on[f"{name}_grad"], want) <= BFLOAT16.relative


def test_biases_sum_over_the_rows_of_their_expert() -> None:
    on = launched_layer()
    rows = {"gate_up": on["pre_activations_grad"], "down": on.gate * on["dy"][on.token]}
    for projection, of in rows.items():
        want = torch.zeros(EXPERTS, of.shape[1], dtype=torch.float64).index_add_(0, on.expert, of)
        assert relative_error(on[f"{projection}_bias_grad"], want) <= BFLOAT16.relative
