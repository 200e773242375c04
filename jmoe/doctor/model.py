"""What a model runs by on this machine, and what it takes: facts alone, for `jmoe doctor` to print."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import AbstractMesh

from jmoe.adapters.settings import LoraBLayout
from jmoe.checkpoint.directory import EMBEDDING, Checkpoint
from jmoe.checkpoint.tensors import Spec
from jmoe.doctor.machine import Machine
from jmoe.gpt_oss import flash_attention
from jmoe.gpt_oss.adapter import layouts_of
from jmoe.gpt_oss.adapter_report import AdapterReport, examine_adapter
from jmoe.gpt_oss.cache import cache_bytes
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layout import AnyMesh, Layout
from jmoe.gpt_oss.load import HEAD, Quantize, check_layers, local_directory
from jmoe.ops.decode.linear import MOST_ROWS
from jmoe.ops.launch.local_gpu import kernel_of_experts_here
from jmoe.ops.mxfp4 import BLOCK

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}
"""Of the dtypes that checkpoints and adapters have, as safetensors spells them."""

PACKED, DENSE = "experts, packed 4-bit", "experts, bf16"
"""What experts' bytes are counted as."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a layer: how many layers have it so, and what runs for few tokens and for many."""

    name: str
    layers: int
    decode: str
    prefill: str


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """A model on this machine: its layers' parts, and bytes by what they are for, activations left out.

    limit: bytes that JAX may take of the first device, where a model goes; None where JAX does not say. On a mesh it is
      the least of the devices', and `resident` are the bytes of each.
    adapters: those that were given.
    devices: of the mesh; 1 without.
    """

    parts: tuple[Part, ...]
    resident: dict[str, int]
    limit: int | None
    adapters: tuple[AdapterReport, ...] = ()
    devices: int = 1


def examine_model(
    path: str | os.PathLike[str],
    adapters: Sequence[Path],
    machine: Machine,
    *,
    batch: int,
    context: int,
    quantize: Quantize | None = None,
    lora_b_layout: LoraBLayout | None = None,
    mesh: AnyMesh | None = None,
) -> ModelReport:
    """What a checkpoint's layers run by and what it takes, in bfloat16: from config.json, headers, and whole adapters.

    Args:
      batch: sequences that are decoded together.
      context: tokens of each, the prompt's among them.
      quantize: as in jmoe.gpt_oss.load.
      lora_b_layout: of adapters that do not say it themselves; see jmoe.gpt_oss.load_adapter.
      mesh: over which the model is split as Layout.of says, of devices that need not be here.

    Raises:
      FileNotFoundError: the directory or a file of it is missing.
      ValueError: a setting or tensor does not fit; the message names it.
    """
    directory = local_directory(path)
    config = Config.load(directory)
    checkpoint = Checkpoint(directory)
    layout = Layout() if mesh is None else Layout.of(mesh, config)
    mesh = AbstractMesh((1,), ("data",)) if mesh is None else mesh
    resident: Counter[str] = Counter()
    for name, spec in check_layers(checkpoint, config, quantize).items():
        parts_of_tensor = layout.size(mesh, *layout.of_tensor(name))
        if quantize is not None and kind_of(name, spec) == DENSE:
            resident[PACKED] += math.prod(spec.shape) // BLOCK * (BLOCK // 2 + 1) // parts_of_tensor
        else:
            resident[kind_of(name, spec)] += bytes_of(spec) // parts_of_tensor
    of_cache = layout.size(mesh, *layout.batch_axes(mesh, batch), layout.heads)
    resident[f"KV cache of {batch} x {context} tokens"] = cache_bytes(config, batch, context) // of_cache
    reports = tuple(
        examine_adapter(adapter, checkpoint, config, lora_b_layout=layout)
        for adapter, layout in zip(adapters, layouts_of(adapters, lora_b_layout), strict=True)
    )
    if reports:
        resident["adapters"] = sum(
            layout.bytes_of_device(mesh, report.shapes, layout.lora(report.shapes)) for report in reports
        )
    parts = parts_of(config, machine, batch, batch * context, mxfp4=DENSE not in resident)
    limits = [device.memory for device in machine.devices[: mesh.size]]
    limit = min((each for each in limits if each is not None), default=None)
    return ModelReport(parts, dict(resident), limit, reports, mesh.size)


def kind_of(name: str, spec: Spec) -> str:
    """What a tensor's bytes are counted as."""
    if name in (EMBEDDING, HEAD):
        return "embedding and head"
    if name.endswith(("_blocks", "_scales", "experts.gate_up_proj", "experts.down_proj")):
        return PACKED if spec.dtype == "U8" else DENSE
    return "other weights"


def bytes_of(spec: Spec) -> int:
    """A tensor's bytes.

    Raises:
      ValueError: a dtype that no gpt-oss checkpoint has.
    """
    if spec.dtype not in ITEM_BYTES:
        raise ValueError(f"a tensor's dtype must be one of {', '.join(ITEM_BYTES)}, got {spec}")
    return ITEM_BYTES[spec.dtype] * math.prod(spec.shape)


def parts_of(config: Config, machine: Machine, rows: int, prompt_tokens: int, *, mxfp4: bool) -> tuple[Part, ...]:
    """The parts of all layers; `rows` tokens a decode step, `prompt_tokens` of all prompts at once."""
    windows = Counter(config.windows)

    def by(kernel: str) -> str:
        """What runs a kernel that there is for CUDA."""
        if machine.no_triton is None:
            return f"Triton: {kernel}"
        return f"error: {machine.no_triton}" if machine.gpu else "XLA"

    def experts(tokens: int) -> str:
        if machine.no_triton is not None or not mxfp4:
            return by("grouped_matmul")
        return by(kernel_of_experts_here(tokens, config.num_local_experts, config.num_experts_per_tok))

    def linear(tokens: int) -> str:
        return by("decode_linear") if tokens <= MOST_ROWS else "XLA"

    flash = machine.no_flash is None and config.head_dim <= flash_attention.WIDEST
    attention = [
        Part(
            "full attention" if window is None else f"attention to the last {window} tokens",
            layers,
            by("cached_attention"),
            "FlashAttention" if flash else "XLA, in blocks",
        )
        for window, layers in windows.items()
    ]
    layers = config.num_hidden_layers
    return (
        *attention,
        Part("products of q, k, v and o", layers, linear(rows), linear(prompt_tokens)),
        Part("experts", layers, experts(rows), experts(prompt_tokens)),
    )
