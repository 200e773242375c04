"""The layer as a function that PyTorch's autograd differentiates, by the launches that the JAX side runs."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import capability_of, launch, table_of
from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.moe_backward import plan_moe_backward
from jmoe.triton_src.portable.grouped_matmul import grouped_matmul_kernel
from jmoe.triton_src.problem import Layout, MoeProblem
from jmoe.triton_src.scoring import Scoring

type Buffers = dict[str, torch.Tensor]


class Options(NamedTuple):
    """What is static about a call."""

    intermediate: int
    layouts: Mapping[str, Layout]
    top_k: int
    activation: SwiGLU
    recompute: bool
    scoring: Scoring = Scoring()

    def problem(self, buffers: Buffers) -> MoeProblem:
        """The problem that these buffers pose."""
        return MoeProblem.from_shapes(
            {name: tuple(tensor.shape) for name, tensor in buffers.items()},
            intermediate=self.intermediate,
            layouts=self.layouts,
            top_k=self.top_k,
            activation=self.activation,
            scoring=self.scoring,
        )


def run(options: Options, buffers: Buffers, keep: bool = False) -> Buffers:
    """Every buffer of the forward pass by name, "y" among them; with pre_activations if they are to be kept."""
    device = buffers["x"].device
    capability = capability_of(device, grouped_matmul_kernel)
    with on(device):
        return launch(plan_moe(options.problem(buffers), capability, table_of(device, capability), keep=keep), buffers)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where and how kernels run for tensors of this device."""
    return torch.cuda.device(device) if device.type == "cuda" else bfloat16_arithmetic()


class DifferentiableMoe(torch.autograd.Function):
    """y from the layer's buffers. Keeps the inputs, the routing and, unless recomputed, pre_activations [P, 2I]."""

    @staticmethod
    def forward(ctx: Any, options: Options, names: tuple[str, ...], *tensors: torch.Tensor) -> torch.Tensor:
        buffers = dict(zip(names, tensors, strict=True))
        everything = run(options, buffers, keep=not options.recompute)
        kept = [*names, *(name for name in ("experts", "weights", "pre_activations") if name in everything)]
        ctx.names = tuple(dict.fromkeys(kept))
        ctx.options = options
        ctx.inputs = names
        ctx.save_for_backward(*(everything[name] for name in ctx.names))
        return everything["y"]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        buffers = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        needs = dict(zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True))
        # LoRA's scales are constants, as adapters' formats have them.
        wanted = {name: buffers[name] for name, need in needs.items() if need and not name.endswith("_scale")}
        found = OnceDifferentiable.apply(ctx.options, ctx.names, tuple(wanted), dy.contiguous(), *buffers.values())
        gradients = dict(zip(wanted, found, strict=True))
        return (None, None, *(gradients.get(name) for name in ctx.inputs))


class OnceDifferentiable(torch.autograd.Function):
    """The gradients, of which autograd is told that they have none: untold, it would take them for constants."""

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        names: tuple[str, ...],
        wanted: tuple[str, ...],
        dy: torch.Tensor,
        *saved: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        buffers = dict(zip(names, saved, strict=True))
        gradients = backward(options, buffers, dy, {name: buffers[name] for name in wanted})
        return tuple(gradients[name] for name in wanted)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> NoReturn:
        raise NotImplementedError("interop.moe has no second derivative; interop.reference.moe has")


def backward(options: Options, buffers: Buffers, dy: torch.Tensor, wanted: Buffers) -> Buffers:
    """The gradients, by name, of the buffers that are wanted."""
    given = dict(buffers)
    problem = options.problem({name: given[name] for name in given if name != "pre_activations"})
    if "adapter_ids" in given:
        # A token whose adapter does not exist is NaN whatever the arguments are: no gradient comes from it.
        known = (given["adapter_ids"] >= -1) & (given["adapter_ids"] < problem.adapters)
        dy = torch.where(known[:, None], dy, 0)
    given |= {"dy": dy}
    device = dy.device
    capability = capability_of(device, grouped_matmul_kernel)
    plans = plan_moe_backward(
        problem,
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in wanted.items()},
        "pre_activations" in buffers,
        capability,
        table_of(device, capability),
    )
    with on(device):
        results = launch(plans, given)
    return {name: results[f"{name}_grad"] for name in wanted}


def check_gradient(buffers: Buffers) -> None:
    """Raises NotImplementedError if a weight of the experts is to be differentiated."""
    for projection in ("gate_up", "down"):
        if buffers[projection].requires_grad:
            raise NotImplementedError(
                f"the kernels have no gradient in the experts' weights, but {projection} requires one: detach it, or "
                f"differentiate jmoe.interop.reference.moe"
            )
