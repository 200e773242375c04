"""Attention of one query a sequence to pages: compiled for the architectures it declares, and by XLA without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops.decode.cached_attention import cached_attention
from jmoe.ops.paged.decode_attention import paged_decode_attention
from jmoe.ops.target import Target
from tests.ops.decode.lowered import ARCHITECTURES, INDEX, bf16, lowered
from tests.paged_cases import Sizes, decode_case
from tests.tolerances import FLOAT32

SIZES = Sizes()
attend = jax.jit(paged_decode_attention, static_argnames="window")


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("batch", "window", "columns"), [(1, None, 2048), (16, 128, 5), (64, None, 64)])
def test_it_compiles_and_writes_the_cache_in_place(
    architecture: str, batch: int, window: int | None, columns: int
) -> None:
    factors = jax.ShapeDtypeStruct((batch, 32), jnp.float32)
    call = lambda *arrays: paged_decode_attention(*arrays, window=window, target=Target(architecture))  # noqa: E731
    cache = bf16(12, 1000, 8, 64, 128)
    rest = ints(batch), ints(batch, columns), bf16(24, 64), INDEX
    program = lowered(call, bf16(batch, 80, 64), factors, factors, cache, INDEX, *rest)
    calls = [line for line in program.splitlines() if "@triton_kernel_call_ffi" in line]
    # The parts of few sequences' keys are merged. The cache is the fourth operand, and the last result.
    split = batch == 1
    assert len(calls) == 1 + split
    alias = f"output_operand_alias<output_tuple_indices = [{3 if split else 1}], operand_index = 3, "
    assert [alias in line for line in calls] == [True, *[False] * split]


def test_pages_must_be_what_a_product_takes() -> None:
    factors, call = jax.ShapeDtypeStruct((2, 32), jnp.float32), paged_decode_attention
    rest = ints(2), ints(2, 4), bf16(24, 64), INDEX
    operands = bf16(2, 80, 64), factors, factors, bf16(12, 9, 8, 24, 128), INDEX, *rest
    with pytest.raises(NotImplementedError, match="pages of a power of two of at least 16 tokens, got 24"):
        lowered(lambda *arrays: call(*arrays, window=None, target=Target("sm_90")), *operands)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    positions=st.lists(st.integers(-1, 60), min_size=4, max_size=4),
    window=st.sampled_from([None, 1, 20]),
)
def test_elsewhere_a_sequence_sees_its_own_tokens_alone(seed: int, positions: list[int], window: int | None) -> None:
    columns = 4 if window is None else 3
    case = decode_case(seed, positions, window, columns, SIZES)
    got, kept = attend(**{name: jnp.asarray(array) for name, array in case.operands.items()}, window=window)
    np.testing.assert_allclose(got, case.wanted, rtol=FLOAT32.relative, atol=FLOAT32.relative)
    np.testing.assert_allclose(kept, case.written, rtol=1e-6, atol=1e-6)


def test_elsewhere_pages_are_as_good_as_slots() -> None:
    """The same terms in the same order as of a cache that is a sequence's own."""
    case = decode_case(0, [3, 17, 63], None, 4, SIZES)
    operands = {name: jnp.asarray(array) for name, array in case.operands.items()}
    got, _ = attend(**operands, window=None)
    pages = operands.pop("pages")
    # [L, B, P, M, page, 2 D] -> [L, B, M, P * page, 2 D]; what is not held is not read there but multiplied by zero.
    slots = jnp.nan_to_num(jnp.moveaxis(operands["cache"][:, pages], 3, 2))
    operands["cache"] = slots.reshape(*slots.shape[:3], -1, slots.shape[-1])
    want, _ = cached_attention(**operands)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_elsewhere_other_rows_change_no_bit_of_a_row() -> None:
    case = decode_case(4, [3, 39, 55, 0], None, 4, SIZES)
    operands = {name: jnp.asarray(array) for name, array in case.operands.items()}
    want, _ = attend(**operands, window=None)
    others = jnp.array([True, False, True, True])
    operands["heads"] = jnp.where(others[:, None, None], jnp.nan, operands["heads"])
    operands["position"] = jnp.array([-1, 39, 2, -1], jnp.int32)
    got, _ = attend(**operands, window=None)
    assert jnp.array_equal(got[1], want[1])
