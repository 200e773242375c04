"""MXFP4 mixture-of-experts with LoRA for JAX.

    moe                 the layer: experts in MXFP4 or bfloat16, LoRA on them, differentiable
    Experts, Lora       its weights, and adapters for them
    SwiGLU, SiluAndMul  activations
    Scoring             how a router's logits become weights
    MeshAxes            what splits them on a mesh with Auto axes
    route, Routing      a choice of experts, which moe can be given
    Mxfp4               weights in a checkpoint's four bits
    quantize, dequantize  to and from four bits
    interleave          gate and up from halves to alternating rows
    pack, unpack        experts to and from the layout that Hopper's kernels read
    PackedMxfp4         a weight in that layout
    Target              a GPU that is not here, to compile for
    allow_triton_call   what jax.export asks for

jmoe.nn is the layer for Flax, jmoe.interop for PyTorch, jmoe.gpt_oss the whole model; jmoe.checkpoint, jmoe.adapters
and jmoe.text read files, and jmoe.ops is what they are built of.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jmoe.ops.experts import Experts as Experts
    from jmoe.ops.experts import Lora as Lora
    from jmoe.ops.export import allow_triton_call as allow_triton_call
    from jmoe.ops.gate_up import interleave as interleave
    from jmoe.ops.mesh_axes import MeshAxes as MeshAxes
    from jmoe.ops.moe import moe as moe
    from jmoe.ops.mxfp4 import Mxfp4 as Mxfp4
    from jmoe.ops.mxfp4 import PackedMxfp4 as PackedMxfp4
    from jmoe.ops.mxfp4 import dequantize as dequantize
    from jmoe.ops.mxfp4 import quantize as quantize
    from jmoe.ops.packed import pack as pack
    from jmoe.ops.packed import unpack as unpack
    from jmoe.ops.routing import Routing as Routing
    from jmoe.ops.routing import route as route
    from jmoe.ops.target import Target as Target
    from jmoe.triton_src.activation import SiluAndMul as SiluAndMul
    from jmoe.triton_src.activation import SwiGLU as SwiGLU
    from jmoe.triton_src.scoring import Scoring as Scoring

__all__ = [
    "Experts",
    "Lora",
    "MeshAxes",
    "Mxfp4",
    "PackedMxfp4",
    "Routing",
    "Scoring",
    "SiluAndMul",
    "SwiGLU",
    "Target",
    "allow_triton_call",
    "dequantize",
    "interleave",
    "moe",
    "pack",
    "quantize",
    "route",
    "unpack",
]

__version__ = "0.1.0"

HOME = {
    "Experts": "jmoe.ops.experts",
    "Lora": "jmoe.ops.experts",
    "allow_triton_call": "jmoe.ops.export",
    "interleave": "jmoe.ops.gate_up",
    "MeshAxes": "jmoe.ops.mesh_axes",
    "moe": "jmoe.ops.moe",
    "Mxfp4": "jmoe.ops.mxfp4",
    "PackedMxfp4": "jmoe.ops.mxfp4",
    "dequantize": "jmoe.ops.mxfp4",
    "quantize": "jmoe.ops.mxfp4",
    "pack": "jmoe.ops.packed",
    "unpack": "jmoe.ops.packed",
    "Routing": "jmoe.ops.routing",
    "route": "jmoe.ops.routing",
    "Target": "jmoe.ops.target",
    "SiluAndMul": "jmoe.triton_src.activation",
    "SwiGLU": "jmoe.triton_src.activation",
    "Scoring": "jmoe.triton_src.scoring",
}
"""The module that each public name is of."""

ROOMS = ("adapters", "checkpoint", "gpt_oss", "interop", "nn", "ops", "text")
"""Parts that may be named after `import jmoe` alone."""


def __getattr__(name: str) -> Any:
    """What the package has, imported when first asked for: JAX and Flax take a while, which the command needs first to
    say what Ctrl-C does."""
    if name in ROOMS:
        return importlib.import_module(f"jmoe.{name}")
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *ROOMS, *(name for name in globals() if name.startswith("__"))})
