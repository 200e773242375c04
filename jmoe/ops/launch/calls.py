"""Plans as calls of jax-triton, and primitives that become such calls when they are lowered for CUDA."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir, xla

from jmoe.ops.launch.installed import import_jax_triton
from jmoe.ops.target import Target

if TYPE_CHECKING:
    from jmoe.triton_src.plan import Plan


ALIGNMENT = 16
"""Bytes. The kernels are compiled for addresses that are multiples of it; jax-triton refuses to launch on others."""

MAY_BE_A_SLICE = 2**16
"""Bytes of an array that is cheap to copy if it turns out to be a slice of another one."""


def _aligned(array: jax.Array) -> jax.Array:
    """The array, which XLA will not place within another one unless it begins at a multiple of ALIGNMENT there.

    A contiguous slice of 256 bytes or more, x[1:65] for one, needs no copy: XLA gives the kernel an address inside x,
    and likewise for a result that is put into a larger array (dynamic-slice fusion, which XLA does by default since
    2026). Behind a barrier it is an array of its own. Large arrays whose rows are multiples of ALIGNMENT have none, so
    that a layer's weights are not copied out of all layers'.
    """
    row = math.prod(array.shape[1:]) * array.dtype.itemsize
    if array.size * array.dtype.itemsize > MAY_BE_A_SLICE and array.ndim > 1 and row % ALIGNMENT == 0:
        return array
    return lax.optimization_barrier(array)


def register(primitive: jex.core.Primitive, launches: Callable[..., Any]) -> None:
    """Lowers the primitive to these launches for CUDA, and to an error elsewhere."""
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    mlir.register_lowering(primitive, _elsewhere)
    lowering = mlir.lower_fun(launches, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lowering, platform="cuda")


def triton_or_xla(
    primitive: jex.core.Primitive,
    by_xla: Callable[..., Any],
    operands: Sequence[jax.Array],
    target: Target | None,
    *,
    takes: bool = True,
    **params: Any,
) -> Any:
    """The primitive's results for a target if one is named; else on CUDA, and those of by_xla elsewhere.

    Args:
      takes: whether the kernels take operands of these dtypes; by_xla computes others everywhere.
      params: of the primitive, beside its target.
    """
    triton = functools.partial(primitive.bind, target=target, **params)
    if target is not None:
        return triton(*operands)
    if not takes:
        return by_xla(*operands)
    return lax.platform_dependent(*operands, cuda=triton, default=by_xla)


def _elsewhere(ctx: mlir.LoweringRuleContext, *_: Any, **__: Any) -> Any:
    platforms = ctx.platforms or ctx.module_context.platforms
    raise NotImplementedError(
        f"the Triton backend runs on CUDA GPUs, but was lowered for {', '.join(platforms)}; "
        f'use backend="xla" there, or backend=None to choose by platform'
    )


def launch(plans: Sequence["Plan"], buffers: Mapping[str, jax.Array], capability: int) -> dict[str, jax.Array]:
    """Traces the plans in order and returns every buffer, given and written, by name."""
    jax_triton = import_jax_triton()
    everything = {name: _aligned(buffer) for name, buffer in buffers.items()}
    for plan in plans:
        if not hasattr(plan.kernel, "params"):
            raise NotImplementedError(
                "JAX cannot launch kernels that were decorated for Triton's interpreter: "
                "start anew without TRITON_INTERPRET"
            )
        plan.check_names()
        # jax-triton hands out results in the order of the kernel's parameters.
        outputs = [plan.outputs[parameter] for parameter in plan.kernel.arg_names if parameter in plan.outputs]
        operands: dict[str, Any] = {p: name and everything[name] for p, name in plan.operands.items()}
        # What is passed as a reference is an operand and a result in one buffer.
        references = {parameter: jax.new_ref(operands[parameter]) for parameter in plan.updates}
        results = jax_triton.triton_call(
            kernel=plan.kernel,
            out_type=[jax.ShapeDtypeStruct(buffer.shape, jnp.dtype(buffer.dtype)) for buffer in outputs],
            grid=plan.grid,
            name=plan.name,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
            backend_options=None if plan.max_registers is None else {"maxnreg": plan.max_registers},
            compute_capability=capability,
            cost_estimate={"flops": plan.flops, "bytes_accessed": plan.bytes_accessed},
            **operands | references,
            **plan.scalars,
            **plan.constexprs,
        )
        everything |= {buffer.name: result for buffer, result in zip(outputs, results, strict=True)}
        for parameter, reference in references.items():
            everything[str(plan.operands[parameter])] = jax.freeze(reference)
    return {name: buffer if name in buffers else _aligned(buffer) for name, buffer in everything.items()}
