"""The bridge between JAX and torch: one buffer, two owners, no silent copy."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.layout import Format, Layout

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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match=r"x must be dense, got a nested tensor"):
        to_jax(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "x")
    with pytest.raises(ValueError, match=r"x must be bfloat16, uint8, int32 or float32, got torch.float16"):
        to_jax(torch.zeros(4, dtype=torch.float16), "x")
    with pytest.raises(ValueError, match=r"x must be on a CPU or a CUDA device, got meta"):
        to_jax(torch.zeros(4, device="meta"), "x")
    with pytest.raises(ValueError, match=r"x must hold its own values, got a negated view: pass x.resolve_neg\(\)"):
        to_jax(torch.ones(1, dtype=torch.complex64).conj().imag, "x")
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"x must hold memory, got a Tensor at address 0"):
        to_jax(freed, "x")
    with pytest.raises(ValueError, match=r"x must be a torch.Tensor, got ndarray"):
        to_jax(np.zeros(4), "x")


def test_arrays_that_torch_could_not_take_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"x must be bfloat16, uint8, int32 or float32, got float16"):
        to_torch(jnp.zeros(4, jnp.float16), "x")
    with pytest.raises(ValueError, match=r"x must be a concrete array, got the tracer float32\[4\]"):
        jax.jit(lambda x: to_torch(x, "x"))(jnp.zeros(4))
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(jnp.zeros(4), jax.NamedSharding(mesh, jax.P("d")))
    with pytest.raises(ValueError, match=r"x must lie on one device, got 2: NamedSharding"):
        to_torch(sharded, "x")
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    columns_first = jax.device_put(jnp.zeros((2, 3)), Format(Layout(major_to_minor=(1, 0)), one_device))
    with pytest.raises(ValueError, match=r"x must be contiguous, got shape \(2, 3\) with strides \(1, 2\)"):
        to_torch(columns_first, "x")
    deleted = jnp.zeros(4)
    deleted.delete()
    with pytest.raises(ValueError, match=r"x must hold memory, got a deleted or donated float32\[4\]"):
        to_torch(deleted, "x")
    with pytest.raises(ValueError, match=r"x must be a jax.Array, got ndarray"):
        to_torch(np.zeros(4), "x")


def test_a_read_in_torch_waits_for_jax_on_a_cpu() -> None:
    run = slow_computation(size=512, steps=100)
    array = run(jnp.ones((512, 512)))
    running = not array.is_ready()
    tensor = to_torch(array)
    assert (running, *extremes(tensor)) == (True, 2.0, 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("side_stream", [False, True])
def test_a_read_in_torch_waits_for_jax(side_stream: bool) -> None:
    run = slow_computation(size=4096, steps=300)
    with torch.cuda.stream(torch.cuda.Stream()) if side_stream else contextlib.nullcontext():
        extremes(to_torch(jnp.zeros((4096, 4096))))  # loads torch's kernels: that may wait for the device
        array = run(jnp.ones((4096, 4096)))
        tensor = to_torch(array)
        running = not array.is_ready()
        assert (running, *extremes(tensor)) == (True, 2.0, 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("side_stream", [False, True])
def test_a_read_in_jax_waits_for_torch(side_stream: bool) -> None:
    jax_extremes = jax.jit(lambda y: (y.min(), y.max()))
    x = torch.ones(4096, 4096, device="cuda")
    y = torch.full_like(x, 5.0)
    jax_extremes(to_jax(x @ x))  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) if side_stream else contextlib.nullcontext():
        for _ in range(300):
            x = x @ x / 4096
        y.copy_(x)
        array = to_jax(y)
        running = not torch.cuda.current_stream().query()
        low, high = jax_extremes(array)
    assert (running, float(low), float(high)) == (True, 1.0, 1.0)


@pytest.mark.gpu
def test_a_tensor_of_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensor = torch.arange(24, dtype=torch.int32, device="cuda:1")
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_torch(array).device == tensor.device
    assert array.tolist() == tensor.tolist()


def slow_computation(size: int, steps: int) -> jax.stages.Compiled:
    """Maps ones to twos, compiled and run once on zeros.

    The twos come with the last step: who reads earlier finds zeros or ones, in recycled memory too.
    """

    def run(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda _, y: y @ x / size, x) + 1

    compiled = jax.jit(run).lower(jax.ShapeDtypeStruct((size, size), jnp.float32)).compile()
    compiled(jnp.zeros((size, size))).block_until_ready()
    return compiled


def extremes(tensor: torch.Tensor) -> tuple[float, float]:
    """The least and the greatest value."""
    return float(tensor.min()), float(tensor.max())
