"""LoRA's first product, in Triton's interpreter, beside torch in float64."""

import pytest
import torch
from torch import Tensor

from tests.tolerances import FLOAT32
from tests.torch_layers import relative_error
from tests.triton_src.launched_layer import LaunchedLayer, launched_layer

pytestmark = pytest.mark.interpret

ROWS = {
    "gate_up_shrunk": lambda on: (on.layer.x.detach().double()[on.token], on.lora("gate_up_a")),
    "down_shrunk": lambda on: (on["activations"], on.lora("down_a")),
    "gate_up_grad_shrunk": lambda on: (on["pre_activations_grad"], on.lora("gate_up_b").mT),
    "down_grad_shrunk": lambda on: (on["dy"][on.token], on.lora("down_b").mT),
}
"""What goes into each shrink: rows [P, K] and matrices [P, R, K]."""


@pytest.mark.parametrize("name", ROWS)
def test_rows_through_their_adapters_matrix_by_its_scale(name: str) -> None:
    on: LaunchedLayer = launched_layer()
    rows: Tensor
    rows, matrix = ROWS[name](on)
    scale = on.lora(f"{name.removesuffix('_shrunk').removesuffix('_grad')}_scale")
    want = scale[:, None] * torch.einsum("pk,prk->pr", rows, matrix)
    assert relative_error(on.shrunk(name), want) <= FLOAT32.relative
    assert not on[name][:, on.adapter < 0].any()
