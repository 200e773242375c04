"""Adds an adapter to a checkpoint's weights, layer by layer, and writes them: all in bfloat16, or experts in MXFP4."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jmoe.adapters.settings import LoraBLayout
from jmoe.checkpoint.config_file import model_entries
from jmoe.checkpoint.directory import EMBEDDING, INDEX, Checkpoint
from jmoe.checkpoint.moe_layer import load_moe_layer
from jmoe.files import copy, replace, write_tensors
from jmoe.gpt_oss.adapter import load_adapter
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.load import HEAD, NORM, attention_specs, check_layers, local_directory, steps
from jmoe.gpt_oss.weights import ATTENTION, EXPERTS, TARGETS, LoraWeights, sizes
from jmoe.ops.mxfp4 import BLOCK, NAN_SCALE, Mxfp4, dequantize, quantize

type Format = Literal["bfloat16", "mxfp4"]
"""What merged experts are written in; everything else is bfloat16."""

COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")
"""What the merged model needs as it was."""

QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""config.json's quantization_config as OpenAI's files have it, for checkpoints whose experts were dense."""


class LowRankDelta(NamedTuple):
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
    """One target of one layer: its delta's Frobenius norm, and what is left of it in either format.

    mxfp4: None on attention, which gpt-oss does not quantise, and on experts of no whole blocks.
    """

    layer: int
    target: str
    norm: float
    bfloat16: Rounding
    mxfp4: Rounding | None


class MergeReport(NamedTuple):
    """Every target and layer that the adapter changes, and what experts were written in. Printed, a table."""

    rows: tuple[Merged, ...]
    format: Format = "bfloat16"

    @property
    def below_rounding(self) -> tuple[Merged, ...]:
        """The rows in which what was written differs from W + D by more than D itself."""
        return tuple(row for row in self.rows if self.written(row).error > 1)

    def written(self, row: Merged) -> Rounding:
        """What the format that was written left of a row's delta."""
        return row.mxfp4 if self.format == "mxfp4" and row.mxfp4 is not None else row.bfloat16

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
    format: Format = "bfloat16",
    progress: bool = True,
    lora_b_layout: LoraBLayout | None = None,
) -> MergeReport:
    """Writes the model with one adapter added to its weights, in Hugging Face's layout.

    W + scale * B A is summed in float32 and rounded once. One layer is held at a time and is a file of its own; the
    index comes last, so that a directory that was not finished does not load.

    Args:
      path: as in jmoe.gpt_oss.load.
      adapter: a PEFT adapter's directory, or adapters that were loaded.
      out: a directory, new or empty.
      adapter_index: which of those that stand side by side.
      format: "bfloat16": experts are dense, [E, in, out], and config.json has no quantization_config. "mxfp4": they are
        rounded to MXFP4 by jmoe.quantize and written as OpenAI's files have them, `*_blocks` and `*_scales`; bytes of
        experts that the adapter leaves alone stay as they are. MXFP4's rounding may well be larger than the delta:
        see the report.
      progress: show a bar on a terminal.
      lora_b_layout: of an adapter's directory that does not say it; see jmoe.gpt_oss.load_adapter.

    Returns:
      How much of each delta is left in what was written, and how much would be in the other format.

    Raises:
      FileNotFoundError, ValueError: as jmoe.gpt_oss.load; the adapter or format does not exist; a sum is not finite;
        MXFP4 cannot hold experts of this width.
      FileExistsError: out is not empty.
      OSError: a file cannot be written; the error names it.
    """
    if format not in ("bfloat16", "mxfp4"):
        raise ValueError(f"format must be 'bfloat16' or 'mxfp4', got {format!r}")
    directory, folder = local_directory(path), Path(out)
    config = Config.load(directory)
    checkpoint = Checkpoint(directory)
    check_layers(checkpoint, config, stacked=False)
    lora = adapter_of(adapter, config, lora_b_layout)
    check_adapter(lora, config, adapter_index)
    if format == "mxfp4":
        check_blocks(config)
    make_empty(folder)
    layers = config.num_hidden_layers
    shards = Shards(folder, layers)
    rows: list[Merged] = []
    for layer in steps(layers + 1, f"merging {directory.name}", progress):
        if layer < layers:
            tensors, of_layer = merge_layer(checkpoint, config, layer, layer_deltas(lora, layer, adapter_index), format)
            rows += of_layer
        else:
            tensors = {name: checkpoint.tensor(name) for name in (EMBEDDING, NORM, HEAD)}
        shards.write(layer, tensors)
    replace(folder / "config.json", json.dumps(settings(directory, format), indent=2).encode())
    for pattern in COPIED:
        for source in filter(Path.is_file, directory.glob(pattern)):
            copy(source, folder / source.name)
    shards.write_index()
    return MergeReport(tuple(rows), format)


def adapter_of(
    adapter: str | os.PathLike[str] | LoraWeights, config: Config, lora_b_layout: LoraBLayout | None
) -> LoraWeights:
    """Adapters that were loaded, or a directory's.

    Raises:
      FileNotFoundError, ValueError: as load_adapter; lora_b_layout is given with adapters that were loaded.
    """
    if not isinstance(adapter, LoraWeights):
        return load_adapter(adapter, config, lora_b_layout=lora_b_layout)
    if lora_b_layout is not None:
        raise ValueError(f"lora_b_layout is for a directory, got {lora_b_layout!r} with adapters that were loaded")
    return adapter


def make_empty(folder: Path) -> None:
    """Makes the folder unless it exists; raises FileExistsError if something is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a merged model is written to a new directory")


class Shards:
    """A checkpoint's safetensors files, written one after another, and their index."""

    def __init__(self, folder: Path, last: int) -> None:
        """None written yet; last: the number of the last, from 0."""
        self._folder = folder
        self._last = last
        self._file_of: dict[str, str] = {}
        self._size = 0

    def write(self, number: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes one file; OSError names it."""
        file = f"model-{number:05}-of-{self._last:05}.safetensors"
        write_tensors(self._folder / file, tensors)
        self._file_of |= dict.fromkeys(tensors, file)
        self._size += sum(tensor.nbytes for tensor in tensors.values())

    def write_index(self) -> None:
        """Writes what makes the directory a checkpoint: which file each tensor is in."""
        index = {"metadata": {"total_size": self._size}, "weight_map": self._file_of}
        replace(self._folder / INDEX, json.dumps(index, indent=2).encode())


def settings(directory: Path, format: Format) -> dict[str, Any]:
    """config.json of the merged model, in Hugging Face's names whatever the model's is in."""
    entries = dict(model_entries(directory))
    given = entries.pop("quantization_config", None)
    quantization = (
        given if given and isinstance(given, dict) else QUANTIZATION
    )  # jmoe reads the method's name alone too
    entries |= {name: "bfloat16" for name in ("dtype", "torch_dtype") if name in entries}
    return entries | ({"quantization_config": quantization} if format == "mxfp4" else {})


def check_blocks(config: Config) -> None:
    """Raises ValueError unless experts' rows are whole MXFP4 blocks."""
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % BLOCK:
            raise ValueError(
                f"format 'mxfp4' packs blocks of {BLOCK} values, so {name} must be a multiple of it, "
                f"got {getattr(config, name)}"
            )


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


def layer_deltas(lora: LoraWeights, layer: int, adapter: int) -> dict[str, LowRankDelta]:
    """One adapter on one layer, without what it leaves alone."""
    return {
        target: LowRankDelta(lora.a[target][layer, adapter], lora.b[target][layer, adapter], scale[layer, adapter])
        for target, scale in lora.scale.items()
        if scale[layer, adapter] != 0
    }


def merge_layer(
    checkpoint: Checkpoint, config: Config, layer: int, factors: Mapping[str, LowRankDelta], format: Format
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
            weight, sums = add_to_experts(getattr(moe.experts, target), own, format)
        if not is_finite(weight):
            kind = "MXFP4" if isinstance(weight, Mxfp4) else "bfloat16"
            raise ValueError(f"{checkpoint.path}: {name} is not finite in {kind} with the adapter added to it")
        if isinstance(weight, Mxfp4):
            tensors |= {f"{name}_blocks": np.asarray(weight.blocks), f"{name}_scales": np.asarray(weight.scales)}
        else:
            tensors[name] = np.asarray(weight)
        if sums is not None and (row := merged(layer, target, sums)) is not None:
            rows.append(row)
    return tensors, rows


def is_finite(weight: Mxfp4 | Array) -> bool:
    """Whether all values are."""
    return bool((weight.scales != NAN_SCALE).all() if isinstance(weight, Mxfp4) else jnp.isfinite(weight).all())


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


def add_to_experts(
    weight: Mxfp4 | Float[Array, "E N K"], factors: LowRankDelta | None, format: Format
) -> tuple[Mxfp4 | Float[Array, "E K N"], Sums | None]:
    """(the experts with the delta, in bfloat16 columns first; sums). MXFP4 that nothing is added to stays as it is."""
    if format == "mxfp4" and factors is None and isinstance(weight, Mxfp4):
        return weight, None
    return add_to_each_expert(weight, factors, format)


@functools.partial(jax.jit, static_argnames="format")
def add_to_each_expert(
    weight: Mxfp4 | Float[Array, "E N K"], factors: LowRankDelta | None, format: Format
) -> tuple[Mxfp4 | Float[Array, "E K N"], Sums | None]:
    """As above, one expert after another, as their float32 sums are large."""

    def one_expert(own: tuple[Any, tuple[Array, Array] | None]) -> tuple[Mxfp4 | Array, Sums | None]:
        weight, pair = own
        of_one = None if pair is None or factors is None else LowRankDelta(*pair, factors.scale)
        total, sums = add_to_matrix(weight, of_one, requantize=True, format=format)
        return total if isinstance(total, Mxfp4) else total.T, sums

    return lax.map(one_expert, (weight, None if factors is None else factors[:2]))


@functools.partial(jax.jit, static_argnames=("requantize", "format"))
def add_to_matrix(
    weight: Mxfp4 | Float[Array, "N K"], factors: LowRankDelta | None, *, requantize: bool, format: Format = "bfloat16"
) -> tuple[Mxfp4 | Float[Array, "N K"], Sums | None]:
    """(W + scale * B A in the format, sums that say how much of the delta is left)."""
    wide = dequantize(weight, jnp.float32) if isinstance(weight, Mxfp4) else weight.astype(jnp.float32)
    if factors is None:
        delta, total = None, wide
    else:
        a, b = (factor.astype(jnp.float32) for factor in factors[:2])
        delta = factors.scale * jnp.matmul(b, a, precision=lax.Precision.HIGHEST)
        total = wide + delta
    in_bfloat16 = total.astype(jnp.bfloat16)
    in_mxfp4 = None
    if requantize and (format == "mxfp4" or total.shape[-1] % BLOCK == 0):
        in_mxfp4 = jax.tree.map(lambda part: part[0], quantize(total[None]))
    written = in_mxfp4 if format == "mxfp4" and in_mxfp4 is not None else in_bfloat16
    if delta is None:
        return written, None

    def rounded(to: Array) -> tuple[Array, Array]:
        to = to.astype(jnp.float32)
        return jnp.sum(jnp.square(to - total)), jnp.sum((to - wide) * delta)

    of_mxfp4 = None if in_mxfp4 is None else rounded(dequantize(in_mxfp4, jnp.float32))
    return written, Sums(jnp.sum(jnp.square(delta)), rounded(in_bfloat16), of_mxfp4)
