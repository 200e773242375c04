"""MXFP4 mixture-of-experts with LoRA for JAX."""

import importlib
from types import ModuleType

from jmoe.ops.experts import Experts as Experts
from jmoe.ops.experts import Lora as Lora
from jmoe.ops.export import allow_triton_call as allow_triton_call
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

__all__ = [
    "Experts",
    "Lora",
    "Mxfp4",
    "PackedMxfp4",
    "Routing",
    "Target",
    "allow_triton_call",
    "dequantize",
    "moe",
    "pack",
    "quantize",
    "route",
    "unpack",
]


def __getattr__(name: str) -> ModuleType:
    """jmoe.nn and jmoe.gpt_oss, imported when first asked for: Flax takes a while."""
    if name in ("nn", "gpt_oss"):
        return importlib.import_module(f"jmoe.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
