"""Attention of one query a sequence to pages by the kernels, in Triton's interpreter, beside float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.triton_src.paged.plans import plan_paged
from jmoe.triton_src.tile_tables import own_table
from tests.paged_cases import LAYER, Sizes, decode_case
from tests.tolerances import BFLOAT16
from tests.triton_src.paged.interpreted import check, plans_of, run, tensors

pytestmark = pytest.mark.interpret

DECODE = "paged_decode_attention"
TABLE = own_table(90)
SMALL = Sizes(heads=4, key_heads=2, dim=16, page=16)


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**16),
    positions=st.lists(st.integers(-1, 150), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 20, 33]),
    heads=st.sampled_from([(4, 2), (3, 3), (6, 2)]),
)
def test_a_sequence_sees_its_own_tokens_alone(
    seed: int, positions: list[int], window: int | None, heads: tuple[int, int]
) -> None:
    columns = 10 if window is None else 4
    sizes = SMALL._replace(heads=heads[0], key_heads=heads[1])
    case = decode_case(seed, positions, window, columns, sizes, narrow=True)
    check(DECODE, case, TABLE, window)


@pytest.mark.parametrize("window", [None, 128])
def test_at_the_models_sizes(window: int | None) -> None:
    case = decode_case(1, [300, 64], window, 8, Sizes(64, 8, 64, 64), narrow=True)
    check(DECODE, case, TABLE, window)


def test_parts_without_keys_and_rows_without_sequences_are_zeros() -> None:
    """As many parts as the longest sequence that the table allows would have."""
    case = decode_case(2, [0, -1, 40], None, 64, SMALL, narrow=True)
    assert plans_of(DECODE, case, TABLE, None)[0].grid[1] > 8
    check(DECODE, case, TABLE, None)
    attended, _ = run(DECODE, case, TABLE, None)
    assert not attended[1].any()


def test_pages_beyond_2_to_the_31_numbers_are_found() -> None:
    """Of such a cache the system gives memory for what is written alone."""
    case = decode_case(4, [20], None, 1, Sizes(64, 8, 64, 64), narrow=True)
    buffers = tensors(case)
    far = 2**31 // buffers["cache"][0, 0].numel()
    buffers["cache"] = torch.empty((1, far + 1, *buffers["cache"].shape[2:]), dtype=torch.bfloat16)
    page = int(case.operands["pages"][0, 0])
    buffers["cache"][0, far] = tensors(case)["cache"][LAYER, page]
    buffers |= {"layer": torch.zeros(1, dtype=torch.int32), "pages": torch.full((1, 1), far, dtype=torch.int32)}
    sizes = {"rows": 1, "heads": 64, "window": None}
    with bfloat16_arithmetic():
        got = launch(plan_paged(DECODE, TABLE, tuple(buffers["cache"].shape), 1, **sizes), buffers)
    attended = got["attended"].float().numpy()
    assert np.linalg.norm(attended - case.wanted) <= BFLOAT16.relative * np.linalg.norm(case.wanted)
    written = got["cache"][0, far].float().numpy()
    np.testing.assert_allclose(written, case.written[LAYER, page], rtol=2**-7, atol=1e-3)
