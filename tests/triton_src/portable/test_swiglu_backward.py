"""SwiGLU's gradient by rows, in Triton's interpreter, beside torch's in float64."""

import pytest
import torch

from tests.tolerances import BFLOAT16
from tests.torch_layers import relative_error
from tests.triton_src.launched_layer import launched_layer

pytestmark = pytest.mark.interpret


def test_what_goes_back_to_pre_activations_and_to_the_gate_weight() -> None:
    on = launched_layer()
    z = on["pre_activations"].requires_grad_()
    gate, up = z[:, 0::2].clamp(max=7), z[:, 1::2].clamp(-7, 7)
    activation = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    activation.backward(on.gate * on["down_dgrad"])
    activation = activation.detach()
    assert relative_error(on["pre_activations_grad"], z.grad) <= BFLOAT16.relative
    assert relative_error(on["weighted_activations"], on.gate * activation) <= BFLOAT16.relative
    want = (activation * on["down_dgrad"]).sum(1) + (on["dy"][on.token] * on.bias("down")).sum(1)
    torch.testing.assert_close(on["pair_gates_grad"][on.pair], want, rtol=1e-5, atol=1e-5)
