"""The gradient through the experts' products, in Triton's interpreter, beside torch in float64."""

import pytest
import torch

from tests.tolerances import BFLOAT16
from tests.torch_layers import relative_error
from tests.triton_src.launched_layer import launched_layer

pytestmark = pytest.mark.interpret


def test_through_down_of_each_position_before_its_weight() -> None:
    on = launched_layer()
    want = torch.einsum("pn,pnk->pk", on["dy"][on.token], on.weight("down"))
    want += torch.einsum("pr,prk->pk", on.shrunk("down_grad_shrunk"), on.lora("down_a"))
    assert relative_error(on["down_dgrad"], want) <= BFLOAT16.relative


def test_through_gate_up_of_each_pair() -> None:
    on = launched_layer()
    want = torch.einsum("pn,pnk->pk", on["pre_activations_grad"], on.weight("gate_up"))
    want += torch.einsum("pr,prk->pk", on.shrunk("gate_up_grad_shrunk"), on.lora("gate_up_a"))
    assert relative_error(on["pair_dx"][on.pair], want) <= BFLOAT16.relative
