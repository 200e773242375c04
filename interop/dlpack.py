"""JAX arrays as torch tensors and back, without a copy.

Both frameworks then own one buffer. JAX takes its arrays for immutable: write to such a tensor only if no JAX
computation will read the array again. On a GPU a read waits for what was queued before the exchange, but to free memory
neither framework waits for the other's reads: keep what you exchanged until they are done.
"""

import jax
import jax.numpy as jnp
import torch

ALIGNMENT = {"cpu": 64, "cuda": 16}
"""Bytes. On a CPU what XLA demands of a buffer that it takes over; on a GPU what the kernels are compiled for."""

DTYPES = {
    torch.bfloat16: jnp.dtype("bfloat16"),
    torch.uint8: jnp.dtype("uint8"),
    torch.int32: jnp.dtype("int32"),
    torch.float32: jnp.dtype("float32"),
}
SUPPORTED = "bfloat16, uint8, int32 or float32"


def to_torch(array: jax.Array, name: str = "array") -> torch.Tensor:
    """The same memory as a torch tensor, readable on torch's current stream.

    It does not wait for the array. If that fails to be computed, for want of memory say, jaxlib ends the process on a
    GPU: array.block_until_ready() before would raise instead.

    Raises:
      ValueError: the array is not a jax.Array, traced or deleted, lies on several devices or not row by row, or has a
        dtype other than bfloat16, uint8, int32 or float32; the text calls it `name`.
    """
    if not isinstance(array, jax.Array):
        raise ValueError(f"{name} must be a jax.Array, got {type(array).__name__}")
    if isinstance(array, jax.core.Tracer):
        raise ValueError(f"{name} must be a concrete array, got the tracer {array.aval}")
    if array.is_deleted():
        raise ValueError(f"{name} must hold memory, got a deleted or donated {array.aval}")
    if len(array.devices()) > 1:
        raise ValueError(f"{name} must lie on one device, got {len(array.devices())}: {array.sharding}")
    if array.dtype not in DTYPES.values():
        raise ValueError(f"{name} must be {SUPPORTED}, got {array.dtype}")
    tensor = torch.from_dlpack(array, copy=False)
    check_memory(tensor, name)
    if array.size and tensor.data_ptr() != array.unsafe_buffer_pointer():
        raise ValueError(f"{name} would have been copied on its way to torch: {array.sharding}, {array.dtype}")
    return tensor


def to_jax(tensor: torch.Tensor, name: str = "tensor") -> jax.Array:
    """The same memory as a JAX array, read after what torch's current stream has queued.

    Raises:
      ValueError: the tensor is not a torch.Tensor, requires a gradient, is not dense, contiguous and aligned (16 bytes
        on a GPU, 64 on a CPU), is on another kind of device, or has a dtype other than bfloat16, uint8, int32 or
        float32; the text calls it `name`.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: pass {name}.detach()")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"{name} must be dense, got {kind}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be {SUPPORTED}, got {tensor.dtype}")
    if tensor.device.type not in ALIGNMENT:
        raise ValueError(f"{name} must be on a CPU or a CUDA device, got {tensor.device}")
    if tensor.is_neg():
        raise ValueError(f"{name} must hold its own values, got a negated view: pass {name}.resolve_neg()")
    check_memory(tensor, name)
    # torch exports a tensor of its current device alone, and takes the stream that must wait from there.
    with torch.cuda.device_of(tensor):
        array = jax.dlpack.from_dlpack(tensor, copy=False)
    if array.size and array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise ValueError(f"{name} would have been copied on its way to JAX: {tensor.device}, {tensor.dtype}")
    return array


def check_memory(tensor: torch.Tensor, name: str) -> None:
    """Raises ValueError unless the tensor's values lie row by row from an aligned address."""
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"{name} must hold memory, got a {type(tensor).__name__} at address 0")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
    alignment = ALIGNMENT[tensor.device.type]
    if tensor.data_ptr() % alignment:
        raise ValueError(f"{name} must be aligned to {alignment} bytes, got address {tensor.data_ptr():#x}")
