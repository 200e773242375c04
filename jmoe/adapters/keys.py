"""What the keys of an adapter's file say: the layer, the target and, where each has its own tensors, the expert.

PEFT puts LoRA on all experts of a projection into one pair, whose keys do not name the projection: with both targeted,
gate_up's pair is the one under `base_layer`; with one, no key has `base_layer`. Others name it: `experts.gate_up_proj`,
`experts.3.gate_up_proj`, `experts.gate_up_projs.3`, or gate and up apart, as vLLM's `experts.3.w1` and `w3`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from jmoe.adapters.settings import Settings

type Form = Literal["attention", "parameters", "stacked", "pairs", "lists"]

FORMS: Mapping[Form, str] = {
    "attention": "self_attn.q_proj",
    "parameters": "mlp.experts.base_layer and mlp.experts, as PEFT's target_parameters",
    "stacked": "mlp.experts.gate_up_proj, all experts in one tensor",
    "pairs": "mlp.experts.0.gate_up_proj, a pair for each expert",
    "lists": "mlp.experts.gate_up_projs.0, a pair for each expert",
}
"""How keys name modules, by examples."""

_PROJECTIONS = {
    "gate_up_proj": "gate_up", "down_proj": "down", "gate_proj": "gate", "up_proj": "up",
    "w1": "gate", "w2": "down", "w3": "up",
}  # fmt: skip
_ORDER = ("q", "k", "v", "o", "gate_up", "gate", "up", "down")
_NAMED = "|".join(_PROJECTIONS)

# torch.compile, FSDP and checkpointing put their own names between those of modules.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_KEY = re.compile(
    r"(?:(?:base_model|model|module)\.)*layers\.(?P<layer>\d+)\.(?P<module>.+)"
    r"\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))??(?:\.weight)?"
)
_ATTENTION = re.compile(r"self_attn\.([qkvo])_proj")
_STACKED = re.compile(rf"mlp\.experts\.({_NAMED})")
_PAIRS = re.compile(rf"mlp\.experts\.(\d+)\.({_NAMED})")
_LISTS = re.compile(r"mlp\.experts\.((?:gate_up|gate|up|down)_proj)s\.(\d+)")
_PARAMETERS = ("mlp.experts.base_layer", "mlp.experts")


class Module(NamedTuple):
    """What LoRA is on: target is one of q, k, v, o, gate_up, down, gate and up; "" where PEFT's keys do not say."""

    form: Form
    target: str
    expert: int | None = None


class Pair(NamedTuple):
    """The keys of a lora_A and its lora_B.

    target: one of q, k, v, o, gate_up, down, and of gate and up where a file has gate_up's halves apart.
    expert: None where the pair is of all experts, or on attention.
    names: those by which patterns may know it, its own first.
    """

    layer: int
    target: str
    form: Form
    expert: int | None
    names: tuple[str, ...]
    a: str
    b: str

    @property
    def is_of_all_experts(self) -> bool:
        """Whether the two tensors hold every expert's factors."""
        return self.form in ("parameters", "stacked")


def parameter_name(layer: int, target: str) -> str:
    """The name by which PEFT's targets and patterns know the weight of all experts."""
    return f"model.layers.{layer}.mlp.experts.{target}_proj"


def module_names(form: Form, layer: int, target: str) -> list[str]:
    """The names that gate_up, down or the first expert's may have as modules, where keys are of this form."""
    prefix = f"model.layers.{layer}.mlp.experts."
    parts = ("gate_up", "gate", "up") if target == "gate_up" else (target,)
    names = [name for name, part in _PROJECTIONS.items() if part in parts]
    if form == "lists":
        return [f"{prefix}{name}s.0" for name in names]
    return [f"{prefix}0.{name}" if form == "pairs" else f"{prefix}{name}" for name in names]


def find_pairs(file: Path, keys: Iterable[str], settings: Settings, *, layers: int, experts: int | None) -> list[Pair]:
    """All pairs of a file, by layer.

    Args:
      layers: the model's.
      experts: the model's; None: as many as the keys name.

    Raises:
      ValueError: a key that is not of LoRA on attention or experts, of a layer or expert that the model lacks, or
        that means the same as another; half a pair; several adapters or ways to name experts in one file; some experts
        without a pair of their own; keys without projections that the targets do not tell.
    """
    modules = _modules(file, keys, layers)
    first_of_form: dict[Form, str] = {}
    for place, factors in modules.items():
        if place.module.form != "attention":
            first_of_form.setdefault(place.module.form, next(iter(factors.values())))
    if len(first_of_form) > 1:
        raise ValueError(
            f"{file} names experts in several ways, of which one adapter has one: {', '.join(first_of_form.values())}"
        )
    pairs = _pairs_of_parameters(file, modules, settings) if "parameters" in first_of_form else []
    for place, factors in modules.items():
        if place.module.form != "parameters":
            a, b = _both(file, factors)
            names = _names(place)
            pairs.append(Pair(place.layer, place.module.target, place.module.form, place.module.expert, names, a, b))
    _check_experts(file, pairs, experts)
    return sorted(pairs, key=lambda pair: (pair.layer, _ORDER.index(pair.target), pair.expert or 0))


class _Place(NamedTuple):
    """A module, its layer and its name there."""

    layer: int
    module: Module
    name: str


def _modules(file: Path, keys: Iterable[str], layers: int) -> dict[_Place, dict[str, str]]:
    """Of each module with LoRA the keys of its factors, A and B."""
    modules: dict[_Place, dict[str, str]] = {}
    meant: dict[tuple[int, Module, str], str] = {}
    adapters: dict[str, str] = {}
    for key in keys:
        match = _KEY.fullmatch(_WRAPPERS.sub("", key))
        module = match and _module(match["module"])
        if match is None or module is None:
            raise ValueError(f"{file} has {key}{_why_not(key)}")
        layer, factor = int(match["layer"]), match["factor"]
        if layer >= layers:
            if module.form == "attention":
                raise ValueError(f"{file}: {key} is of a layer past the model's {layers}")
            raise ValueError(f"{file} has LoRA on experts of layer {layer}, past the model's {layers}: {key}")
        inner = match["module"] if module.form == "parameters" else ""
        if (other := meant.setdefault((layer, module, factor + inner), key)) != key:
            raise ValueError(f"{file} has {other} and {key}, which mean the same tensor")
        modules.setdefault(_Place(layer, module, match["module"]), {})[factor] = key
        adapters.setdefault(match["adapter"] or "no name", key)
    if len(adapters) > 1:
        names = ", ".join(f"{name} ({key})" for name, key in sorted(adapters.items()))
        raise ValueError(f"{file} must hold one adapter, but its keys have the names of {len(adapters)}: {names}")
    return modules


def _module(name: str) -> Module | None:
    """What a module's name within its layer stands for."""
    if name in _PARAMETERS:
        return Module("parameters", "")
    if match := _ATTENTION.fullmatch(name):
        return Module("attention", match[1])
    if match := _STACKED.fullmatch(name):
        return Module("stacked", _PROJECTIONS[match[1]])
    if match := _PAIRS.fullmatch(name):
        return Module("pairs", _PROJECTIONS[match[2]], int(match[1]))
    if match := _LISTS.fullmatch(name):
        return Module("lists", _PROJECTIONS[match[1]], int(match[2]))
    return None


def _why_not(key: str) -> str:
    """The rest of a sentence about a key that is not understood."""
    if "lora_magnitude_vector" in key:
        return ": DoRA is not supported"
    if key.endswith("bias"):
        return ": trained biases are not supported"
    if "modules_to_save" in key or "lora_" not in key:
        return ": weights that were trained whole, by modules_to_save or as embeddings, are not supported"
    return (
        ", but jmoe has no LoRA there: only on attention's q_proj, k_proj, v_proj and o_proj and on the experts' "
        "gate_up_proj and down_proj"
    )


def _names(place: _Place) -> tuple[str, ...]:
    """The names by which patterns may know a module: its own, and those of what it is a part of."""
    own = f"model.layers.{place.layer}.{place.name}"
    form, target, expert = place.module
    if form == "attention":
        return (own,)
    whole = "down" if target == "down" else "gate_up"
    of_expert = [f"model.layers.{place.layer}.mlp.experts.{expert}.{name}_proj" for name in (target, whole)]
    of_all = [parameter_name(place.layer, name) for name in (target, whole)]
    return tuple(dict.fromkeys([own, *(of_expert if expert is not None else ()), *of_all]))


def _both(file: Path, factors: Mapping[str, str]) -> tuple[str, str]:
    """The keys of A and B."""
    for factor, other in ("AB", "BA"):
        if factor not in factors:
            there = factors[other]
            raise ValueError(
                f"{file} has no tensor {_with(there, f'lora_{other}', f'lora_{factor}')}, though it has {there}"
            )
    return factors["A"], factors["B"]


def _with(key: str, old: str, new: str) -> str:
    """The key with the last of its parts of this text replaced."""
    return new.join(key.rsplit(old, 1))


def _pairs_of_parameters(file: Path, modules: Mapping[_Place, Mapping[str, str]], settings: Settings) -> list[Pair]:
    """Pairs under PEFT's keys of target_parameters, which the targets tell apart."""
    found: dict[int, dict[str, str]] = {}
    for place, factors in modules.items():
        if place.module.form == "parameters":
            named = {f"{place.name.removeprefix('mlp.')}.lora_{factor}.weight": key for factor, key in factors.items()}
            found.setdefault(place.layer, {}).update(named)
    pairs = []
    for layer, keys in found.items():
        targets = settings.experts_listed(layer)
        wrapped = ["experts.base_layer", "experts"][-len(targets) :] if targets else []
        wanted = {f"{module}.lora_{factor}.weight" for module in wrapped for factor in "AB"}
        if keys.keys() != wanted:
            raise ValueError(
                f"{file}: target_parameters {list(settings.target_parameters)} call for {sorted(wanted) or 'nothing'} "
                f"in layers.{layer}.mlp; missing {sorted(wanted - keys.keys())}, not understood "
                f"{sorted(keys.keys() - wanted)}"
            )
        for target, module in zip(targets, wrapped, strict=True):
            a, b = (keys[f"{module}.lora_{factor}.weight"] for factor in "AB")
            pairs.append(Pair(layer, target, "parameters", None, (parameter_name(layer, target),), a, b))
    return pairs


def _check_experts(file: Path, pairs: Iterable[Pair], experts: int | None) -> None:
    """That every expert has a pair where one has, and that no halves of gate_up are there beside the whole."""
    of: dict[tuple[int, str], dict[int | None, Pair]] = {}
    for pair in pairs:
        of.setdefault((pair.layer, pair.target), {})[pair.expert] = pair
    count = experts or 1 + max((pair.expert or 0 for pair in pairs), default=0)
    for (layer, target), by_expert in of.items():
        first = next(iter(by_expert.values()))
        if target in ("gate", "up") and (whole := of.get((layer, "gate_up"))):
            raise ValueError(f"{file} has {next(iter(whole.values())).a} and a half of it, {first.a}")
        if None in by_expert:
            continue
        for expert, pair in by_expert.items():
            if expert is not None and expert >= count:
                raise ValueError(f"{file}: {pair.a} is of an expert past the model's {count}")
        for expert in range(count):
            if expert not in by_expert:
                numbered = ("projs.{}." if first.form == "lists" else "experts.{}.").format
                missing = _with(first.a, numbered(first.expert), numbered(expert))
                raise ValueError(f"{file} has no tensor {missing}, though it has {first.a}")
