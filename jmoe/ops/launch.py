"""The one door to Triton: a JAX primitive that becomes the layer's launches when it is lowered for CUDA.

Everything that needs Triton, jax-triton or a GPU happens in lowering, so the primitive can be traced on any machine.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir, xla

from jmoe.ops.buffers import Buffers, Options, names_of_stacks, of_one_layer
from jmoe.ops.gluon import compile_gluon_as_gluon
from jmoe.ops.packed import unpack_buffers

if TYPE_CHECKING:
    from jmoe.triton_src.moe import MoeProblem
    from jmoe.triton_src.plan import Plan
    from jmoe.triton_src.tiles import TileTables

OLDEST = {"jax-triton": (0, 4, 1), "triton": (3, 7)}
"""jax-triton 0.3.1 launches cannot be captured into CUDA graphs; 0.4.1 needs Triton 3.7."""

INSTALL = 'pip install "jmoe[cuda13]"'

moe_p = jex.core.Primitive("jmoe_moe")
"""Operands: the layer's buffers, in the order of the parameter `names`. Result: y like x."""

moe_forward_p = jex.core.Primitive("jmoe_moe_forward")
"""moe_p for a gradient to follow. Results: those that the parameter `results` names, y among them."""

moe_backward_p = jex.core.Primitive("jmoe_moe_backward")
"""Operands: moe_forward_p's and its results without y, and dy. Results: gradients of the operands in `wanted`."""

moe_p.def_abstract_eval(lambda *avals, names, **_: avals[names.index("x")])


def _forward_avals(*avals: Any, names: tuple[str, ...], results: tuple[str, ...], options: Options) -> list[Any]:
    x = avals[names.index("x")]
    tokens = x.shape[0]
    shapes = {
        "y": (x.shape, x.dtype),
        "experts": ((tokens, options.top_k), jnp.int32),
        "weights": ((tokens, options.top_k), jnp.float32),
        "pre_activations": ((tokens * options.top_k, 2 * options.intermediate), jnp.bfloat16),
    }
    return [x.update(shape=shapes[name][0], dtype=jnp.dtype(shapes[name][1])) for name in results]


moe_forward_p.multiple_results = True
moe_forward_p.def_abstract_eval(_forward_avals)
moe_backward_p.multiple_results = True
moe_backward_p.def_abstract_eval(lambda *avals, names, wanted, **_: [avals[names.index(name)] for name in wanted])


def _moe_launches(*arrays: jax.Array, names: tuple[str, ...], options: Options) -> jax.Array:
    """The layer as launches: what the primitive stands for on CUDA."""
    return launch_layer(dict(zip(names, arrays, strict=True)), options, *gpu_of(options))["y"]


def _forward_launches(
    *arrays: jax.Array, names: tuple[str, ...], results: tuple[str, ...], options: Options
) -> list[jax.Array]:
    """As _moe_launches, with what the gradient needs."""
    buffers = dict(zip(names, arrays, strict=True))
    everything = launch_layer(buffers, options, *gpu_of(options), keep=not options.recompute)
    return [everything[name] for name in results]


def _backward_launches(
    *arrays: jax.Array, names: tuple[str, ...], wanted: tuple[str, ...], options: Options
) -> list[jax.Array]:
    """The gradients as launches."""
    gradients = launch_gradients(dict(zip(names, arrays, strict=True)), wanted, options, *gpu_of(options))
    return [gradients[name] for name in wanted]


def gpu_of(options: Options) -> tuple[int, "TileTables | None"]:
    """The compute capability to lower for, and the user's tiles for it.

    A Target says which GPU, not whose: what is compiled for it is the same everywhere, and no user's tiles count.

    Raises:
      ImportError: Triton or jax-triton is not there.
      NotImplementedError: no Target is named, and there is no GPU here.
    """
    check_installed()
    return (local_capability(), local_tables()) if options.capability is None else (options.capability, None)


def launch_layer(
    buffers: Buffers, options: Options, capability: int, tables: "TileTables | None", *, keep: bool = False
) -> Buffers:
    """The layer as launches for a GPU of this compute capability, with these tiles or, if None, the package's own.

    Every buffer by name: "y", the routing's, and with `keep` pre_activations.
    """
    from jmoe.triton_src.moe import plan_moe

    check_dtypes(buffers)
    if buffers["x"].size == 0:
        tokens = buffers["x"].shape[0]
        nothing = jnp.zeros((tokens, options.top_k))
        empty = {"experts": nothing.astype(jnp.int32), "weights": nothing.astype(jnp.float32)}
        pairs = jnp.zeros((tokens * options.top_k, 2 * options.intermediate), jnp.bfloat16)
        return {"y": jnp.zeros_like(buffers["x"]), "pre_activations": pairs, **empty}
    buffers, problem = problem_of(buffers, options, capability)
    return launch(plan_moe(problem, capability, tables, keep=keep), buffers, capability)


def launch_gradients(
    buffers: Buffers, wanted: tuple[str, ...], options: Options, capability: int, tables: "TileTables | None"
) -> Buffers:
    """The gradients of the wanted buffers as launches, by the buffers' names; arguments as in launch_layer."""
    from jmoe.triton_src.moe_backward import plan_moe_backward

    if buffers["x"].size == 0 or not wanted:
        return {name: jnp.zeros_like(buffers[name]) for name in wanted}
    logits = buffers.get("router_logits")
    extra = {name: buffers[name] for name in ("dy", "pre_activations") if name in buffers}
    given = {name: array for name, array in buffers.items() if name not in ("router_logits", *extra)}
    given, problem = problem_of(given, options, capability)
    plans = plan_moe_backward(
        problem,
        {name: buffers[name].dtype.name for name in wanted},
        None if logits is None else logits.shape[1],
        "pre_activations" in extra,
        capability,
        tables,
    )
    everything = launch(plans, given | extra, capability)
    stacks = names_of_stacks(buffers)
    gradients = {name: everything[f"{name}_grad"] for name in wanted}
    return {
        name: in_its_layer(grad, buffers[name], buffers["layer"]) if name in stacks else grad
        for name, grad in gradients.items()
    }


def in_its_layer(grad: jax.Array, stack: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer's gradient among those of the other layers, which are zero."""
    return lax.dynamic_update_index_in_dim(jnp.zeros_like(stack), grad, layer[0], axis=0)


def problem_of(buffers: Buffers, options: Options, capability: int) -> tuple[Buffers, "MoeProblem"]:
    """The problem that the buffers pose, and they, unpacked if no kernel reads packed weights on that GPU."""
    from jmoe.triton_src.moe import MoeProblem, reads_packed

    packed = [buffers[projection].dtype == jnp.int32 for projection in ("gate_up", "down")]
    read_as_packed = all(packed) and reads_packed(capability)
    if any(packed) and not read_as_packed:
        buffers = unpack_buffers(of_one_layer(buffers), options.intermediate)
    problem = MoeProblem.from_shapes(
        {name: array.shape for name, array in buffers.items()},
        intermediate=options.intermediate,
        packed=read_as_packed,
        top_k=options.top_k,
        swiglu_alpha=options.swiglu_alpha,
        swiglu_limit=options.swiglu_limit,
    )
    return buffers, problem


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


def decoding_plans(operation: str, **sizes: Any) -> list["Plan"]:
    """Of one of jmoe.triton_src.decoding's operations; for the sizes see its plan."""
    check_installed()
    from jmoe.triton_src.decoding import PLANS

    return PLANS[operation](**sizes)


def _moe_elsewhere(ctx: mlir.LoweringRuleContext, *_: Any, **__: Any) -> Any:
    platforms = ctx.platforms or ctx.module_context.platforms
    raise NotImplementedError(
        f"the Triton backend runs on CUDA GPUs, but was lowered for {', '.join(platforms)}; "
        f'use backend="xla" there, or backend=None to choose by platform'
    )


def register(primitive: jex.core.Primitive, launches: Callable[..., Any]) -> None:
    """Lowers the primitive to these launches for CUDA, and to an error elsewhere."""
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    mlir.register_lowering(primitive, _moe_elsewhere)
    lowering = mlir.lower_fun(launches, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lowering, platform="cuda")


register(moe_p, _moe_launches)
register(moe_forward_p, _forward_launches)
register(moe_backward_p, _backward_launches)


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


def reads_packed_here() -> bool:
    """Whether JAX's default device has kernels that read packed experts.

    Raises:
      ImportError: it is a GPU, and Triton or jax-triton is not there.
    """
    if jax.default_backend() != "gpu":
        return False
    check_installed()
    from jmoe.triton_src.moe import reads_packed

    return reads_packed(local_capability())


def local_tables() -> "TileTables | None":
    """The tile tables that the user has measured for this machine's GPU with `jmoe tune`, if any.

    Raises:
      ValueError: the user's file is no such table.
    """
    from jmoe.triton_src.tile_tables import read_user_table

    return read_user_table(jax.local_devices(backend="cuda")[0].device_kind)


def why_no_triton() -> str | None:
    """Why backend "triton" cannot run on JAX's default device, or None if it can."""
    if jax.default_backend() != "gpu":
        return "JAX sees no GPU"
    try:
        check_installed()
        import_jax_triton()
        from jmoe.triton_src.tiles import tiles_of

        tiles_of(local_capability())
    except (ImportError, NotImplementedError) as error:
        return str(error)
    return None


def tiles_here() -> str:
    """Whose tile tables are used on this machine's GPU, which Triton must be able to run on."""
    from jmoe.triton_src.tile_tables import user_table
    from jmoe.triton_src.tiles import PACKED_TILES

    capability = local_capability()
    if local_tables() is not None:
        return f"the user's, {user_table(jax.local_devices(backend='cuda')[0].device_kind)}"
    if capability in PACKED_TILES:
        return f"jmoe's own for sm_{capability}"
    return f"jmoe's own, of which none was measured on sm_{capability}: run jmoe tune"


def kernel_of_experts_here(tokens: int, experts: int, top_k: int) -> str:
    """The kernel that MXFP4 experts as jmoe.gpt_oss.load lays them out take on this machine's GPU."""
    from jmoe.triton_src.moe import reads_packed
    from jmoe.triton_src.tiles import FewRowsTile, choose_packed_tile

    capability = local_capability()
    if not reads_packed(capability):
        return "grouped_matmul"
    tile = choose_packed_tile(capability, tokens * top_k, experts, local_tables())
    return "packed_few_rows" if isinstance(tile, FewRowsTile) else "packed_many_rows"
