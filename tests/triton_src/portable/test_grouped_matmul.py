"""The experts' products, in Triton's interpreter, beside torch in float64."""

import pytest
import torch

from tests.tolerances import BFLOAT16
from tests.torch_layers import relative_error
from tests.triton_src.launched_layer import launched_layer

pytestmark = pytest.mark.interpret


def test_gate_up_of_each_position() -> None:
    on = launched_layer()
    want = torch.einsum("pk,pnk->pn", on.layer.x.detach().double()[on.token], on.weight("gate_up"))
    want += on.bias("gate_up") + torch.einsum("pr,pnr->pn", on.shrunk("gate_up_shrunk"), on.lora("gate_up_b"))
    assert relative_error(on["pre_activations"], want) <= BFLOAT16.relative


def test_down_of_each_pair_by_its_weight() -> None:
    on = launched_layer()
    want = torch.einsum("pk,pnk->pn", on["activations"], on.weight("down"))
    want += on.bias("down") + torch.einsum("pr,pnr->pn", on.shrunk("down_shrunk"), on.lora("down_b"))
    assert relative_error(on["pair_out"][on.pair], on.gate * want) <= BFLOAT16.relative
