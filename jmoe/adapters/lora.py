"""LoRA on the experts of one layer, as jmoe.moe takes it."""

import os
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jmoe.adapters.file import Sizes, open_adapter
from jmoe.adapters.settings import LoraBLayout
from jmoe.checkpoint.config_file import Config
from jmoe.ops.experts import Lora


def load_lora(
    path: str | os.PathLike[str], config: Config, layer: int, *, lora_b_layout: LoraBLayout | None = None
) -> Lora:
    """Reads the LoRA factors on the experts of one layer from a PEFT adapter directory.

    Gives one adapter (A = 1), factors float32 or bf16 as in the file, float32 if they are float16 there, scales float32
    [1]. A projection that the adapter leaves alone is None. A factor that all experts share is repeated for each. LoRA
    on attention is not looked at. Where shapes cannot tell the swapped layout from the usual one (`down` alone and
    hidden_size = intermediate_size), the usual one is taken, as PEFT does.

    Args:
      lora_b_layout: how columns of lora_B count, where it holds all experts and adapter_config.json has no
        lora_B_layout: "rank_major", PEFT's order, or "grouped_by_expert", as Unsloth wrote before September 2026.

    Warns:
      AdapterWarning: lora_b_layout is None, and Unsloth may have written the other order.

    Raises:
      FileNotFoundError: adapter_config.json or adapter_model.safetensors does not exist.
      ValueError: the layer is out of range or without LoRA on its experts; lora_b_layout contradicts the file; a
        setting is not supported; the tensors do not match the settings and the model's sizes, or the file is truncated
        or corrupt.
    """
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"layer must be in [0, {config.num_hidden_layers}), got {layer}")
    hidden, inner = config.hidden_size, config.intermediate_size
    weights = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    sizes = Sizes(config.num_hidden_layers, config.num_local_experts, weights)
    fields: dict[str, Array] = {}
    with open_adapter(path, sizes, lora_b_layout=lora_b_layout, only_experts=True) as adapter:
        for target in weights:
            if (factors := adapter.read(layer, target)) is not None:
                fields |= {
                    f"{target}_a": jnp.asarray(factors.a[None]),
                    f"{target}_b": jnp.asarray(factors.b[None]),
                    f"{target}_scale": jnp.asarray(np.array([factors.scale], np.float32)),
                }
        if not fields:
            raise ValueError(
                f"{adapter.file} has no LoRA on the experts of layer {layer} "
                f"(no base_model.model.model.layers.{layer}.mlp.*); layers that have: "
                f"{sorted({of_layer for of_layer, _ in adapter.pairs}) or 'none'}"
            )
    return Lora(**fields)


def stack_loras(loras: Sequence[Lora]) -> Lora:
    """One Lora with the adapters of several, in order, along its leading axis.

    Smaller ranks are padded with zeros, which change no result. Factors of different dtypes become float32.

    Raises:
      ValueError: there are none, they adapt different projections, or are for experts of different number or size.
    """
    if not loras:
        raise ValueError("stack_loras needs at least one Lora, got none")
    return Lora(**_stack(loras, "gate_up"), **_stack(loras, "down"))


def _stack(loras: Sequence[Lora], projection: str) -> dict[str, Array | None]:
    """The three fields of one projection, stacked."""
    names = [f"{projection}_{part}" for part in ("a", "b", "scale")]
    a, b, scale = ([getattr(lora, name) for lora in loras] for name in names)
    without = [i for i, factor in enumerate(a) if factor is None]
    if len(without) == len(loras):
        return dict.fromkeys(names)
    if without:
        raise ValueError(f"all Loras or none must adapt {projection}; numbers {without} of {len(loras)} do not")
    sizes = [(x.shape[1], x.shape[3], y.shape[2]) for x, y in zip(a, b, strict=True)]
    if len(set(sizes)) > 1:
        raise ValueError(f"all Loras must have the same (experts, inputs, outputs) for {projection}, got {sizes}")
    rank = max(x.shape[2] for x in a)
    return dict(zip(names, (_concatenate(a, 2, rank), _concatenate(b, 3, rank), jnp.concatenate(scale)), strict=True))


def _concatenate(factors: list[Array], axis: int, rank: int) -> Array:
    """Factors along the adapter axis, each padded with zeros to `rank` along `axis`."""
    dtypes = {factor.dtype for factor in factors}
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.float32
    padding = [[(0, rank - x.shape[axis] if i == axis else 0) for i in range(x.ndim)] for x in factors]
    return jnp.concatenate([jnp.pad(x.astype(dtype), p) for x, p in zip(factors, padding, strict=True)])
