"""The router's gradient, in Triton's interpreter, beside torch's in float64."""

import pytest
import torch

from tests.tolerances import BFLOAT16
from tests.torch_layers import relative_error
from tests.triton_src.launched_layer import TOP_K, launched_layer

pytestmark = pytest.mark.interpret


def test_the_softmax_of_the_chosen_logits_is_differentiated() -> None:
    on = launched_layer()
    logits = on.layer.router_logits.detach().double().requires_grad_()
    chosen = torch.gather(logits, 1, on.buffers["experts"].long())
    torch.softmax(chosen, 1).backward(on["pair_gates_grad"].unflatten(0, (-1, TOP_K)))
    assert relative_error(on["router_logits_grad"], logits.grad) <= BFLOAT16.relative
    assert int((on["router_logits_grad"] != 0).sum(1).max()) == TOP_K
