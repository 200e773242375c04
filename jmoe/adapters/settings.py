"""What adapter_config.json of a PEFT adapter says."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from jmoe.checkpoint.config_file import is_number, read_json

LoraBLayout = Literal["rank_major", "grouped_by_expert"]  # typer resolves no `type` statement
"""Of all experts' lora_B in one matrix; see LORA_B_LAYOUTS."""

LORA_B_LAYOUTS: tuple[LoraBLayout, ...] = ("rank_major", "grouped_by_expert")
"""What column j of all experts' lora_B in one [out, r * E] belongs to: (rank j // E, expert j % E), which is PEFT's
order, or (expert j // r, rank j % r), which Unsloth wrote before September 2026."""

# Settings of adapter_config.json that another part of a model may use and that leave the factors as they are.
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


class AdapterWarning(UserWarning):
    """An adapter may not be what it is taken for: the message says what is missing, odd or read by others otherwise."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What adapter_config.json says; names as in the file, the patterns in the file's order.

    lora_b_layout: what the key lora_B_layout says; None without it.
    unsloth_fixed: whether auto_mapping has Unsloth's mark, beside which another order than PEFT's is likely.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_parameters: tuple[str, ...]
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]  # none: all
    base_model: str | None = None
    lora_b_layout: LoraBLayout | None = None
    unsloth_fixed: bool = False
    peft_version: str | None = None

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
        mapping = entries.get("auto_mapping")
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
            base_model=_text(entries.get("base_model_name_or_path")),
            lora_b_layout=_lora_b_layout(file, entries.pop("lora_B_layout", None)),
            unsloth_fixed=isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed")),
            peft_version=_text(entries.get("peft_version")),
        )
        _refuse_unsupported(file, entries)
        return settings

    @property
    def may_be_swapped(self) -> bool:
        """Whether it is of a PEFT that exchanges `in` and `out` of experts' factors beside some transformers."""
        version = re.match(r"(\d+)\.(\d+)", self.peft_version or "")
        return version is not None and (int(version[1]), int(version[2])) >= (0, 19)

    @property
    def targets_all_linear(self) -> bool:
        """Whether target_modules stands for every linear module; PEFT looks at the case of letters as little."""
        modules = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        return [module.lower() for module in modules] == ["all-linear"]

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
        if self.targets_all_linear:
            return layer is not None
        in_layers = not self.layers_to_transform or (layer is not None and int(layer[1]) in self.layers_to_transform)
        return _matches(self.target_modules, name) and (in_layers or name in self.target_modules)

    def experts_listed(self, layer: int) -> list[str]:
        """gate_up, down, both or neither, by target_parameters; where that names neither, by target_modules' names.

        PEFT finds no module of these names in gpt-oss; other trainers, who made modules of the experts, save so.
        """
        names = {target: f"model.layers.{layer}.mlp.experts.{target}_proj" for target in ("gate_up", "down")}
        listed = [target for target, name in names.items() if self.lists_parameter(name)]
        if listed or self.targets_all_linear:
            return listed
        return [target for target, name in names.items() if self.lists_module(name)]

    def rank(self, *names: str) -> int:
        """r of a module or parameter, of one expert, after rank_pattern, by the first of its names that matches."""
        return _resolve(self._ranks, names, self.r)

    def scale(self, *names: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, after both patterns; names as in `rank`."""
        alpha = _resolve(self._alphas, names, self.lora_alpha)
        rank = self.rank(*names)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @functools.cached_property
    def _ranks(self) -> "_Pattern[int]":
        return _compiled(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> "_Pattern[float]":
        return _compiled(self.alpha_pattern)


def _text(value: Any) -> str | None:
    """What is for people, and no error whatever it is."""
    return value if isinstance(value, str) and value else None


def _lora_b_layout(file: Path, value: Any) -> LoraBLayout | None:
    """lora_B_layout."""
    if _is_off(value):
        return None
    for layout in LORA_B_LAYOUTS:
        if value == layout:
            return layout
    raise ValueError(f"{file}: lora_B_layout must be one of {', '.join(LORA_B_LAYOUTS)}, got {value!r}")


def _is_off(value: Any) -> bool:
    """Whether a setting is null, false, zero or empty."""
    return value in (None, False, [], {}, "")


def _modules(file: Path, name: str, value: Any) -> tuple[str, ...] | str:
    """Modules by their names or dotted ends of them, or by one expression."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{file}: {name} is not a regular expression, {value!r}: {error}") from None
        return value
    modules = value or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ValueError(f"{file}: {name} must be a list of names, an expression or null, got {value!r}")
    return tuple(modules)


def _layers(file: Path, value: Any) -> tuple[int, ...]:
    """layers_to_transform."""
    off = value is None or value is False or value in ("", {})
    layers = [] if off else value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise ValueError(f"{file}: layers_to_transform must be a layer, a list of layers or null, got {value!r}")
    return tuple(layers)


def _matches(targets: tuple[str, ...] | str, name: str) -> bool:
    """Whether one of the targets is the name or a dotted end of it, or the expression matches it whole."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


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
            raise ValueError(f"{file}: {name} has a key that is not a regular expression, {key!r}: {error}") from None
    return {key: _number(file, f"{name}[{key!r}]", number, kind) for key, number in (value or {}).items()}


def _refuse_unsupported(file: Path, entries: dict[str, Any]) -> None:
    bias = entries.pop("bias", None)
    if bias != "none" and not _is_off(bias):
        raise ValueError(f"{file}: bias must be 'none' (trained biases are not supported), got {bias!r}")
    initialisation = entries.pop("init_lora_weights", None)
    if initialisation not in _INITIALISATIONS and not _is_off(initialisation):
        raise ValueError(
            f"{file}: init_lora_weights {initialisation!r} may have changed the base model's weights; supported are "
            f"{', '.join(map(repr, _INITIALISATIONS))}"
        )
    # PEFT writes all its settings, those that are off too, and gains more with each version.
    unsupported = {name: value for name, value in entries.items() if name not in _HARMLESS and not _is_off(value)}
    if unsupported:
        raise ValueError(f"{file}: not supported: {', '.join(f'{k} = {v!r}' for k, v in unsupported.items())}")


type _Pattern[T] = tuple[tuple[re.Pattern[str], T], ...]


def _compiled[T](pattern: Mapping[str, T]) -> _Pattern[T]:
    """A pattern's expressions: of many, as where each expert has its own, re's own cache would forget each."""
    return tuple((re.compile(_dotted_end(key)), value) for key, value in pattern.items())


def _resolve[T](pattern: _Pattern[T], names: tuple[str, ...], default: T) -> T:
    """The value of the first regular expression, in the file's order, that matches a name or a dotted end of it."""
    return next((value for name in names for key, value in pattern if key.match(name)), default)


def _dotted_end(key: str) -> str:
    """The regular expression of names that a key matches, or a dotted end of which it matches."""
    return rf"(.*\.)?({key})$"
