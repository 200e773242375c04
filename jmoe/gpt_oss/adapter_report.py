"""What an adapter's file holds, and how much of what it changes is left where weights are summed in bfloat16."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.adapters.file import AdapterFile, open_adapter
from jmoe.adapters.keys import FORMS
from jmoe.adapters.settings import LoraBLayout
from jmoe.adapters.sizes import sizes_of_adapter
from jmoe.checkpoint import Checkpoint, load_moe_layer
from jmoe.gpt_oss.adapter import check_change, model_sizes, read_adapter
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.delta import DeltaReport, delta_report
from jmoe.gpt_oss.merge import LowRankDelta, Merged, Sums, add_to_matrix, layer_deltas, merged
from jmoe.gpt_oss.weights import ATTENTION, TARGETS, LoraWeights

LAYERS, EXPERTS = 3, 4
"""How many of a target's layers, and of their experts, are summed with the weights."""


AXES = {
    False: "as most PEFT have them",
    True: "in and out exchanged, as some PEFT have them",
    None: "read as most PEFT have them; shapes fit in and out exchanged as well",
}
"""What AdapterFile.is_swapped says."""


class TargetReport(NamedTuple):
    """LoRA on one target.

    layers: those with LoRA, of all. ranks, scales, dtypes: those that occur, the dtypes as safetensors spells them.
    norm: the Frobenius norm of scale * B A over all layers and experts.
    in_bfloat16: that of the sampled weights' deltas, and what bfloat16 leaves of them; None without a model.
    relative: norm of those deltas over the norm of the weights; None without a model.
    """

    target: str
    layers: tuple[int, int]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dtypes: tuple[str, ...]
    norm: float
    in_bfloat16: Merged | None
    relative: float | None


class AdapterReport(NamedTuple):
    """An adapter's directory.

    facts: what was found and what it means, for people. sampled: which weights were summed with their deltas.
    size: bytes that the factors take in a model. shapes: their forms.
    """

    path: Path
    facts: dict[str, str]
    targets: tuple[TargetReport, ...]
    sampled: str | None
    size: int
    shapes: LoraWeights


def examine_adapter(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint | None = None,
    config: Config | None = None,
    *,
    lora_b_layout: LoraBLayout | None = None,
) -> AdapterReport:
    """What an adapter holds; with its model, how much of it a sum in bfloat16 leaves.

    For the latter the sums of a few weights are formed, one after another: of up to 3 layers, first, last and between,
    and of up to 4 experts of each.

    Args:
      checkpoint, config: the model; without it sizes are those that the adapter's shapes tell.
      lora_b_layout: as in jmoe.gpt_oss.load_adapter.

    Warns, Raises: as jmoe.gpt_oss.load_adapter.
    """
    sizes = sizes_of_adapter(path) if config is None else model_sizes(config)
    with open_adapter(path, sizes, lora_b_layout=lora_b_layout) as adapter:
        lora = read_adapter(adapter)
    check_change(adapter.file, lora)
    changes = delta_report(lora)
    samples = {} if checkpoint is None else sample(checkpoint, lora)
    targets = tuple(
        target_report(adapter, target, changes, samples.get(target)) for target in TARGETS if target in lora.a
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
    said = None if checkpoint is None else f"up to {LAYERS} layers, {EXPERTS} experts of each"
    return AdapterReport(
        Path(path), facts_of(adapter, lora_b_layout), targets, said, size, jax.eval_shape(lambda: lora)
    )


def facts_of(adapter: AdapterFile, asked: LoraBLayout | None) -> dict[str, str]:
    """What is the same for all targets."""
    facts = {"base model": adapter.settings.base_model or "adapter_config.json does not say"}
    if adapter.form is None:
        return facts | {"experts": "no LoRA on them"}
    shared = sorted(
        {
            f"{factor} of {pair.target}"
            for of_module in adapter.pairs.values()
            for pair in of_module
            for factor, key in (("lora_A", pair.a), ("lora_B", pair.b))
            if len(adapter.specs[key].shape) == 3 and adapter.specs[key].shape[0] == 1 < adapter.sizes.experts
        }
    )
    return facts | {
        "experts' keys": FORMS[adapter.form],
        "columns of lora_B": columns(adapter, asked),
        "axes": AXES[adapter.is_swapped],
        "shared by all experts": ", ".join(shared) or "nothing",
    }


def columns(adapter: AdapterFile, asked: LoraBLayout | None) -> str:
    """The order of lora_B's columns, and how it was told."""
    if not adapter.orders_differ:
        return "in no order that could be mistaken"
    if adapter.settings.lora_b_layout is not None:
        return f"{adapter.lora_b_layout}, as adapter_config.json says"
    if asked is not None:
        return f"{adapter.lora_b_layout}, as it was asked for; adapter_config.json does not say"
    if adapter.settings.unsloth_fixed:
        return f"{adapter.lora_b_layout}, as PEFT reads it; Unsloth, whose mark it has, may have grouped it by expert"
    return f"{adapter.lora_b_layout}, PEFT's order; adapter_config.json does not say"


def target_report(adapter: AdapterFile, target: str, changes: DeltaReport, sampled: "Sample | None") -> TargetReport:
    """One target of the report."""
    layers = range(adapter.sizes.layers)
    pairs = [pair for layer in layers for pair in adapter.pairs_on(layer, target)]
    return TargetReport(
        target,
        (len({pair.layer for pair in pairs}), len(layers)),
        tuple(sorted({adapter.settings.rank(*pair.names) for pair in pairs})),
        tuple(sorted({adapter.settings.scale(*pair.names) for pair in pairs})),
        tuple(sorted({adapter.specs[key].dtype for pair in pairs for key in (pair.a, pair.b)})),
        float(np.linalg.norm(changes.norms[target].astype(np.float64))),
        None if sampled is None else sampled.in_bfloat16,
        None if sampled is None else sampled.relative,
    )


class Sample(NamedTuple):
    """Some weights of a target and their deltas; see TargetReport."""

    in_bfloat16: Merged
    relative: float


def sample(checkpoint: Checkpoint, lora: LoraWeights) -> dict[str, Sample]:
    """What a sum in bfloat16 leaves of the deltas on some weights of each target."""
    layers = {target: spread(np.flatnonzero(np.asarray(scale)[:, 0]), LAYERS) for target, scale in lora.scale.items()}
    sums: dict[str, list[tuple[Sums, float]]] = {}
    for layer in sorted({layer for chosen in layers.values() for layer in chosen}):
        factors = {target: own for target, own in layer_deltas(lora, layer, 0).items() if layer in layers[target]}
        experts = None
        if any(target not in ATTENTION for target in factors):
            experts = load_moe_layer(checkpoint, layer, on_host=True).experts
        for target, own in factors.items():
            if target in ATTENTION:
                name = f"model.layers.{layer}.self_attn.{target}_proj.weight"
                sums.setdefault(target, []).append(sums_of(checkpoint.tensor(name), own))
                continue
            weight = getattr(experts, target)
            for expert in spread(range(own.a.shape[0]), EXPERTS):
                one = LowRankDelta(own.a[expert], own.b[expert], own.scale)
                of_expert = jax.tree.map(lambda leaf, expert=expert: leaf[expert], weight)
                sums.setdefault(target, []).append(sums_of(of_expert, one))
    found = {}
    for target, of_target in sums.items():
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(of for of, _ in of_target))
        if (row := merged(-1, target, stacked)) is not None:
            found[target] = Sample(row, row.norm / sum(square for _, square in of_target) ** 0.5)
    return found


def sums_of(weight: object, factors: LowRankDelta) -> tuple[Sums, float]:
    """(the sums of a weight with its delta, the weight's squared norm)."""
    weight = jax.tree.map(jnp.asarray, weight)
    _, sums = add_to_matrix(weight, factors, requantize=False)
    unchanged, _ = add_to_matrix(weight, None, requantize=False)
    assert sums is not None
    return jax.tree.map(np.asarray, sums), float(jnp.sum(jnp.square(unchanged.astype(jnp.float32))))


def spread(numbers: Iterable[int], most: int) -> Sequence[int]:
    """Some of the numbers, first and last among them."""
    every = list(map(int, numbers))
    places = np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(int)
    return [every[place] for place in places]
