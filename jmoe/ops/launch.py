"""The one door to Triton: a JAX primitive that becomes the layer's launches when it is lowered for CUDA.

Everything that needs Triton, jax-triton or a GPU happens in lowering, so the primitive can be traced on any machine.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.interpreters import mlir, xla

from jmoe.ops.gluon import compile_gluon_as_gluon
from jmoe.ops.packed import unpack_buffers

if TYPE_CHECKING:
    from jmoe.triton_src.plan import Plan
    from jmoe.triton_src.tiles import TileTables

OLDEST = {"jax-triton": (0, 4, 1), "triton": (3, 7)}
"""jax-triton 0.3.1 launches cannot be captured into CUDA graphs; 0.4.1 needs Triton 3.7."""

INSTALL = 'pip install "jmoe[cuda13]"'

moe_p = jex.core.Primitive("jmoe_moe")
"""Operands: the layer's buffers, in the order of the parameter `names`. Result: y like x."""


moe_p.def_abstract_eval(lambda *avals, names, **_: avals[names.index("x")])
moe_p.def_impl(lambda *args, **params: xla.apply_primitive(moe_p, *args, **params))


def _moe_launches(
    *arrays: jax.Array,
    names: tuple[str, ...],
    intermediate: int,
    top_k: int,
    swiglu_alpha: float,
    swiglu_limit: float,
    capability: int | None,
) -> jax.Array:
    """The layer as launches: what the primitive stands for on CUDA."""
    check_installed()
    tables = None  # a Target says which GPU, not whose: what is compiled for it is the same everywhere
    if capability is None:
        capability, tables = local_capability(), local_tables()
    return launch_layer(
        dict(zip(names, arrays, strict=True)),
        intermediate=intermediate,
        top_k=top_k,
        swiglu_alpha=swiglu_alpha,
        swiglu_limit=swiglu_limit,
        capability=capability,
        tables=tables,
    )


def launch_layer(
    buffers: Mapping[str, jax.Array],
    *,
    intermediate: int,
    top_k: int,
    swiglu_alpha: float,
    swiglu_limit: float,
    capability: int,
    tables: "TileTables | None",
) -> jax.Array:
    """The layer as launches for a GPU of this compute capability, with these tiles or, if None, the package's own."""
    check_dtypes(buffers)
    if buffers["x"].size == 0:
        return jnp.zeros_like(buffers["x"])

    from jmoe.triton_src.moe import MoeProblem, plan_moe, reads_packed

    problem = MoeProblem.from_shapes(
        {name: array.shape for name, array in buffers.items()},
        intermediate=intermediate,
        packed=all(buffers[projection].dtype == jnp.int32 for projection in ("gate_up", "down")),
        top_k=top_k,
        swiglu_alpha=swiglu_alpha,
        swiglu_limit=swiglu_limit,
    )
    if not (problem.packed and reads_packed(capability)):
        buffers = unpack_buffers(buffers, intermediate)
        problem = dataclasses.replace(problem, packed=False)
    return launch(plan_moe(problem, capability, tables), buffers, capability)["y"]


def route_and_sort(
    router_logits: jax.Array, *, top_k: int, capability: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weights, order, tiles): the launches that precede a layer's products, alone, for a GPU. For measuring them."""
    check_installed()
    tables = None
    if capability is None:
        capability, tables = local_capability(), local_tables()
    tokens, experts = router_logits.shape
    plans = routing_plans(tokens, experts, top_k, capability, tables)
    buffers = launch(plans, {"router_logits": router_logits}, capability)
    return buffers["weights"], buffers["order"], buffers["tiles"]


def routing_plans(tokens: int, experts: int, top_k: int, capability: int, tables: "TileTables | None") -> list["Plan"]:
    """The routing of a layer on packed experts where there is a kernel for them, else on the checkpoint's layout."""
    from jmoe.triton_src.moe import reads_packed
    from jmoe.triton_src.route_problem import RouteProblem
    from jmoe.triton_src.routing import plan_routing
    from jmoe.triton_src.tiles import choose_packed_tile, choose_tile

    tile = (choose_packed_tile if reads_packed(capability) else choose_tile)(
        capability, tokens * top_k, experts, tables
    )
    problem = RouteProblem(
        tokens=tokens,
        top_k=top_k,
        experts=experts,
        router_experts=experts,
        expert_offset=False,
        block_m=tile.block_m,
        hidden=None,
    )
    return plan_routing(problem)


def _moe_elsewhere(ctx: mlir.LoweringRuleContext, *_: Any, **__: Any) -> Any:
    platforms = ctx.platforms or ctx.module_context.platforms
    raise NotImplementedError(
        f"the Triton backend runs on CUDA GPUs, but was lowered for {', '.join(platforms)}; "
        f'use backend="xla" there, or backend=None to choose by platform'
    )


mlir.register_lowering(moe_p, _moe_elsewhere)
mlir.register_lowering(moe_p, mlir.lower_fun(_moe_launches, multiple_results=False), platform="cuda")


def launch(plans: Sequence["Plan"], buffers: Mapping[str, jax.Array], capability: int) -> dict[str, jax.Array]:
    """Traces the plans in order and returns every buffer, given and written, by name."""
    jax_triton = import_jax_triton()
    everything = dict(buffers)
    for plan in plans:
        if not hasattr(plan.kernel, "params"):
            raise NotImplementedError(
                "JAX cannot launch kernels that were decorated for Triton's interpreter: "
                "start anew without TRITON_INTERPRET"
            )
        plan.check_names()
        # jax-triton hands out results in the order of the kernel's parameters.
        outputs = [plan.outputs[parameter] for parameter in plan.kernel.arg_names if parameter in plan.outputs]
        operands = {p: None if name is None else everything[name] for p, name in plan.operands.items()}
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
            **operands,
            **plan.scalars,
            **plan.constexprs,
        )
        everything |= {buffer.name: result for buffer, result in zip(outputs, results, strict=True)}
    return everything


def check_dtypes(buffers: Mapping[str, jax.Array]) -> None:
    """Raises NotImplementedError for what only backend "xla" computes."""
    for name in ("x", "gate_up", "down"):
        dtype = buffers[name].dtype
        if dtype not in (jnp.bfloat16, jnp.uint8, jnp.int32):
            raise NotImplementedError(f'the Triton backend takes bfloat16 {name}, got {dtype}; use backend="xla"')


def check_installed() -> None:
    """Raises ImportError unless Triton and jax-triton are there and recent enough."""
    for package, oldest in OLDEST.items():
        wanted = ".".join(map(str, oldest))
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                f"the Triton backend needs {package} >= {wanted}, which is not installed: {INSTALL}"
            ) from None
        if release(version) < oldest:
            raise ImportError(f"the Triton backend needs {package} >= {wanted}, got {version}: {INSTALL}")


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (3, 8, 0) of "3.8.0+git1a2b"."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def import_jax_triton() -> Any:
    """jax_triton, compiling Gluon as Gluon, and without what its import does: it deletes TRITON_CACHE_DIR."""
    kept = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton
    import jax_triton.triton_lib

    compile_gluon_as_gluon(jax_triton.triton_lib)

    if kept is not None:
        os.environ["TRITON_CACHE_DIR"] = kept
    return jax_triton


def local_capability() -> int:
    """The compute capability of this machine's GPU (90 is 9.0).

    Raises:
      NotImplementedError: there is none, so that the target must be named.
    """
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        raise NotImplementedError(
            "lowering for CUDA on a machine without a GPU: "
            'name the GPU to compile for, as in backend=jmoe.Target("sm_90")'
        ) from None
    major, minor = device.compute_capability.split(".")
    return int(major) * 10 + int(minor)


def local_tables() -> "TileTables | None":
    """The tile tables that the user has measured for this machine's GPU with `jmoe tune`, if any.

    Raises:
      ValueError: the user's file is no such table.
    """
    from jmoe.triton_src.tile_tables import read_user_table

    return read_user_table(jax.local_devices(backend="cuda")[0].device_kind)
