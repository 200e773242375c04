"""Attention of a chunk of prompts to pages by the kernels, in Triton's interpreter, beside float64."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import LaunchTable
from tests.paged_cases import Sizes, prefill_case
from tests.triton_src.paged.interpreted import check, run

pytestmark = pytest.mark.interpret

PREFILL = "paged_prefill_attention"
SMALL = Sizes(heads=4, key_heads=2, dim=16, page=16)


def table(**fields: int) -> LaunchTable:
    own = own_table(90)
    return own.over({PREFILL: (dataclasses.replace(own.paged_prefill_attention[-1], **fields),)})


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    padding=st.integers(0, 40),
    window=st.sampled_from([None, 1, 20, 33]),
    heads=st.sampled_from([(4, 2), (3, 3), (6, 2)]),
    block_m=st.sampled_from([16, 64]),
)
def test_a_token_sees_its_own_sequence_up_to_itself(
    seed: int, lengths: list[int], padding: int, window: int | None, heads: tuple[int, int], block_m: int
) -> None:
    """With blocks of queries shorter and longer than sequences."""
    first = np.random.default_rng(seed).integers(0, 60, len(lengths)).tolist()
    columns = 7 if window is None else 6
    sizes = SMALL._replace(heads=heads[0], key_heads=heads[1])
    tokens = max(1, sum(lengths) + padding)
    case = prefill_case(seed, lengths, first, tokens, window, columns, sizes, narrow=True)
    check(PREFILL, case, table(block_m=block_m), window)


@pytest.mark.parametrize("window", [None, 128])
def test_at_the_models_sizes(window: int | None) -> None:
    case = prefill_case(1, [3, 18], [140, 0], 24, window, 4, Sizes(64, 8, 64, 64), narrow=True)
    check(PREFILL, case, own_table(90), window)


def test_padding_is_zeros() -> None:
    case = prefill_case(2, [5, 0], [0, 9], 40, None, 4, SMALL, narrow=True)
    attended, _ = run(PREFILL, case, table(block_m=16), None)
    assert not attended[5:].any()


def test_a_sink_may_be_minus_infinity() -> None:
    """As good as none."""
    case = prefill_case(3, [20], [4], 20, 8, 4, SMALL, narrow=True)
    case.operands["sinks"][:] = -np.inf
    attended, _ = run(PREFILL, case, table(block_m=16), 8)
    case.operands["sinks"][:] = -1e4
    low, _ = run(PREFILL, case, table(block_m=16), 8)
    assert np.isfinite(attended).all()
    assert np.array_equal(attended, low)
