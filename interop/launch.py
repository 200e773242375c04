"""Launches plans on torch tensors: on a GPU, or in Triton's interpreter on a CPU."""

import functools
from collections.abc import Mapping, Sequence

import torch
from triton.runtime.interpreter import InterpretedFunction

from jmoe.triton_src.plan import Buffer, Plan
from jmoe.triton_src.tile_tables import own_table, table_for
from jmoe.triton_src.tiles import LaunchTable

INTERPRETER_CAPABILITY = 90
"""The interpreter has no device: it runs the plans for this one."""


def launch(plans: Sequence[Plan], buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs plans in order on the current stream and returns every buffer, given and written, by name."""
    everything = dict(buffers)
    device = next(iter(buffers.values())).device
    for plan in plans:
        plan.check_names()
        outputs = {parameter: allocate(buffer, device) for parameter, buffer in plan.outputs.items()}
        operands = {parameter: None if name is None else everything[name] for parameter, name in plan.operands.items()}
        plan.kernel[plan.grid](
            **operands,
            **outputs,
            **plan.scalars,
            **plan.constexprs,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
            **({} if plan.max_registers is None else {"maxnreg": plan.max_registers}),
        )
        everything |= {buffer.name: outputs[parameter] for parameter, buffer in plan.outputs.items()}
    return everything


def allocate(buffer: Buffer, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor for a launch to write."""
    return torch.empty(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)


def capability_of(device: torch.device, kernel: object) -> int:
    """The compute capability to plan for (90 is 9.0).

    Raises:
      NotImplementedError: a CPU tensor, and the kernels were not decorated for Triton's interpreter.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major * 10 + minor
    if device.type == "cpu" and isinstance(kernel, InterpretedFunction):
        return INTERPRETER_CAPABILITY
    raise NotImplementedError(
        f"the kernels run on CUDA tensors, or on CPU tensors when TRITON_INTERPRET=1 is set before jmoe.interop is "
        f"imported; got tensors on {device}"
    )


def table_of(device: torch.device, capability: int) -> LaunchTable:
    """The launch parameters for this device: the package's, and over them what its user measured with `jmoe tune`.

    Raises:
      ValueError: the user's file is invalid.
    """
    return table_by_name(capability, torch.cuda.get_device_name(device) if device.type == "cuda" else None)


@functools.cache
def table_by_name(capability: int, device: str | None) -> LaunchTable:
    """As table_of, read once in a process."""
    return own_table(capability) if device is None else table_for(capability, device)
