"""Adapters in the layouts that trainers write, from factors by expert; each of one effect."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PREFIX = "base_model.model.model.layers."
EXPERTS = ("gate_up", "down")

type Tensors = dict[str, np.ndarray]


def columns(b: np.ndarray, order: str) -> np.ndarray:
    """[E, out, r] -> [out, r * E], whose columns count (rank, expert) or (expert, rank)."""
    axes = (1, 2, 0) if order == "rank_major" else (1, 0, 2)
    return b.transpose(axes).reshape(b.shape[1], -1)


def as_parameters(layer: int, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], order: str) -> Tensors:
    """As PEFT writes target_parameters: gate_up's pair under base_layer where down has one too."""
    found = {}
    for target, (a, b) in factors.items():
        module = "experts.base_layer" if target == "gate_up" and len(factors) == 2 else "experts"
        found[f"{PREFIX}{layer}.mlp.{module}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
        found[f"{PREFIX}{layer}.mlp.{module}.lora_B.weight"] = columns(b, order)
    return found


def as_stacked(layer: int, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Tensors:
    """[E, r, in] and [E, out, r]."""
    return {
        f"{PREFIX}{layer}.mlp.experts.{target}_proj.lora_{part}.weight": factor
        for target, pair in factors.items()
        for part, factor in zip("AB", pair, strict=True)
    }


def as_pairs(layer: int, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], module: str) -> Tensors:
    """A pair for each expert; module: its name, of {expert} and {target}."""
    return {
        f"{PREFIX}{layer}.mlp.experts.{module.format(expert=e, target=target)}.lora_{part}.weight": factor[e]
        for target, pair in factors.items()
        for part, factor in zip("AB", pair, strict=True)
        for e in range(len(factor))
    }


def as_halves(layer: int, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Tensors:
    """As vLLM names them: w1 of gate, w2 of down, w3 of up."""
    (a, b), down = factors["gate_up"], factors["down"]
    halves = {"w1": (a, b[:, 0::2]), "w3": (a, b[:, 1::2]), "w2": down}
    return as_pairs(layer, halves, "{expert}.{target}")


def experts_of(tensors: Tensors, experts: int) -> Iterator[tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """(layer, factors of gate_up and down by expert) of an adapter that PEFT wrote on both."""
    for layer in sorted({int(key.removeprefix(PREFIX).split(".")[0]) for key in tensors}):
        factors = {}
        for target, module in (("gate_up", "base_layer."), ("down", "")):
            a, b = (tensors[f"{PREFIX}{layer}.mlp.experts.{module}lora_{part}.weight"] for part in "AB")
            factors[target] = (
                a.reshape(experts, -1, a.shape[1]),
                b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1),
            )
        yield layer, factors


def write(folder: Path, tensors: Tensors, settings: Mapping[str, Any]) -> Path:
    """An adapter's directory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, settings) of an adapter's directory."""
    return (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
