"""Programs of one launch that wait for others, on a GPU, where the others seem not to start."""

import numpy as np
import pytest
import torch

from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.problem import MoeProblem
from tests.triton_src.packed.test_on_numpy import SMALL_DECODE, SMALL_GROUPED, in_mma_k_order, layer_of, name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="kernels for packed weights need compute capability 9.0",
    ),
]


def on_gpu(array: np.ndarray) -> torch.Tensor:
    """A copy; numpy's bfloat16 is not torch's."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(array.copy()).cuda()


@pytest.mark.parametrize("problem", [SMALL_DECODE, SMALL_GROUPED], ids=name)
def test_down_does_the_work_of_programs_that_seem_not_to_start(problem: MoeProblem) -> None:
    """The count of those that have started begins so low that down's programs never see them all."""
    from jmoe.interop.launch import launch

    layer, (plan,) = layer_of(problem, plan_moe(problem, 90))
    given = layer.buffers | {"x_in_mma_order": in_mma_k_order(layer.buffers["x"])}

    def run(started: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        buffers = {name: on_gpu(array) for name, array in given.items()}
        buffers["ready_counters"][-1] = started
        out = launch([plan], buffers)
        *signals, now = buffers["ready_counters"].tolist()
        assert now > started
        return out["activations"][: len(layer.pair)], out["pair_out"][layer.pair], signals

    activations, pair_out, signals = run(0)
    of_a_tile = max(signals)
    assert set(signals) <= {0, of_a_tile}
    for _ in range(3):
        own_activations, own_pair_out, own_signals = run(-(2**30))
        assert torch.equal(own_activations.view(torch.int16), activations.view(torch.int16))
        assert torch.equal(own_pair_out.view(torch.int16), pair_out.view(torch.int16))
        assert min(own_signals) >= of_a_tile
        assert max(own_signals) > of_a_tile
