"""The sum over a token's experts, in Triton's interpreter, beside torch in float64."""

import pytest

from tests.tolerances import BFLOAT16
from tests.torch_layers import relative_error
from tests.triton_src.launched_layer import TOP_K, launched_layer

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(("source", "out"), [("pair_out", "y"), ("pair_dx", "x_grad")])
def test_a_tokens_pairs_are_summed(source: str, out: str) -> None:
    on = launched_layer()
    want = on[source].unflatten(0, (-1, TOP_K)).sum(1)
    assert relative_error(on[out], want) <= BFLOAT16.relative
