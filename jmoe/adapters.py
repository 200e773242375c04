"""LoRA adapters in PEFT's format, for the experts of one layer at a time.

PEFT puts all experts of a projection into one pair of matrices. With rank r per expert, lora_A [E*r, in] has its rows
in the order (expert, rank), while lora_B [out, r*E] has its columns in the order (rank, expert). The keys do not name
the projection: with both targeted, gate_up's pair is the one under `base_layer`; with one, no key has `base_layer`.

Some versions of PEFT (0.19.0, and later ones beside transformers 4) take the experts' weights for [E, out, in] and
write the pair with `in` and `out` exchanged. Such an adapter is told by its shapes.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import safe_open

from jmoe.checkpoint import Config, Spec, is_number, open_safetensors, read_json, tensor_spec
from jmoe.ops.experts import Lora

Projection = Literal["gate_up", "down"]

_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.mlp\.(.+)")
_PAIR = ("lora_A.weight", "lora_B.weight")
_DTYPES = ("F32", "BF16")

# Settings of adapter_config.json that another part of a model may use and that leave the experts' pairs as they are.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initialisations that leave the base model as it was; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change its weights.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What adapter_config.json says; names as in the file, the patterns in the file's order."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_parameters: tuple[str, ...]
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]  # none: all

    @classmethod
    def load(cls, file: Path) -> Self:
        """Reads the file, and refuses every setting that this module does not know to leave the result unchanged."""
        entries = read_json(file)
        if (peft_type := entries.pop("peft_type", None)) != "LORA":
            raise ValueError(f"{file}: peft_type must be 'LORA', got {peft_type!r}")
        targets = entries.pop("target_parameters", None) or []
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"{file}: target_parameters must be a list of names or null, got {targets!r}")
        use_rslora = entries.pop("use_rslora", None)
        use_rslora = False if use_rslora is None else use_rslora
        if not isinstance(use_rslora, bool):
            raise ValueError(f"{file}: use_rslora must be true, false or null, got {use_rslora!r}")
        settings = cls(
            r=_number(file, "r", entries.pop("r", None), int),
            lora_alpha=_number(file, "lora_alpha", entries.pop("lora_alpha", None), float),
            use_rslora=use_rslora,
            rank_pattern=_pattern(file, "rank_pattern", entries.pop("rank_pattern", None), int),
            alpha_pattern=_pattern(file, "alpha_pattern", entries.pop("alpha_pattern", None), float),
            target_parameters=tuple(targets),
            target_modules=_modules(file, "target_modules", entries.pop("target_modules", None)),
            exclude_modules=_modules(file, "exclude_modules", entries.pop("exclude_modules", None)),
            layers_to_transform=_layers(file, entries.pop("layers_to_transform", None)),
        )
        _refuse_unsupported(file, entries)
        return settings

    def targets(self, layer: int) -> list[Projection]:
        """The projections of a layer with LoRA."""
        projections: tuple[Projection, ...] = ("gate_up", "down")
        return [projection for projection in projections if self.lists_parameter(parameter_name(layer, projection))]

    def lists_parameter(self, name: str) -> bool:
        """Whether LoRA is on this parameter; PEFT leaves out none of them by exclude_modules or layers_to_transform."""
        return _matches(self.target_parameters, name)

    def lists_module(self, name: str) -> bool:
        """Whether LoRA is on this linear module or embedding, by PEFT's rules.

        "all-linear" are those of the layers; one that is listed by its whole name has LoRA whatever its layer.
        """
        if _matches(self.exclude_modules, name):
            return False
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return layer is not None
        in_layers = not self.layers_to_transform or (layer is not None and int(layer[1]) in self.layers_to_transform)
        return _matches(self.target_modules, name) and (in_layers or name in self.target_modules)

    def rank(self, name: str) -> int:
        """r of a module or parameter, of one expert, after rank_pattern."""
        return _resolve(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, after both patterns."""
        alpha = _resolve(self.alpha_pattern, name, self.lora_alpha)
        rank = self.rank(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _modules(file: Path, name: str, value: Any) -> tuple[str, ...] | str:
    """Modules by their names or dotted ends of them, or by one expression."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{file}: {name} is no regular expression, {value!r}: {error}") from None
        return value
    modules = value or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ValueError(f"{file}: {name} must be a list of names, an expression or null, got {value!r}")
    return tuple(modules)


def _layers(file: Path, value: Any) -> tuple[int, ...]:
    """layers_to_transform."""
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise ValueError(f"{file}: layers_to_transform must be a layer, a list of layers or null, got {value!r}")
    return tuple(layers)


def _matches(targets: tuple[str, ...] | str, name: str) -> bool:
    """Whether one of the targets is the name or a dotted end of it, or the expression matches it whole."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


class _Pair(NamedTuple):
    """The two tensors of one projection in one layer."""

    projection: Projection
    rank: int
    a: str
    b: str

    def specs(self, config: Config, *, swapped: bool) -> dict[str, tuple[int, int]]:
        """The shapes of the two tensors, in the layout of most versions of PEFT or with `in` and `out` swapped."""
        sizes = {
            "gate_up": (config.hidden_size, 2 * config.intermediate_size),
            "down": (config.intermediate_size, config.hidden_size),
        }
        columns, rows = reversed(sizes[self.projection]) if swapped else sizes[self.projection]
        stacked = config.num_local_experts * self.rank
        return {self.a: (stacked, columns), self.b: (rows, stacked)}


def load_lora(path: str | os.PathLike[str], config: Config, layer: int) -> Lora:
    """Reads the LoRA factors on the experts of one layer from a PEFT adapter directory.

    Gives one adapter (A = 1), factors in the dtype of the file (float32 or bf16), scales float32 [1]. A projection that
    the adapter leaves alone is None. LoRA on attention is not looked at. Where shapes cannot tell the swapped layout
    from the usual one (`down` alone and hidden_size = intermediate_size), the usual one is taken, as PEFT does.

    Raises:
      FileNotFoundError: adapter_config.json or adapter_model.safetensors does not exist.
      ValueError: the layer is out of range or without LoRA on its experts; a setting is not supported; the tensors do
        not match the settings and the model's sizes, or the file is truncated or corrupt.
    """
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"layer must be in [0, {config.num_hidden_layers}), got {layer}")
    settings = Settings.load(Path(path) / "adapter_config.json")
    file = Path(path) / "adapter_model.safetensors"
    with open_safetensors(file) as shard:
        found = suffixes_by_layer(shard.keys())
        if layer not in found:
            raise ValueError(
                f"{file} has no LoRA on the experts of layer {layer} "
                f"(no base_model.model.model.layers.{layer}.mlp.*); layers that have: {sorted(found) or 'none'}"
            )
        pairs = {i: _pairs(file, settings, i, suffixes) for i, suffixes in found.items()}
        swapped = _is_swapped(file, shard, config, [pair for of_layer in pairs.values() for pair in of_layer])
        fields: dict[str, Array] = {}
        for pair in pairs[layer]:
            a, b = _factors(shard, config.num_local_experts, pair, swapped=swapped)
            scale = np.array([settings.scale(parameter_name(layer, pair.projection))], np.float32)
            fields |= {
                f"{pair.projection}_a": jnp.asarray(a[None]),
                f"{pair.projection}_b": jnp.asarray(b[None]),
                f"{pair.projection}_scale": jnp.asarray(scale),
            }
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


def parameter_name(layer: int, projection: Projection) -> str:
    """The name by which PEFT's targets and patterns know a projection's weight."""
    return f"model.layers.{layer}.mlp.experts.{projection}_proj"


def _number[N: (int, float)](file: Path, name: str, value: Any, kind: type[N]) -> N:
    if not is_number(value, kind):
        raise ValueError(f"{file}: {name} must be a positive {kind.__name__}, got {value!r}")
    return value


def _pattern[N: (int, float)](file: Path, name: str, value: Any, kind: type[N]) -> dict[str, N]:
    if not isinstance(value or {}, dict):
        raise ValueError(f"{file}: {name} must be a JSON object or null, got {value!r}")
    for key in value or {}:
        try:
            re.compile(_dotted_end(key))
        except re.error as error:
            raise ValueError(f"{file}: {name} has a key that is no regular expression, {key!r}: {error}") from None
    return {key: _number(file, f"{name}[{key!r}]", number, kind) for key, number in (value or {}).items()}


def _refuse_unsupported(file: Path, entries: dict[str, Any]) -> None:
    if (bias := entries.pop("bias", "none")) != "none":
        raise ValueError(f"{file}: bias must be 'none' (trained biases are not supported), got {bias!r}")
    initialisation = entries.pop("init_lora_weights", True)
    if initialisation not in _INITIALISATIONS:
        raise ValueError(
            f"{file}: init_lora_weights {initialisation!r} may have changed the base model's weights; supported are "
            f"{', '.join(map(repr, _INITIALISATIONS))}"
        )
    # PEFT writes all its settings, those that are off too, and gains more with each version.
    unsupported = {k: v for k, v in entries.items() if k not in _HARMLESS and v not in (None, False, [], {}, "")}
    if unsupported:
        raise ValueError(f"{file}: not supported: {', '.join(f'{k} = {v!r}' for k, v in unsupported.items())}")


def _resolve[T](pattern: dict[str, T], name: str, default: T) -> T:
    """The value of the first regular expression, in the file's order, that matches a name or a dotted end of it."""
    return next((value for key, value in pattern.items() if re.match(_dotted_end(key), name)), default)


def _dotted_end(key: str) -> str:
    """The regular expression of names that a key matches, or a dotted end of which it matches."""
    return rf"(.*\.)?({key})$"


def suffixes_by_layer(keys: Iterable[str]) -> dict[int, set[str]]:
    """Of each layer with LoRA in its MLP: what follows `mlp.` in the keys."""
    found: dict[int, set[str]] = {}
    for match in filter(None, map(_KEY.fullmatch, keys)):
        found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _pairs(file: Path, settings: Settings, layer: int, suffixes: set[str]) -> list[_Pair]:
    """Says which keys hold which projection of a layer, and that these are all the keys there are."""
    targets = settings.targets(layer)
    modules = ["experts.base_layer", "experts"][-len(targets) :] if targets else []
    wanted = {f"{module}.{part}" for module in modules for part in _PAIR}
    if suffixes != wanted:
        raise ValueError(
            f"{file}: target_parameters {list(settings.target_parameters)} call for {sorted(wanted) or 'nothing'} in "
            f"layers.{layer}.mlp; missing {sorted(wanted - suffixes)}, not understood {sorted(suffixes - wanted)}"
        )
    prefix = f"base_model.model.model.layers.{layer}.mlp."
    return [
        _Pair(target, settings.rank(parameter_name(layer, target)), *(f"{prefix}{module}.{part}" for part in _PAIR))
        for target, module in zip(targets, modules, strict=True)
    ]


def _is_swapped(file: Path, shard: safe_open, config: Config, pairs: list[_Pair]) -> bool:
    """Decides the layout by the shapes of all pairs together: one projection alone may fit both."""
    got: dict[str, Spec] = {name: tensor_spec(shard, name) for pair in pairs for name in (pair.a, pair.b)}
    wrong_dtypes = [
        f"  {name}: wanted F32 or BF16, got {spec}" for name, spec in got.items() if spec.dtype not in _DTYPES
    ]
    if wrong_dtypes:
        raise ValueError("\n".join([f"{file} has factors of unsupported dtypes:", *wrong_dtypes]))
    wanted = []
    for swapped in (False, True):
        shapes = {name: shape for pair in pairs for name, shape in pair.specs(config, swapped=swapped).items()}
        if all(got[name].shape == shape for name, shape in shapes.items()):
            return swapped
        wanted.append(shapes)
    usual, exchanged = wanted
    wrong = [
        f"  {name}: wanted {usual[name]}, or {exchanged[name]} if all are swapped, got {spec.shape}"
        for name, spec in got.items()
        if spec.shape != usual[name]
    ]
    raise ValueError("\n".join([f"{file} does not match the model and its adapter_config.json:", *wrong]))


def _factors(
    shard: safe_open, experts: int, pair: _Pair, *, swapped: bool
) -> tuple[Float[np.ndarray, "E R in"], Float[np.ndarray, "E out R"]]:
    """A projection's factors per expert: the weight [out, in] of expert e gains scale * b[e] @ a[e]."""
    a = shard.get_tensor(pair.a).reshape(experts, pair.rank, -1)
    b = shard.get_tensor(pair.b)
    b = b.reshape(-1, pair.rank, experts).transpose(2, 0, 1)
    # Swapped, the file's product b[e] @ a[e] is [in, out]: the factors' transposes change places.
    return (b.swapaxes(1, 2), a.swapaxes(1, 2)) if swapped else (a, b)


def _stack(loras: Sequence[Lora], projection: Projection) -> dict[str, Array | None]:
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
