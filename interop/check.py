"""What jmoe.interop.moe refuses, before any launch: the kernels trust shapes, and would read past a tensor's end."""

from collections.abc import Mapping

import torch

from jmoe.triton_src.plan import cdiv
from jmoe.triton_src.problem import Layout

ALIGNMENT = 16
"""Bytes. jax-triton compiles for buffers so aligned; Triton's own launcher looks at each pointer and would compile
another kernel for one that is not."""

FLOATS = (torch.bfloat16, torch.float32)
RANKS = {"x": 2, "gate_up": 3, "down": 3, "gate_up_a": 4, "down_a": 4}
"""Of the tensors that the sizes of all others are read from; MXFP4 blocks have one axis more."""


def check_buffers(
    buffers: dict[str, torch.Tensor], layouts: Mapping[str, Layout], top_k: int, intermediate: int
) -> None:
    """Raises ValueError unless the kernels can read every tensor as it lies, and their shapes and dtypes agree."""
    device = buffers["x"].device
    for name, tensor in buffers.items():
        check_memory(name, tensor, device)
        rank = RANKS.get(name, tensor.ndim) + (f"{name}_scales" in buffers)
        if tensor.ndim != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {tuple(tensor.shape)}")
    wanted = wanted_buffers(buffers, layouts, top_k, intermediate)
    for name, tensor in buffers.items():
        shape, dtypes = wanted[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be {names}, got {tensor.dtype}")
    columns = wanted["router_logits"][0][1] if "router_logits" in buffers else top_k
    if not 1 <= top_k <= columns:
        raise ValueError(f"top_k must be between 1 and the number of experts ({columns}), got {top_k}")
    check_adapters(buffers)


def wanted_buffers(
    buffers: dict[str, torch.Tensor], layouts: Mapping[str, Layout], top_k: int, intermediate: int
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shape and dtypes that each buffer must have, by the sizes of x, gate_up and the first A.

    Both weights must be packed or neither, as gate_up is.
    """
    tokens, hidden = buffers["x"].shape
    experts, double = buffers["gate_up"].shape[0], 2 * intermediate
    packed = layouts["gate_up"] is Layout.PACKED
    logits = buffers.get("router_logits")
    # A shard holds fewer experts than the router knows.
    columns = max(experts, logits.shape[1]) if logits is not None and logits.ndim == 2 else experts
    adapters = next((buffers[name].shape[0] for name in ("gate_up_a", "down_a") if name in buffers), 0)
    ints, floats32 = (torch.int32,), (torch.float32,)
    wanted = {
        "x": ((tokens, hidden), (torch.bfloat16,)),
        "router_logits": ((tokens, columns), FLOATS),
        "choice_bias": ((columns,), FLOATS),
        "experts": ((tokens, top_k), ints),
        "weights": ((tokens, top_k), floats32),
        "adapter_ids": ((tokens,), ints),
        "expert_offset": ((1,), ints),
    }
    for name, n, k in (("gate_up", double, hidden), ("down", hidden, double // 2)):
        mxfp4 = layouts[name] is not Layout.DENSE
        rank = buffers[f"{name}_a"].shape[2] if f"{name}_a" in buffers else 0
        wanted |= {
            name: ((experts, n, k // 32, 16), (torch.uint8,)) if mxfp4 else ((experts, n, k), (torch.bfloat16,)),
            f"{name}_scales": ((experts, n, k // 32), (torch.uint8,)),
        }
        if packed:
            tiles = (experts, cdiv(n, 64), cdiv(k, 64))
            wanted |= {name: ((*tiles, 512), ints), f"{name}_scales": ((*tiles, 32), ints)}
        wanted |= {
            f"{name}_bias": ((experts, n), FLOATS),
            f"{name}_a": ((adapters, experts, rank, k), FLOATS),
            f"{name}_b": ((adapters, experts, n, rank), FLOATS),
            f"{name}_scale": ((adapters,), floats32),
        }
        if mxfp4 and k % 32:
            raise ValueError(f"{name} must have an inner size that is a multiple of 32 for MXFP4, x or I gives {k}")
    return wanted


def check_adapters(buffers: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless there is an adapter for every token to name, or one for all."""
    counts = [buffers[name].shape[0] for name in ("gate_up_scale", "down_scale") if name in buffers]
    if counts and counts[0] != 1 and "adapter_ids" not in buffers:
        raise ValueError(f"adapter_ids must be given with {counts[0]} adapters, got None")
    for name in ("gate_up_a", "down_a"):
        if name in buffers and 0 in (buffers[name].shape[0], buffers[name].shape[2]):
            shape = tuple(buffers[name].shape)
            raise ValueError(f"{name} must hold at least one adapter of rank 1 or more, got shape {shape}")
    if not counts and "adapter_ids" in buffers:
        raise ValueError("adapter_ids were given without lora: there is no adapter they could name")


def check_memory(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raises ValueError unless it is a tensor on this device, contiguous and aligned."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like x, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
    if tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} must be aligned to {ALIGNMENT} bytes, got address {tensor.data_ptr():#x}")
