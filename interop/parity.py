"""Every implementation of the layer on the same bytes, judged by float64: what `jmoe parity` prints."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import torch

from jmoe.bench.peers import triton_kernels
from jmoe.interop import reference
from jmoe.interop.dlpack import to_torch
from jmoe.interop.launch import INTERPRETER_CAPABILITY
from jmoe.interop.moe import moe as moe_torch
from jmoe.ops.moe import moe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from jmoe.ops.routing import route
from jmoe.ops.target import Target
from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.plan import cdiv
from jmoe.triton_src.problem import Layout, MoeProblem

LARGEST_ERROR = 5e-3
"""||y - reference|| / ||reference||: bf16 keeps 8 bits, so a rounding costs up to 2e-3, and a layer has about three."""

LARGEST_RATIO = 1.1
"""Times the error of PyTorch's own bf16 computation on the same inputs."""

TARGETS = ("sm_80", "sm_90", "sm_100")

MOST_INTERPRETED_STEPS = 20_000
"""Inner-loop steps that the interpreter is asked to take: about 5 ms each."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer's results. A column holds a relative error, or the reason why it has none."""

    label: str
    xla: float
    triton_jax: float | str
    triton_torch: float | str
    triton_kernels: float | str
    torch_bf16: float
    same_bits: bool | str
    failures: tuple[str, ...]


def small_shapes() -> list[LayerShape]:
    """Layers that the interpreter runs in seconds: sizes off the tiles, experts without tokens, every LoRA case."""
    small = functools.partial(LayerShape, hidden=96, intermediate=64, experts=8, top_k=2)
    return [
        small(1),
        small(7),
        small(33, top_k=4),
        small(7, adapters=1, rank=5),
        small(33, adapters=3, rank=16, mixed=True),
        small(16, hidden=40, intermediate=24, mxfp4=False, adapters=2, rank=3, mixed=True),
    ]


def real_shapes() -> list[LayerShape]:
    """Layers of gpt-oss's sizes, for a GPU."""
    return [
        *(LayerShape(tokens) for tokens in (1, 7, 64, 1000, 4096)),
        *(LayerShape(tokens, experts=128) for tokens in (64, 1000)),
        *(LayerShape(tokens, adapters=1, rank=rank) for rank in (8, 64) for tokens in (7, 1000)),
        LayerShape(64, adapters=8, rank=8, mixed=True),
        LayerShape(1000, adapters=8, rank=16, mixed=True),
        LayerShape(300, experts=8, mxfp4=False, adapters=2, rank=5, mixed=True),
    ]


def compare_random(shape: LayerShape) -> Row:
    """The row of a random layer."""
    return compare(str(shape), random_layer(shape), shape.top_k)


def compare(label: str, layer: Layer, top_k: int) -> Row:
    """Runs the layer through everything that this machine can run.

    jmoe's implementations route for themselves, by one rule; the references and the peer are given that routing, since
    others break ties in other ways.
    """
    layer, routing = jax.block_until_ready((layer, route(layer.router_logits, top_k)))
    t, t_routing = jax.tree.map(to_torch, (layer, routing))
    options = {"top_k": top_k, "lora": t.lora, "adapter_ids": t.adapter_ids}
    exact = reference.moe(t.x, None, t.experts, routing=t_routing, **options)
    bf16 = relative_error(
        reference.moe(t.x, None, t.experts, routing=t_routing, dtype=torch.bfloat16, **options), exact
    )
    xla = relative_error(to_torch(run_jax(layer, top_k, "xla")), exact)

    triton_jax: float | str = "lowered only"
    triton_torch: float | str = "too large to interpret"
    same_bits: bool | str = "not run"
    if t.x.is_cuda or interpreter_steps(layer, top_k) <= MOST_INTERPRETED_STEPS:
        y_torch = moe_torch(t.x, t.router_logits, t.experts, **options)
        triton_torch = relative_error(y_torch, exact)
        if t.x.is_cuda:
            y_jax = to_torch(run_jax(layer, top_k, "triton"))
            triton_jax = relative_error(y_jax, exact)
            same_bits = torch.equal(y_jax.view(torch.int16), y_torch.view(torch.int16))

    peer: float | str = triton_kernels.missing() or "no LoRA"
    if triton_kernels.missing() is None and layer.lora is None and hasattr(t.experts.gate_up, "blocks"):
        block = triton_kernels.prepare(t.experts, num_warps=4 if t.x.shape[0] < 1024 else 8)
        routed = triton_kernels.route_as(t_routing, t.router_logits)
        peer = relative_error(block(t.x, routed), exact)

    row = Row(label, xla, triton_jax, triton_torch, peer, bf16, same_bits, ())
    return dataclasses.replace(row, failures=tuple(failures(row)))


def failures(row: Row) -> list[str]:
    """What is wrong with a row, in words."""
    wrong = []
    for name in ("xla", "triton_jax", "triton_torch"):
        error = getattr(row, name)
        if isinstance(error, float):
            # Written so that NaN fails.
            if not error <= LARGEST_ERROR:
                wrong.append(f"{row.label}: {name} is off by {error:.1e}, more than {LARGEST_ERROR:.0e}")
            if not error <= LARGEST_RATIO * row.torch_bf16:
                wrong.append(
                    f"{row.label}: {name} is off by {error:.1e}, more than PyTorch's bf16 {row.torch_bf16:.1e}"
                )
    if row.same_bits is False:
        wrong.append(f"{row.label}: the launches from JAX and from torch differ")
    return wrong


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """||y - exact|| / ||exact|| over the finite entries of exact; infinity unless y is finite exactly where it is."""
    finite = torch.isfinite(exact)
    if not torch.equal(torch.isfinite(y), finite):
        return float("inf")
    exact = exact[finite].double()
    difference = y[finite].double() - exact
    return float(difference.norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))


def run_jax(layer: Layer, top_k: int, backend: str) -> jax.Array:
    """The layer under jax.jit, with its routing computed inside. Waits: see to_torch, for want of memory."""
    return jitted_layer(top_k, backend)(layer).block_until_ready()


@functools.cache
def jitted_layer(top_k: int, backend: str | Target) -> Any:
    """jax.jit of jmoe.moe on a Layer."""

    def call(layer: Layer) -> jax.Array:
        return moe(
            layer.x,
            layer.router_logits,
            layer.experts,
            top_k=top_k,
            lora=layer.lora,
            adapter_ids=layer.adapter_ids,
            backend=backend,  # type: ignore[arg-type]
        )

    return jax.jit(call)


def interpreter_steps(layer: Layer, top_k: int) -> int:
    """About how many inner-loop steps the two grouped products take."""
    tokens, hidden = layer.x.shape
    count, double, _ = layer.experts.gate_up.shape
    shapes = {"x": (tokens, hidden), "router_logits": (tokens, count), "gate_up": (count, double, hidden)}
    problem = MoeProblem.from_shapes(
        shapes,
        intermediate=double // 2,
        layouts=dict.fromkeys(("gate_up", "down"), Layout.DENSE),
        top_k=top_k,
        activation=SwiGLU(),
    )
    plans = plan_moe(problem, INTERPRETER_CAPABILITY) if tokens else []
    return sum(
        plan.grid[0] * plan.grid[1] * cdiv(plan.constexprs["K"], plan.constexprs["BLOCK_K"])
        for plan in plans
        if plan.name == "grouped_matmul"
    )


def lower(shapes: Sequence[LayerShape]) -> None:
    """Compiles every launch of these layers to PTX for every target, on any machine; raises what compilers raise."""
    for shape in shapes:
        layer = jax.eval_shape(functools.partial(random_layer, shape))
        for target in TARGETS:
            traced = jitted_layer(shape.top_k, Target(target)).trace(layer)
            traced.lower(lowering_platforms=("cuda",))


def lower_elsewhere(shapes: Sequence[LayerShape]) -> str | None:
    """`lower` in a process of its own, whose kernels are not the interpreter's; the error's text, or None."""
    program = "import sys, jmoe.interop.parity as parity; parity.lower_command(sys.argv[1])"
    command = [sys.executable, "-c", program, json.dumps([dataclasses.asdict(shape) for shape in shapes])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_without_interpreter(), check=False)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def lower_command(shapes_json: str) -> None:
    """What `lower_elsewhere` runs."""
    lower([LayerShape(**fields) for fields in json.loads(shapes_json)])


def environment_without_interpreter() -> dict[str, str]:
    """This process's environment, less the choice of Triton's interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def shape_of(layer: Layer, top_k: int) -> LayerShape:
    """The size of a layer, for `lower`."""
    gate_up = layer.experts.gate_up
    experts, double, hidden = gate_up.shape
    lora = layer.lora
    factor = None if lora is None else (lora.gate_up_a if lora.gate_up_a is not None else lora.down_a)
    return LayerShape(
        tokens=layer.x.shape[0],
        hidden=hidden,
        intermediate=double // 2,
        experts=experts,
        top_k=top_k,
        adapters=0 if factor is None else factor.shape[0],
        rank=0 if factor is None else factor.shape[2],
        mixed=layer.adapter_ids is not None,
        mxfp4=not isinstance(gate_up, jax.Array),
        bias=layer.experts.gate_up_bias is not None,
    )
