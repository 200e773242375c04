"""Attention of one query a sequence to pages on a GPU, beside float64 and XLA's operations in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops.paged.decode_attention import paged_decode_attention
from tests.gpu.paged.on_gpu import SIZES, check
from tests.paged_cases import Sizes, decode_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(
    "positions", [[0], [4999], [-1, 0, 1, 62, 63, 64, 127, 128, 129, 255, 300, 1000, 2047, -1, 4000, 4999], [77] * 64]
)
def test_a_sequence_sees_its_own_tokens_alone(positions: list[int], window: int | None) -> None:
    """Everything else is NaN: other pages, tokens behind the window, tokens to come."""
    columns = 3 if window else max(positions) // 64 + 1
    check(paged_decode_attention, decode_case(len(positions), positions, window, columns, SIZES, narrow=True), window)


def test_a_table_for_lengths_that_no_sequence_has() -> None:
    case = decode_case(5, [3, 500], None, 8, SIZES, narrow=True)
    case.operands["pages"] = np.pad(case.operands["pages"], [(0, 0), (0, 2048 - 8)])
    check(paged_decode_attention, case, None)


def test_other_sizes_of_heads_and_pages() -> None:
    case = decode_case(6, [100, -1, 17], 50, 5, Sizes(heads=6, key_heads=2, dim=32, page=16), narrow=True)
    check(paged_decode_attention, case, 50)


def test_rows_without_sequences_are_zeros() -> None:
    case = decode_case(7, [-1, 100, -1], None, 64, SIZES, narrow=True)
    operands = {name: jnp.asarray(array) for name, array in case.operands.items()}
    operands |= {name: operands[name].astype(jnp.bfloat16) for name in ("heads", "cache", "sinks")}
    attended, _ = paged_decode_attention(**operands, window=None)
    assert not attended[::2].any()
