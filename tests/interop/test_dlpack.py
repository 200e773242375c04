"""The bridge between JAX and torch: one buffer, two owners, no silent copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jmoe.interop.dlpack import DTYPES, to_jax, to_torch

PAIRS = [pytest.param(t, j, id=str(j)) for t, j in DTYPES.items()]


@pytest.mark.parametrize(("torch_dtype", "jax_dtype"), PAIRS)
def test_to_torch_shares_memory(torch_dtype: torch.dtype, jax_dtype: jnp.dtype) -> None:
    array = jnp.arange(24).reshape(2, 3, 4).astype(jax_dtype)
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert tensor.dtype == torch_dtype
    assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize(("torch_dtype", "jax_dtype"), PAIRS)
def test_to_jax_shares_memory(torch_dtype: torch.dtype, jax_dtype: jnp.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(torch_dtype)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert array.dtype == jax_dtype
    assert array.tolist() == tensor.tolist()


@given(st.lists(st.integers(0, 5), max_size=4))
def test_any_shape_survives_both_ways(shape: list[int]) -> None:
    array = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.int32).reshape(shape)
    tensor = to_torch(array)
    assert tuple(tensor.shape) == array.shape
    assert jnp.array_equal(to_jax(tensor), array)


def test_memory_outlives_the_other_owner() -> None:
    tensor = to_torch(jnp.arange(1000, dtype=jnp.int32) + 1)
    assert int(tensor.sum()) == 500500
    array = to_jax(torch.arange(1000, dtype=torch.int32) + 1)
    assert int(array.sum()) == 500500


def test_tensors_that_jax_could_not_take_as_they_are() -> None:
    whole = torch.zeros(64, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight must be aligned to 64 bytes, got address 0x"):
        to_jax(whole[1:], "weight")
    with pytest.raises(ValueError, match=r"weight must be contiguous, got shape \(3, 2\) with strides \(1, 3\)"):
        to_jax(torch.zeros(2, 3).T, "weight")
    with pytest.raises(ValueError, match=r"x must be contiguous, got shape \(4, 2\) with strides \(4, 1\)"):
        to_jax(torch.zeros(4, 4)[:, :2], "x")
    with pytest.raises(ValueError, match=r"x must not require a gradient: pass x.detach\(\)"):
        to_jax(torch.zeros(4, requires_grad=True), "x")
    with pytest.raises(ValueError, match=r"x must be dense, got layout torch.sparse_coo"):
        to_jax(torch.zeros(4).to_sparse(), "x")
    with pytest.raises(ValueError, match=r"x must be bfloat16, uint8, int32 or float32, got torch.float16"):
        to_jax(torch.zeros(4, dtype=torch.float16), "x")
    with pytest.raises(ValueError, match=r"x must be on a CPU or a CUDA device, got meta"):
        to_jax(torch.zeros(4, device="meta"), "x")


def test_arrays_that_torch_could_not_take_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"x must be bfloat16, uint8, int32 or float32, got float16"):
        to_torch(jnp.zeros(4, jnp.float16), "x")
    with pytest.raises(ValueError, match=r"x must be a concrete array, got the tracer float32\[4\]"):
        jax.jit(lambda x: to_torch(x, "x"))(jnp.zeros(4))
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(jnp.zeros(4), jax.NamedSharding(mesh, jax.P("d")))
    with pytest.raises(ValueError, match=r"x must lie on one device, got 2: NamedSharding"):
        to_torch(sharded, "x")


@pytest.mark.gpu
def test_a_read_in_torch_waits_for_jax() -> None:
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, y: y @ x / 4096, x))
    ones = jnp.ones((4096, 4096), jnp.float32)
    slow(ones).block_until_ready()
    tensor = to_torch(slow(ones))  # still running
    assert float(tensor.min()) == float(tensor.max()) == 1.0


@pytest.mark.gpu
def test_a_read_in_jax_waits_for_torch() -> None:
    x = torch.ones(4096, 4096, device="cuda")
    y = torch.full_like(x, 5.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(60):
            x = x @ x / 4096
        y.copy_(x)
        array = to_jax(y)  # still running, on a stream that JAX does not know
    assert float(array.min()) == float(array.max()) == 1.0
