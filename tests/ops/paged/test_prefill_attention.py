"""Attention of a chunk of prompts to pages: compiled for the architectures it declares, and by XLA without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops.paged.prefill_attention import paged_prefill_attention
from jmoe.ops.target import Target
from tests.ops.decode.lowered import ARCHITECTURES, INDEX, bf16, lowered
from tests.paged_cases import Sizes, prefill_case
from tests.tolerances import FLOAT32

SIZES, TOKENS = Sizes(), 240
attend = jax.jit(paged_prefill_attention, static_argnames="window")


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("tokens", "window", "columns"), [(64, None, 2048), (4096, 128, 67)])
def test_it_compiles_and_writes_the_cache_in_place(
    architecture: str, tokens: int, window: int | None, columns: int
) -> None:
    factors = jax.ShapeDtypeStruct((tokens, 32), jnp.float32)
    call = lambda *arrays: paged_prefill_attention(*arrays, window=window, target=Target(architecture))  # noqa: E731
    cache = bf16(12, 1000, 8, 64, 128)
    rest = ints(17), ints(16), ints(16, columns), bf16(24, 64), INDEX
    program = lowered(call, bf16(tokens, 80, 64), factors, factors, cache, INDEX, *rest)
    calls = [line for line in program.splitlines() if "@triton_kernel_call_ffi" in line]
    # What is written is read by the next launch, which has nothing else to write than what it returns.
    alias = "output_operand_alias<output_tuple_indices = [], operand_index = 3, "
    assert [alias in line for line in calls] == [True, False]


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(0, 80), min_size=3, max_size=3),
    first=st.lists(st.integers(0, 90), min_size=3, max_size=3),
    window=st.sampled_from([None, 1, 20]),
)
def test_elsewhere_a_token_sees_its_own_sequence_up_to_itself(
    seed: int, lengths: list[int], first: list[int], window: int | None
) -> None:
    columns = 11 if window is None else 8  # fewer: the first pages' columns come to be those of later ones
    case = prefill_case(seed, lengths, first, TOKENS, window, columns, SIZES)
    got, kept = attend(**{name: jnp.asarray(array) for name, array in case.operands.items()}, window=window)
    np.testing.assert_allclose(got, case.wanted, rtol=FLOAT32.relative, atol=FLOAT32.relative)
    np.testing.assert_allclose(kept, case.written, rtol=1e-6, atol=1e-6)
