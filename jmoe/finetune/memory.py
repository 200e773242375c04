"""How much of a device's memory fine-tuning takes, before anything is loaded.

Weights, factors and the optimizer's moments are counted. The rest follows what XLA's compiled steps of both released
models hold on a Hopper GPU, with FlashAttention, for 512 to 16384 tokens at once, ranks of 4 to 64 and each --remat
(docs/model.md): the coefficients below are fitted to them, and give each step's memory to within 5 %.
"""

import dataclasses
import math
from typing import Any, Self

import jax

from jmoe.checkpoint import Checkpoint
from jmoe.device_memory import byte_size
from jmoe.finetune.config import FinetuneConfig
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layout import AnyMesh, Layout
from jmoe.gpt_oss.load import Quantize
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.gpt_oss.weights import ATTENTION, EXPERTS, LoraWeights, sizes

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
MXFP4_BYTES = 1 / 2 + 1 / 32
"""Of a weight: half a byte, and a 32nd of its block's scale."""

WORKSPACE = GIB // 4
"""What a program's code and the libraries of products take."""

NORMS_AND_SUMS = 9.4
"""Activations of hidden_size that a layer keeps for the backward pass, beside attention's and the experts' own."""

BACKWARD_SUMS = 4.7
"""Such that its backward pass holds beside them; with LoRA on experts, 2.5 more for each expert of a token."""

GRADIENTS = 1.07
"""Gradients of the factors at once, in their size, where layers are computed again; else their copies are kept too."""

ACCUMULATED = 1.76
"""As much more with --accumulate, for the sum."""


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for. Printed, one line."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Of a step, at its highest."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {byte_size(size)}" for name, size in self.parts.items())
        return f"about {byte_size(self.total)} ({parts})"


@dataclasses.dataclass(frozen=True)
class Shares:
    """Devices of a mesh among which is split: a batch, the stored experts, and those that are computed, with LoRA."""

    batch: int = 1
    stored_experts: int = 1
    computed_experts: int = 1

    @classmethod
    def of(cls, layout: Layout | None, mesh: AnyMesh | None) -> Self:
        """Of a layout on its mesh; of one device without."""
        if layout is None or mesh is None:
            return cls()
        split = (layout.axes_of_batch, layout.of_experts, (layout.experts,))
        return cls(*(layout.size(mesh, *axes) for axes in split))


def estimate(
    options: FinetuneConfig, config: Config, lora: LoraWeights, *, mxfp4: bool = True, shares: Shares = Shares()
) -> MemoryEstimate:
    """What a step of fine-tuning holds, on each device of a mesh.

    Args:
      lora: the adapter that is trained, or its shapes alone.
      mxfp4: whether experts are in four bits; else in bfloat16.
      shares: of a mesh; heads of attention are taken as if each device had all of them.
    """
    tokens = options.batch_size * options.length // shares.batch
    factors = FLOAT32 * sum(
        math.prod(leaf.shape) // (shares.computed_experts if name in EXPERTS else 1)
        for factor in (lora.a, lora.b)
        for name, leaf in factor.items()
    )
    item = FLOAT32 if options.dtype == "float32" else BFLOAT16
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kept, gate_up, backward = activations(config, lora, dropout=options.lora_dropout > 0)
    copies = 0.0
    saved: float
    working: float
    match options.remat:
        case "layers":
            saved, working = layers * hidden, kept + gate_up + backward
        case "experts":
            saved, working = layers * kept, gate_up + backward
        case "nothing":
            saved, working = layers * (kept + gate_up), backward
    gradients = GRADIENTS + (ACCUMULATED if options.accumulate > 1 else 0)
    if options.remat != "layers":  # each layer's weights and factors, taken out of their stacks, are kept for it
        copies = layers * item * sum(n * k for n, k in dense_matrices(config)) + 0.96 * factors
    in_layer = item * tokens * working + gradients * factors
    in_head = min(options.loss_chunk, tokens) * config.vocab_size * (FLOAT32 + item)
    return MemoryEstimate(
        {
            "weights": weight_bytes(config, mxfp4=mxfp4, shares=shares),
            "LoRA and AdamW": 3 * factors,
            "kept for the backward pass": int(item * tokens * saved + copies),
            "backward pass of a layer or loss of a chunk": int(max(in_layer, in_head)),
            "programs": WORKSPACE,
        }
    )


def activations(config: Config, lora: LoraWeights, *, dropout: bool) -> tuple[float, float, float]:
    """Numbers of a token and layer: (kept for the backward pass, of gate_up's result, held within that pass)."""
    hidden, inner, top = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    queries, keys = sizes(config)["q"][0], sizes(config)["k"][0]
    # q, k and v, rotated, attended, and beside the bias for the product of o.
    kept = NORMS_AND_SUMS * hidden + top * inner + 4 * queries + 3 * keys
    if dropout and any(target in lora.a for target in ATTENTION):
        kept += sum(sizes(config)[target][1] for target in ATTENTION if target in lora.a)
    on_experts = any(target in lora.a for target in EXPERTS)
    backward = BACKWARD_SUMS * hidden + (top * (2 * inner + 2.5 * hidden) if on_experts else 0)
    return kept, 2 * top * inner, backward


def weight_bytes(config: Config, *, mxfp4: bool, shares: Shares = Shares()) -> int:
    """A model's weights on the device: experts in four bits or in bfloat16, all else in bfloat16.

    Of experts that are gathered layer by layer, those of two layers are counted: one may come while one is computed.
    """
    own = config.num_local_experts // shares.stored_experts
    gathered = (
        config.num_local_experts // shares.computed_experts if shares.stored_experts > shares.computed_experts else 0
    )
    of_expert = sum(n * k for name, (n, k) in sizes(config).items() if name in EXPERTS)
    experts, biases = of_expert * own, (2 * config.intermediate_size + config.hidden_size) * own
    rows = sum(n for n, _ in dense_matrices(config))
    small = rows + biases + 2 * config.hidden_size + config.num_attention_heads
    dense = sum(n * k for n, k in dense_matrices(config)) + small
    vocabulary = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    in_bfloat16 = config.num_hidden_layers * dense + vocabulary
    of_experts = (config.num_hidden_layers * experts + 2 * of_expert * gathered) * (MXFP4_BYTES if mxfp4 else BFLOAT16)
    return BFLOAT16 * in_bfloat16 + int(of_experts)


def dense_matrices(config: Config) -> list[tuple[int, int]]:
    """(N, K) of a layer's products of attention and of its router."""
    return [
        *(size for name, size in sizes(config).items() if name in ATTENTION),
        (config.num_local_experts, config.hidden_size),
    ]


def new_adapter_shapes(options: FinetuneConfig, config: Config) -> LoraWeights:
    """The adapter that jmoe.gpt_oss.new_adapter would make, without its numbers."""

    def make() -> LoraWeights:
        return new_adapter(
            config, rank=options.lora_ranks, scale=options.lora_scales, targets=options.lora_targets, seed=0
        )

    return jax.eval_shape(make)


def experts_in_mxfp4(checkpoint: Checkpoint, quantize: Quantize | None) -> bool:
    """Whether experts are in four bits once they are loaded so, by the headers of the checkpoint's files."""
    return quantize is not None or any(checkpoint.stored(name).dtype == "U8" for name in checkpoint.names)


def device_limit() -> int | None:
    """Bytes that JAX may take of the device that a model goes to; None where JAX does not say."""
    device: Any = jax.local_devices()[0]
    return (device.memory_stats() or {}).get("bytes_limit")


def warning(needed: int, limit: int | None) -> str | None:
    """What is to be said where a step takes more than the device has, or nearly; None where it fits."""
    if limit is None or needed <= limit:
        return None
    return (
        f"warning: a step is likely to take more memory than JAX may take of the device, {needed / GIB:.1f} of "
        f"{limit / GIB:.1f} GiB: take a smaller --batch-size or --length (and a larger --accumulate), --remat layers, "
        "or a smaller --rank"
    )
