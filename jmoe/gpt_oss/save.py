"""Writes adapters in PEFT's format."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from jmoe.gpt_oss.weights import ATTENTION, EXPERTS, LoraWeights

PREFIX = "base_model.model."


def save_adapter(
    path: str | os.PathLike[str], lora: LoraWeights, *, adapter: int = 0, base_model: str | None = None
) -> None:
    """Writes one adapter as a directory that PEFT and jmoe.gpt_oss.load_adapter read.

    Factors are written in float32, as PEFT does. alpha is chosen so that alpha / r is the scale; where ranks or scales
    differ, rank_pattern and alpha_pattern name each module by its whole name, so that their order does not matter.

    Args:
      path: made if it is not there; its two files are replaced.
      adapter: which of those that stand side by side.
      base_model: the name of the base model, for adapter_config.json.

    Raises:
      ValueError: there is no such adapter.
    """
    adapters = next(iter(lora.scale.values())).shape[1]
    if not 0 <= adapter < adapters:
        raise ValueError(f"adapter must be in [0, {adapters}), got {adapter}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "adapter_config.json", json.dumps(settings(lora, adapter, base_model), indent=2).encode())
    fresh = folder / "adapter_model.safetensors.new"
    save_file(tensors(lora, adapter), fresh, metadata={"format": "pt"})
    fresh.replace(folder / "adapter_model.safetensors")


def replace(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_bytes(content)
    fresh.replace(file)


def module_name(layer: int, target: str) -> str:
    """The name by which PEFT's patterns know a module or parameter."""
    module = "mlp.experts" if target in EXPERTS else "self_attn"
    return f"model.layers.{layer}.{module}.{target}_proj"


def settings(lora: LoraWeights, adapter: int, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, a in lora.a.items():
        for layer, scale in enumerate(np.asarray(lora.scale[target])[:, adapter].tolist()):
            name = module_name(layer, target)
            ranks[name] = a.shape[-2]
            alphas[name] = round(scale * a.shape[-2], 6)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{target}_proj" for target in ATTENTION if target in lora.a],
        "target_parameters": [f"mlp.experts.{target}_proj" for target in EXPERTS if target in lora.a] or None,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def tensors(lora: LoraWeights, adapter: int) -> dict[str, np.ndarray]:
    """adapter_model.safetensors."""
    on_experts = [target for target in EXPERTS if target in lora.a]
    # PEFT wraps the experts once for each parameter: the first is inside.
    modules = dict(zip(on_experts, ["mlp.experts.base_layer", "mlp.experts"][-len(on_experts) :], strict=False))
    found = {}
    for target, a in lora.a.items():
        for layer in range(a.shape[0]):
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
