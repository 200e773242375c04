"""A PEFT adapter's LoRA on attention and experts of all layers."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jmoe.adapters.file import AdapterFile, Sizes, open_adapter
from jmoe.adapters.keys import module_names, parameter_name
from jmoe.adapters.settings import AdapterWarning, LoraBLayout, Settings
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.delta import delta_report, findings
from jmoe.gpt_oss.weights import ATTENTION, EXPERTS, TARGETS, LoraWeights, sizes


class TargetFactors(NamedTuple):
    """One layer's LoRA on one target: a [A, (E,) r, K], b [A, (E,) N, r], scale float32 [A]."""

    a: Array
    b: Array
    scale: Array


def load_adapter(
    path: str | os.PathLike[str], config: Config, *, lora_b_layout: LoraBLayout | None = None
) -> LoraWeights:
    """Reads a PEFT adapter directory: LoRA on q, k, v, o and on experts, of any of the layers, in any known layout.

    A layer without LoRA on a target that others have gets zeros, which change nothing, and ranks that differ between
    layers or experts are padded with zeros to the largest. float16 becomes float32. A factor that all experts share is
    repeated for each. docs/adapters.md lists the layouts of files.

    Args:
      lora_b_layout: how columns of lora_B count, where it holds all experts and adapter_config.json has no
        lora_B_layout: "rank_major", PEFT's order, or "grouped_by_expert", as Unsloth wrote before September 2026.

    Warns:
      AdapterWarning: adapter_config.json and the file do not have LoRA on the same; LoRA that the file has changes only
        part: gate's rows or up's alone, gate_up without down or down without gate_up, nothing in some layers or
        experts; lora_b_layout is None, and Unsloth may have written the other order.

    Raises:
      FileNotFoundError: adapter_config.json or adapter_model.safetensors does not exist.
      ValueError: a tensor or setting that this model does not know, is missing or does not fit; the message names it.
        lora_b_layout contradicts adapter_config.json. Factors that are not finite, or that change nothing, as those of
        an adapter that was never trained.
    """
    with open_adapter(path, model_sizes(config), lora_b_layout=lora_b_layout) as adapter:
        lora = read_adapter(adapter)
    check_change(adapter.file, lora)
    return lora


def load_adapters(
    paths: Sequence[str | os.PathLike[str]], config: Config, *, lora_b_layout: LoraBLayout | None = None
) -> LoraWeights | None:
    """Several adapters side by side; None of none.

    Args:
      lora_b_layout: as in load_adapter. Of several adapters it is for those whose adapter_config.json has no
        lora_B_layout; the others keep their own.

    Raises:
      ValueError: as load_adapter; lora_b_layout would be for adapters with Unsloth's mark and for others as well.
    """
    layouts = layouts_of(paths, lora_b_layout)
    adapters = [load_adapter(path, config, lora_b_layout=own) for path, own in zip(paths, layouts, strict=True)]
    return stack_adapters(adapters) if adapters else None


def layouts_of(paths: Sequence[str | os.PathLike[str]], lora_b_layout: LoraBLayout | None) -> list[LoraBLayout | None]:
    """What load_adapter takes as lora_b_layout for each of several adapters, where one was given for all.

    Raises:
      ValueError: as load_adapters.
    """
    if lora_b_layout is None or len(paths) == 1:
        return [lora_b_layout] * len(paths)
    settings = [Settings.load(Path(path) / "adapter_config.json") for path in paths]
    silent = [own.unsloth_fixed for own in settings if own.lora_b_layout is None]
    if len(set(silent)) > 1:
        raise ValueError(
            f"lora_b_layout {lora_b_layout!r} would be for adapters with and without Unsloth's mark, whose orders are "
            f"likely different, among {', '.join(map(str, paths))}: write them in one order by jmoe convert-adapter, "
            "or load each by itself"
        )
    return [lora_b_layout if own.lora_b_layout is None else None for own in settings]


def model_sizes(config: Config) -> Sizes:
    """What an adapter must fit."""
    return Sizes(config.num_hidden_layers, config.num_local_experts, sizes(config))


def read_adapter(adapter: AdapterFile) -> LoraWeights:
    """An open adapter's factors; what adapter_config.json lists and the file has not is warned of.

    Raises:
      ValueError: it has LoRA on nothing.
    """
    found: dict[str, list[TargetFactors | None]] = {
        target: [one_factors(adapter, layer, target) for layer in range(adapter.sizes.layers)] for target in TARGETS
    }
    if not adapter.pairs:
        raise ValueError(f"{adapter.file} has LoRA on nothing that this model has: it would change nothing")
    warn_of_settings(adapter, found)
    return stack_factors(found)


def one_factors(adapter: AdapterFile, layer: int, target: str) -> TargetFactors | None:
    """One target of one layer, as one adapter of several."""
    read = adapter.read(layer, target)
    if read is None:
        return None
    scale = np.array([read.scale], np.float32)
    return TargetFactors(jnp.asarray(read.a[None]), jnp.asarray(read.b[None]), jnp.asarray(scale))


def warn_of_settings(adapter: AdapterFile, found: dict[str, list[TargetFactors | None]]) -> None:
    """Warns where adapter_config.json and the file do not have LoRA on the same."""
    said = []
    if missing := list(missing_targets(adapter, found)):
        said.append(
            f"no tensors of {some_of(missing)}, though adapter_config.json has LoRA there: they are left as they are"
        )
    if untargeted := list(untargeted_modules(adapter.settings, found)):
        said.append(
            f"LoRA on {some_of(untargeted)}, which adapter_config.json does not target: jmoe applies it, PEFT does not"
        )
    if said:
        warnings.warn(f"{adapter.file} has {'; and '.join(said)}", AdapterWarning, stacklevel=4)


def untargeted_modules(settings: Settings, found: dict[str, list[TargetFactors | None]]) -> Iterator[str]:
    """The names of attention's modules with LoRA that adapter_config.json does not list."""
    for target in ATTENTION:
        for layer, factors in enumerate(found[target]):
            if factors is not None and not settings.lists_module(attention_module_name(layer, target)):
                yield attention_module_name(layer, target)


def some_of(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def attention_module_name(layer: int, target: str) -> str:
    """The name by which PEFT knows a linear module of attention."""
    return f"model.layers.{layer}.self_attn.{target}_proj"


def missing_targets(adapter: AdapterFile, found: dict[str, list[TargetFactors | None]]) -> Iterator[str]:
    """The names of what has LoRA by adapter_config.json and has none here; jmoe has none on some of it."""
    settings = adapter.settings
    yield from filter(settings.lists_module, ("lm_head", "model.embed_tokens"))
    for target, factors in found.items():
        layers = [layer for layer, there in enumerate(factors) if there is None]
        if target in EXPERTS:
            yield from (parameter_name(layer, target) for layer in layers if lists_experts(adapter, layer, target))
        else:
            yield from filter(settings.lists_module, (attention_module_name(layer, target) for layer in layers))
    routers = (f"model.layers.{layer}.mlp.router.weight" for layer in range(len(found["q"])))
    yield from filter(settings.lists_parameter, routers)


def lists_experts(adapter: AdapterFile, layer: int, target: str) -> bool:
    """Whether adapter_config.json has LoRA on a projection, in the way in which the file names experts.

    target_modules count where the file's modules have such names: gpt-oss itself has none, so that PEFT finds nothing
    by a down_proj that somebody's list has for other models' sake.
    """
    if adapter.form == "parameters":
        return target in adapter.settings.experts_listed(layer)
    names = [] if adapter.form is None else module_names(adapter.form, layer, target)
    return adapter.settings.lists_parameter(parameter_name(layer, target)) or any(
        map(adapter.settings.lists_module, names)
    )


def check_change(file: Path, lora: LoraWeights) -> None:
    """Raises or warns as load_adapter does for an adapter that changes nothing, or only part."""
    report = delta_report(lora)
    for target, norms in report.norms.items():
        for layer in np.argwhere(~np.isfinite(norms))[:1, 0].tolist():
            raise ValueError(f"{file}: LoRA on {target} of layer {layer} is not finite")
    if report.is_zero:
        raise ValueError(f"{file} changes nothing: its products B A are all zero, as before training")
    if odd := findings(report):
        lines = "\n  ".join(map(str, odd))
        warnings.warn(f"{file} changes only part of what it has LoRA on:\n  {lines}", AdapterWarning, stacklevel=3)


def stack_factors(found: dict[str, list[TargetFactors | None]]) -> LoraWeights:
    """All layers' factors, one on another, of the targets that have any."""
    stacked = {target: stack(factors) for target, factors in found.items() if any(f is not None for f in factors)}
    return lora_weights(stacked)


def lora_weights(factors: Mapping[str, TargetFactors]) -> LoraWeights:
    """All targets' factors, field by field."""
    return LoraWeights(
        *({target: getattr(f, field) for target, f in factors.items()} for field in TargetFactors._fields)
    )


def stack(factors: Sequence[TargetFactors | None]) -> TargetFactors:
    """One target's factors with a leading axis for the layers."""
    padded = alike(factors)
    zero = TargetFactors(*(jnp.zeros_like(leaf) for leaf in next(f for f in padded if f is not None)))
    return TargetFactors(*(jnp.stack([getattr(f or zero, field) for f in padded]) for field in TargetFactors._fields))


def alike(factors: Sequence[TargetFactors | None]) -> list[TargetFactors | None]:
    """The factors padded to the largest rank, in dtypes that hold all."""
    present = [f for f in factors if f is not None]
    rank = max(f.a.shape[-2] for f in present)
    dtype_a, dtype_b = (jnp.result_type(*(getattr(f, part).dtype for f in present)) for part in ("a", "b"))
    return [
        f and TargetFactors(pad(f.a.astype(dtype_a), -2, rank), pad(f.b.astype(dtype_b), -1, rank), f.scale)
        for f in factors
    ]


def pad(array: Array, axis: int, size: int) -> Array:
    """Zeros behind the array up to this size."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, padding)


def stack_adapters(adapters: Sequence[LoraWeights]) -> LoraWeights:
    """Several models' adapters side by side, for batches that mix them; adapter_ids count them in this order.

    A target that one of them leaves alone gets zeros there, and smaller ranks are padded with zeros. Factors of
    different dtypes become float32.

    Raises:
      ValueError: there are none, or they are for models of different sizes.
    """
    if not adapters:
        raise ValueError("stack_adapters needs at least one adapter, got none")
    models = {(a.shape[0], hidden_size(adapter, target)) for adapter in adapters for target, a in adapter.a.items()}
    if len(models) > 1:
        raise ValueError(f"adapters must be for models of one size, got (layers, hidden) {sorted(models)}")
    targets = [target for target in TARGETS if any(target in adapter.a for adapter in adapters)]
    joined = {target: join([factors_of(adapter, target) for adapter in adapters], target) for target in targets}
    return lora_weights(joined)


def hidden_size(adapter: LoraWeights, target: str) -> int:
    """The model's, which o and down write and the others read."""
    return adapter.b[target].shape[-2] if target in ("o", "down") else adapter.a[target].shape[-1]


def factors_of(adapter: LoraWeights, target: str) -> TargetFactors | None:
    """All layers' factors on one target, or None; the arrays' second axis counts adapters."""
    return TargetFactors(adapter.a[target], adapter.b[target], adapter.scale[target]) if target in adapter.a else None


def join(factors: Sequence[TargetFactors | None], target: str) -> TargetFactors:
    """One target's factors along the adapter axis."""
    present = [f for f in factors if f is not None]
    sizes_of = {(f.a.shape[0], *f.a.shape[2:-2], f.a.shape[-1], f.b.shape[-2]) for f in present}
    if len(sizes_of) > 1:
        raise ValueError(
            f"adapters must be for models of one size, got (layers, ..., K, N) {sorted(sizes_of)} on {target}"
        )
    padded = alike(factors)
    first = next(f for f in padded if f is not None)
    zero = TargetFactors(*(jnp.zeros_like(leaf[:, :1]) for leaf in first))
    return TargetFactors(
        *(jnp.concatenate([getattr(f or zero, field) for f in padded], axis=1) for field in TargetFactors._fields)
    )
