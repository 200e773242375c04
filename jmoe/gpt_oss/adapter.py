"""A PEFT adapter's LoRA on attention and experts of all layers."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import safe_open

from jmoe.adapters import Settings, load_lora, suffixes_by_layer
from jmoe.checkpoint import open_safetensors, tensor_spec
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.delta import AdapterWarning, delta_report, findings
from jmoe.gpt_oss.weights import EXPERTS, TARGETS, LoraWeights, sizes

_ATTENTION_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.lora_([AB])\.weight")
_MLP_KEY = re.compile(r"base_model\.model\.model\.layers\.\d+\.mlp\.experts\..+")


class Factors(NamedTuple):
    """One layer's LoRA on one target: a [A, (E,) r, K], b [A, (E,) N, r], scale float32 [A]."""

    a: Array
    b: Array
    scale: Array


def load_adapter(path: str | os.PathLike[str], config: Config) -> LoraWeights:
    """Reads a PEFT adapter directory: LoRA on q, k, v, o and on experts, of any of the layers.

    A layer without LoRA on a target that others have gets zeros, which change nothing, and ranks that differ between
    layers are padded with zeros to the largest.

    Warns:
      AdapterWarning: adapter_config.json has LoRA on something that the file has no tensors of; LoRA that the file has
        changes only part: gate's rows or up's alone, gate_up without down or down without gate_up, nothing in some
        layers or experts.

    Raises:
      FileNotFoundError: adapter_config.json or adapter_model.safetensors does not exist.
      ValueError: a tensor or setting that this model does not know, is missing or does not fit; the message names it.
        Factors that are not finite, or that change nothing, as those of an adapter that was never trained.
    """
    settings = Settings.load(Path(path) / "adapter_config.json")
    file = Path(path) / "adapter_model.safetensors"
    layers = range(config.num_hidden_layers)
    found: dict[str, list[Factors | None]] = {target: [None for _ in layers] for target in TARGETS}
    with open_safetensors(file) as shard:
        keys = list(shard.keys())
        for key in keys:
            match = _ATTENTION_KEY.fullmatch(key)
            if match is None and not _MLP_KEY.fullmatch(key):
                raise ValueError(
                    f"{file} has {key}, but jmoe has no LoRA there: only on attention's q_proj, k_proj, v_proj and "
                    "o_proj and on the experts' gate_up_proj and down_proj"
                )
            if match is not None:
                if int(match[1]) not in layers:
                    raise ValueError(f"{file}: {key} is of a layer past the model's {config.num_hidden_layers}")
                if match[3] == "A":
                    found[match[2]][int(match[1])] = attention_factors(file, shard, settings, config, key)
                elif key.replace("lora_B", "lora_A") not in keys:
                    raise ValueError(f"{file} has no tensor {key.replace('lora_B', 'lora_A')}, though it has {key}")
    for layer in suffixes_by_layer(keys):
        if layer not in layers:
            raise ValueError(
                f"{file} has LoRA on experts of layer {layer}, past the model's {config.num_hidden_layers}"
            )
        on_experts = load_lora(path, config, layer)
        for target in EXPERTS:
            a, b, scale = (getattr(on_experts, f"{target}_{part}") for part in ("a", "b", "scale"))
            if a is not None and b is not None and scale is not None:
                found[target][layer] = Factors(a, b, scale)
    warn_of_missing(file, settings, found)
    lora = stack_factors(found, config)
    check_change(file, lora)
    return lora


def warn_of_missing(file: Path, settings: Settings, found: dict[str, list[Factors | None]]) -> None:
    """Warns of what adapter_config.json has LoRA on and the file has no tensors of."""
    if missing := list(missing_targets(settings, found)):
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        warnings.warn(
            f"{file} has no tensors of {', '.join(missing[:8])}{more}, though adapter_config.json has LoRA there: they "
            "are left as they are",
            AdapterWarning,
            stacklevel=3,
        )


def missing_targets(settings: Settings, found: dict[str, list[Factors | None]]) -> Iterator[str]:
    """The names of what has LoRA by adapter_config.json and has none here; jmoe has none on some of it."""
    yield from filter(settings.lists_module, ("lm_head", "model.embed_tokens"))
    for target, factors in found.items():
        layers = [f"model.layers.{layer}" for layer, there in enumerate(factors) if there is None]
        if target in EXPERTS:
            yield from filter(settings.lists_parameter, (f"{layer}.mlp.experts.{target}_proj" for layer in layers))
        else:
            yield from filter(settings.lists_module, (f"{layer}.self_attn.{target}_proj" for layer in layers))
    routers = (f"model.layers.{layer}.mlp.router.weight" for layer in range(len(found["q"])))
    yield from filter(settings.lists_parameter, routers)


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


def attention_factors(file: Path, shard: safe_open, settings: Settings, config: Config, key_a: str) -> Factors:
    """One module's pair, by the key of its A."""
    key_b = key_a.replace("lora_A", "lora_B")
    name = key_a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    rank = settings.rank(name)
    n, k = sizes(config)[name.rsplit(".", 1)[1][0]]
    for key, shape in ((key_a, (rank, k)), (key_b, (n, rank))):
        if key not in shard.keys():  # noqa: SIM118  the handle itself is no container
            raise ValueError(f"{file} has no tensor {key}, though it has {key_a}")
        spec = tensor_spec(shard, key)
        if spec.shape != shape or spec.dtype not in ("F32", "BF16"):
            raise ValueError(f"{file}: {key} must be F32 or BF16 {shape} by adapter_config.json, got {spec}")
    a, b = (jnp.asarray(shard.get_tensor(key))[None] for key in (key_a, key_b))
    return Factors(a, b, jnp.asarray(np.array([settings.scale(name)], np.float32)))


def stack_factors(found: dict[str, list[Factors | None]], config: Config) -> LoraWeights:
    """All layers' factors, one on another.

    Raises:
      ValueError: there are none at all.
    """
    stacked = {target: stack(factors) for target, factors in found.items() if any(f is not None for f in factors)}
    if not stacked:
        raise ValueError("the adapter has LoRA on nothing that this model has: it would change nothing")
    return LoraWeights(*({target: getattr(f, field) for target, f in stacked.items()} for field in Factors._fields))


def stack(factors: Sequence[Factors | None]) -> Factors:
    """One target's factors with a leading axis for the layers."""
    present = [f for f in factors if f is not None]
    rank = max(f.a.shape[-2] for f in present)
    dtype = jnp.result_type(*(f.a.dtype for f in present))
    padded = [
        None
        if f is None
        else Factors(pad(f.a.astype(dtype), -2, rank), pad(f.b.astype(dtype), -1, rank), f.scale.astype(jnp.float32))
        for f in factors
    ]
    zero = Factors(*(jnp.zeros_like(leaf) for leaf in next(f for f in padded if f is not None)))
    return Factors(*(jnp.stack([getattr(f or zero, field) for f in padded]) for field in Factors._fields))


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
    return LoraWeights(*({target: getattr(f, field) for target, f in joined.items()} for field in Factors._fields))


def hidden_size(adapter: LoraWeights, target: str) -> int:
    """The model's, which o and down write and the others read."""
    return adapter.b[target].shape[-2] if target in ("o", "down") else adapter.a[target].shape[-1]


def factors_of(adapter: LoraWeights, target: str) -> Factors | None:
    """All layers' factors on one target, or None; the arrays' second axis counts adapters."""
    return Factors(adapter.a[target], adapter.b[target], adapter.scale[target]) if target in adapter.a else None


def join(factors: Sequence[Factors | None], target: str) -> Factors:
    """One target's factors along the adapter axis."""
    present = [f for f in factors if f is not None]
    sizes_of = {(f.a.shape[0], *f.a.shape[2:-2], f.a.shape[-1], f.b.shape[-2]) for f in present}
    if len(sizes_of) > 1:
        raise ValueError(
            f"adapters must be for models of one size, got (layers, ..., K, N) {sorted(sizes_of)} on {target}"
        )
    rank = max(f.a.shape[-2] for f in present)
    dtypes = {f.a.dtype for f in present}
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.float32
    padded = [
        None if f is None else Factors(pad(f.a.astype(dtype), -2, rank), pad(f.b.astype(dtype), -1, rank), f.scale)
        for f in factors
    ]
    first = next(f for f in padded if f is not None)
    zero = Factors(*(jnp.zeros_like(leaf[:, :1]) for leaf in first))
    return Factors(*(jnp.concatenate([getattr(f or zero, field) for f in padded], axis=1) for field in Factors._fields))
