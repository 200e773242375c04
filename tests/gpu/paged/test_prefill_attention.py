"""Attention of chunks of prompts to pages on a GPU, beside float64 and XLA's operations in float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops.launch.local_gpu import Trial, gpu_of, local_gpu
from jmoe.ops.paged.prefill_attention import paged_prefill_attention
from tests.gpu.paged.on_gpu import SIZES, check
from tests.paged_cases import Sizes, prefill_case
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(
    ("lengths", "first", "tokens"),
    [
        ([1], [0], 1),
        ([64], [0], 64),
        ([256] * 4, [0] * 4, 1024),
        ([1, 0, 63, 65, 200, 0, 17], [0, 0, 100, 64, 4800, 3, 127], 400),
        ([1500, 300], [0, 2500], 2048),
    ],
)
def test_a_token_sees_its_own_sequence_up_to_itself(
    lengths: list[int], first: list[int], tokens: int, window: int | None
) -> None:
    """Everything else is NaN: other pages, tokens behind the window, padding."""
    longest = max(a + b for a, b in zip(lengths, first, strict=True))
    columns = -(-longest // 64) if window is None else -(-(window + max(lengths)) // 64) + 1
    case = prefill_case(len(lengths), lengths, first, tokens, window, columns, SIZES, narrow=True)
    check(paged_prefill_attention, case, window)


@pytest.mark.parametrize("window", [None, 50])
def test_other_sizes_of_heads_and_pages(window: int | None) -> None:
    case = prefill_case(6, [40, 0, 30], [9, 1, 50], 99, window, 7, Sizes(6, 2, 32, 16), narrow=True)
    check(paged_prefill_attention, case, window)


@pytest.mark.parametrize(("block_m", "block_s", "num_warps"), [(64, 64, 4), (128, 32, 8), (256, 64, 8)])
def test_other_launch_parameters_give_the_same(block_m: int, block_s: int, num_warps: int) -> None:
    table = gpu_of(None).table
    tile = dataclasses.replace(table.paged_prefill_attention[-1], block_m=block_m, block_s=block_s, num_warps=num_warps)
    capability, device = local_gpu()
    target = Trial(f"sm_{capability}", device, table=table.over({"paged_prefill_attention": (tile,)}))
    case = prefill_case(7, [100, 300], [64, 10], 400, 128, 8, SIZES, narrow=True)
    operands = {name: jnp.asarray(array) for name, array in case.operands.items()}
    operands |= {name: operands[name].astype(jnp.bfloat16) for name in ("heads", "cache", "sinks")}
    attended, _ = paged_prefill_attention(**operands, window=128, target=target)
    error = np.linalg.norm(np.asarray(attended, np.float64) - case.wanted)
    assert error <= BFLOAT16.relative * np.linalg.norm(case.wanted)
