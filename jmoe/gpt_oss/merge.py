"""Adds an adapter to a checkpoint's weights, layer by layer, and writes them in bfloat16."""

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jmoe.adapters.settings import LoraBLayout
from jmoe.checkpoint import EMBEDDING, INDEX, Checkpoint, load_moe_layer, read_json
from jmoe.gpt_oss.adapter import load_adapter
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.load import HEAD, NORM, attention_specs, check_layers, local_directory, steps
from jmoe.gpt_oss.save import write_tensors
from jmoe.gpt_oss.weights import ATTENTION, EXPERTS, TARGETS, LoraWeights, sizes
from jmoe.ops.mxfp4 import Mxfp4, dequantize, quantize

COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")
"""What the merged model needs as it was."""


class Factors(NamedTuple):
    """One adapter on one target of one layer: a [(E,) r, K], b [(E,) N, r], scale []."""

    a: Array
    b: Array
    scale: Array


class Sums(NamedTuple):
    """Sums of products of a delta D, of a weight W and of W + D rounded, float32 [E] or [].

    delta: <D, D>. of_bfloat16, of_mxfp4: (||rounded - (W + D)||², <rounded - W, D>), the latter None on attention.
    """

    delta: Array
    of_bfloat16: tuple[Array, Array]
    of_mxfp4: tuple[Array, Array] | None


class Rounding(NamedTuple):
    """What rounding W + D does to D.

    error: ||rounded - (W + D)|| / ||D||. survives: <rounded - W, D> / <D, D>, 1 if all of D is there.
    """

    error: float
    survives: float


class Merged(NamedTuple):
    """One target of one layer: its delta's Frobenius norm, as written in bfloat16, and if it were MXFP4 again.

    mxfp4: None on attention, which gpt-oss does not quantise.
    """

    layer: int
    target: str
    norm: float
    bfloat16: Rounding
    mxfp4: Rounding | None


class MergeReport(NamedTuple):
    """Every target and layer that the adapter changes. Printed, a table."""

    rows: tuple[Merged, ...]

    def __str__(self) -> str:
        head = "layer  target    norm of D  bf16: error / D  survives  MXFP4: error / D  survives"
        lines = [
            f"{row.layer:5}  {row.target:7}  {row.norm:10.3e}  {row.bfloat16.error:15.3e}  {row.bfloat16.survives:8.3f}"
            + ("" if row.mxfp4 is None else f"  {row.mxfp4.error:16.3e}  {row.mxfp4.survives:8.3f}")
            for row in self.rows
        ]
        return "\n".join([head, *lines])


def merge(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | LoraWeights,
    out: str | os.PathLike[str],
    *,
    adapter_index: int = 0,
    progress: bool = True,
    lora_b_layout: LoraBLayout | None = None,
) -> MergeReport:
    """Writes the model with one adapter added to its weights, all in bfloat16, in Hugging Face's dense layout.

    W + scale * B A is summed in float32 and rounded once. One layer is held at a time and is a file of its own; the
    index comes last, so that a directory that was not finished does not load.

    Args:
      path: as in jmoe.gpt_oss.load.
      adapter: a PEFT adapter's directory, or adapters that were loaded.
      out: a directory, new or empty.
      adapter_index: which of those that stand side by side.
      progress: show a bar on a terminal.
      lora_b_layout: of an adapter's directory that does not say it; see jmoe.gpt_oss.load_adapter.

    Returns:
      How much of each delta bfloat16 keeps, and how much MXFP4 would if the experts were quantised again.

    Raises:
      FileNotFoundError, ValueError: as jmoe.gpt_oss.load; there is no such adapter; a sum is not finite.
      FileExistsError: out is not empty.
      OSError: a file cannot be written.
    """
    directory, folder = local_directory(path), Path(out)
    config = Config.load(directory)
    checkpoint = Checkpoint(directory)
    check_layers(checkpoint, config)
    if isinstance(adapter, LoraWeights):
        if lora_b_layout is not None:
            raise ValueError(f"lora_b_layout is for a directory, got {lora_b_layout!r} with adapters that were loaded")
        lora = adapter
    else:
        lora = load_adapter(adapter, config, lora_b_layout=lora_b_layout)
    check_adapter(lora, config, adapter_index)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a merged model is written to a new directory")
    layers = config.num_hidden_layers
    files: dict[str, str] = {}
    rows: list[Merged] = []
    size = 0
    for layer in steps(layers + 1, f"merging {directory.name}", progress):
        if layer < layers:
            tensors, of_layer = merge_layer(checkpoint, config, layer, own_factors(lora, layer, adapter_index))
            rows += of_layer
        else:
            tensors = {name: checkpoint.tensor(name) for name in (EMBEDDING, NORM, HEAD)}
        file = f"model-{layer:05}-of-{layers:05}.safetensors"
        write_tensors(folder / file, tensors)
        files |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    settings = {
        key: value for key, value in read_json(directory / "config.json").items() if key != "quantization_config"
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    for pattern in COPIED:
        for source in directory.glob(pattern):
            shutil.copyfile(source, folder / source.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=2))
    return MergeReport(tuple(rows))


def check_adapter(lora: LoraWeights, config: Config, index: int) -> None:
    """Raises ValueError unless there is such an adapter and it fits the model."""
    adapters = next(iter(lora.scale.values())).shape[1]
    if not 0 <= index < adapters:
        raise ValueError(f"adapter_index must be in [0, {adapters}), got {index}")
    for target, (n, k) in sizes(config).items():
        if target in lora.a:
            experts = (config.num_local_experts,) if target in EXPERTS else ()
            wanted = (config.num_hidden_layers, *experts, n, k)
            a, b = lora.a[target], lora.b[target]
            got = (a.shape[0], *a.shape[2:-2], b.shape[-2], a.shape[-1])
            if got != wanted:
                raise ValueError(f"LoRA on {target} must be for (layers, ..., N, K) {wanted}, got {got}")


def own_factors(lora: LoraWeights, layer: int, adapter: int) -> dict[str, Factors]:
    """One adapter on one layer, without what it leaves alone."""
    return {
        target: Factors(lora.a[target][layer, adapter], lora.b[target][layer, adapter], scale[layer, adapter])
        for target, scale in lora.scale.items()
        if scale[layer, adapter] != 0
    }


def merge_layer(
    checkpoint: Checkpoint, config: Config, layer: int, factors: Mapping[str, Factors]
) -> tuple[dict[str, np.ndarray], list[Merged]]:
    """(one layer's tensors as the merged model names them, what was merged)."""
    prefix = f"model.layers.{layer}."
    moe = load_moe_layer(checkpoint, layer)
    tensors = {name: checkpoint.tensor(name) for name in attention_specs(config, layer)} | {
        f"{prefix}post_attention_layernorm.weight": np.asarray(moe.norm_weight),
        f"{prefix}mlp.router.weight": np.asarray(moe.router_weight),
        f"{prefix}mlp.router.bias": np.asarray(moe.router_bias),
    }
    rows = []
    for target in TARGETS:
        own = factors.get(target)
        if target in ATTENTION:
            if own is None:
                continue
            name = f"{prefix}self_attn.{target}_proj.weight"
            weight, sums = add_to_matrix(jnp.asarray(tensors[name]), own, requantize=False)
        else:
            name = f"{prefix}mlp.experts.{target}_proj"
            tensors[f"{name}_bias"] = np.asarray(getattr(moe.experts, f"{target}_bias"))
            weight, sums = add_to_experts(getattr(moe.experts, target), own)
        if not jnp.isfinite(weight).all():
            raise ValueError(f"{checkpoint.path}: {name} is not finite in bfloat16 with the adapter added to it")
        tensors[name] = np.asarray(weight)
        if sums is not None and (row := merged(layer, target, sums)) is not None:
            rows.append(row)
    return tensors, rows


def merged(layer: int, target: str, sums: Sums) -> Merged | None:
    """A row of the report; None if nothing changed."""
    delta = float(np.asarray(sums.delta, np.float64).sum())
    if delta == 0:
        return None

    def rounding(of: tuple[Array, Array]) -> Rounding:
        square, along = (float(np.asarray(part, np.float64).sum()) for part in of)
        return Rounding((square / delta) ** 0.5, along / delta)

    mxfp4 = None if sums.of_mxfp4 is None else rounding(sums.of_mxfp4)
    return Merged(layer, target, delta**0.5, rounding(sums.of_bfloat16), mxfp4)


@jax.jit
def add_to_experts(weight: Mxfp4 | Array, factors: Factors | None) -> tuple[Float[Array, "E K N"], Sums | None]:
    """(the experts with the delta, bfloat16 and columns first, sums), one expert after another."""

    def one_expert(own: tuple[Mxfp4 | Array, tuple[Array, Array] | None]) -> tuple[Array, Sums | None]:
        weight, pair = own
        of_one = None if pair is None or factors is None else Factors(*pair, factors.scale)
        total, sums = add_to_matrix(weight, of_one, requantize=True)
        return total.T, sums

    return lax.map(one_expert, (weight, None if factors is None else factors[:2]))


@functools.partial(jax.jit, static_argnames="requantize")
def add_to_matrix(
    weight: Mxfp4 | Float[Array, "N K"], factors: Factors | None, *, requantize: bool
) -> tuple[Float[Array, "N K"], Sums | None]:
    """(W + scale * B A in bfloat16, sums that say how much of the delta is left)."""
    wide = dequantize(weight, jnp.float32) if isinstance(weight, Mxfp4) else weight.astype(jnp.float32)
    if factors is None:
        return wide.astype(jnp.bfloat16), None
    a, b = (factor.astype(jnp.float32) for factor in factors[:2])
    delta = factors.scale * jnp.matmul(b, a, precision=lax.Precision.HIGHEST)
    total = wide + delta

    def rounded(to: Array) -> tuple[Array, Array]:
        to = to.astype(jnp.float32)
        return jnp.sum(jnp.square(to - total)), jnp.sum((to - wide) * delta)

    in_bfloat16 = total.astype(jnp.bfloat16)
    again = rounded(dequantize(quantize(total[None]), jnp.float32)[0]) if requantize else None
    return in_bfloat16, Sums(jnp.sum(jnp.square(delta)), rounded(in_bfloat16), again)
