"""Writes adapters in PEFT's format."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jmoe.adapters.settings import AdapterWarning
from jmoe.files import replace, write_tensors
from jmoe.gpt_oss.portable import misread
from jmoe.gpt_oss.portable import portable as to_portable
from jmoe.gpt_oss.weights import ATTENTION, EXPERTS, LoraWeights

PREFIX = "base_model.model."


def save_adapter(
    path: str | os.PathLike[str],
    lora: LoraWeights,
    *,
    adapter: int = 0,
    base_model: str | None = None,
    dropout: float = 0.0,
    portable: bool = False,
) -> None:
    """Writes one adapter as a directory that PEFT and jmoe.gpt_oss.load_adapter read.

    Factors are written in float32, as PEFT does, but for those of scale 0, which change nothing. alpha is chosen so
    that alpha / r is the scale; where ranks or scales differ, rank_pattern and alpha_pattern name each module by its
    whole name, so that their order does not matter.

    Args:
      path: made if it is not there; its two files are replaced.
      adapter: which of those that stand side by side.
      base_model: the name of the base model, for adapter_config.json.
      dropout: that LoRA on attention was trained with, for adapter_config.json; not written beside LoRA on experts,
        whose 3-D parameters PEFT loads without dropout alone.
      portable: write it so that other programs cannot misread it, of the same effect: scales are multiplied into B, so
        that one lora_alpha = r holds for all, smaller ranks are padded with zeros to one r, and where a layer has LoRA
        on one of the experts' projections alone, the other has factors of zeros. The file grows by what is padded.

    Warns:
      AdapterWarning: a program that reads PEFT's format is known to read this adapter otherwise, or not; it is named.
        Never with portable.

    Raises:
      ValueError: the adapter does not exist, or all of its scales are 0.
      OSError: a file cannot be written.
    """
    adapters = next(iter(lora.scale.values())).shape[1]
    if not 0 <= adapter < adapters:
        raise ValueError(f"adapter must be in [0, {adapters}), got {adapter}")
    layers = layers_of(lora, adapter)
    if not any(layers.values()):
        raise ValueError(f"adapter {adapter} must change some layer, got scales of 0 alone")
    if portable:
        lora, adapter = to_portable(lora, adapter), 0
        layers = layers_of(lora, adapter)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    entries = settings(lora, adapter, layers, base_model, dropout)
    write_tensors(folder / "adapter_model.safetensors", tensors(lora, adapter, layers))
    replace(folder / "adapter_config.json", json.dumps(entries, indent=2).encode())
    if problems := list(misread(entries, layers)):
        warnings.warn(
            f"{folder} is as PEFT reads it, but {'; '.join(problems)}; save_adapter(..., portable=True) or jmoe "
            "convert-adapter --portable write one that these read too",
            AdapterWarning,
            stacklevel=2,
        )


def pattern_name(layer: int, target: str) -> str:
    """The name by which PEFT's patterns know a module or parameter."""
    module = "mlp.experts" if target in EXPERTS else "self_attn"
    return f"model.layers.{layer}.{module}.{target}_proj"


def alpha_of(scale: float, rank: int) -> float:
    """The shortest alpha for which alpha / rank is this float32 scale."""
    for digits in range(1, 17):
        alpha = float(f"{scale * rank:.{digits}g}")
        if np.float32(alpha / rank) == np.float32(scale):
            return alpha
    return scale * rank


def layers_of(lora: LoraWeights, adapter: int) -> dict[str, list[int]]:
    """Target -> the layers in which the adapter changes it."""
    return {target: np.flatnonzero(np.asarray(scale)[:, adapter]).tolist() for target, scale in lora.scale.items()}


def names_of(lora: LoraWeights, layers: dict[str, list[int]], targets: Sequence[str], module: str) -> list[str]:
    """The names by which PEFT finds the targets: short ones for all layers, else each layer's whole name."""
    names = []
    for target in targets:
        if target in lora.a:
            everywhere = len(layers[target]) == lora.a[target].shape[0]
            whole = [pattern_name(layer, target) for layer in layers[target]]
            names += [f"{module}{target}_proj"] if everywhere else whole
    return names


def settings(
    lora: LoraWeights, adapter: int, layers: dict[str, list[int]], base_model: str | None, dropout: float = 0.0
) -> dict[str, Any]:
    """adapter_config.json."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, a in lora.a.items():
        for layer in layers[target]:
            name = pattern_name(layer, target)
            ranks[name] = a.shape[-2]
            alphas[name] = alpha_of(float(lora.scale[target][layer, adapter]), a.shape[-2])
    on_experts = names_of(lora, layers, EXPERTS, "mlp.experts.")
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "lora_dropout": 0.0 if on_experts else dropout,
        "bias": "none",
        "target_modules": names_of(lora, layers, ATTENTION, ""),
        "target_parameters": on_experts or None,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def tensors(lora: LoraWeights, adapter: int, layers: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """adapter_model.safetensors."""
    found = {}
    for target, a in lora.a.items():
        for layer in layers[target]:
            on_experts = [target for target in EXPERTS if layer in layers.get(target, ())]
            # PEFT wraps the experts once for each parameter: the first is inside.
            wrapped = ["mlp.experts.base_layer", "mlp.experts"][-len(on_experts) :]
            modules = dict(zip(on_experts, wrapped, strict=False))
            one_a, one_b = in_float32(a[layer, adapter]), in_float32(lora.b[target][layer, adapter])
            if target in modules:
                # Rows of A count (expert, rank), columns of B (rank, expert).
                one_a = one_a.reshape(-1, one_a.shape[-1])
                one_b = one_b.transpose(1, 2, 0).reshape(one_b.shape[1], -1)
            module = modules.get(target, f"self_attn.{target}_proj")
            prefix = f"{PREFIX}model.layers.{layer}.{module}."
            found[f"{prefix}lora_A.weight"] = np.ascontiguousarray(one_a)
            found[f"{prefix}lora_B.weight"] = np.ascontiguousarray(one_b)
    return found


def in_float32(array: Array) -> np.ndarray:
    """On the host."""
    return np.asarray(array.astype(jnp.float32))
