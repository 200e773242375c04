"""The sizes of the model that an adapter is for, as far as the adapter's own file tells."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jmoe.adapters.file import Sizes
from jmoe.adapters.keys import Pair, find_pairs
from jmoe.adapters.settings import Settings
from jmoe.checkpoint.directory import open_safetensors
from jmoe.checkpoint.tensors import Spec, tensor_spec

_ANY_LAYERS = 1 << 20


def sizes_of_adapter(path: str | os.PathLike[str]) -> Sizes:
    """The sizes by which open_adapter reads an adapter without its model; layers past the last with LoRA are unknown.

    Raises:
      FileNotFoundError: adapter_config.json or adapter_model.safetensors does not exist.
      ValueError: as open_adapter does of settings and keys; there are no tensors.
    """
    settings = Settings.load(Path(path) / "adapter_config.json")
    file = Path(path) / "adapter_model.safetensors"
    with open_safetensors(file) as shard:
        pairs = find_pairs(file, shard.keys(), settings, layers=_ANY_LAYERS, experts=None)
        specs = {key: tensor_spec(shard, key) for pair in pairs for key in (pair.a, pair.b)}
    if not pairs:
        raise ValueError(f"{file} has no LoRA on attention or experts")
    for key, spec in specs.items():
        if len(spec.shape) not in (2, 3):
            raise ValueError(f"{file}: {key} must have two or three axes, got {spec}")
    weights = {("gate_up" if pair.target in ("gate", "up") else pair.target): _weight(pair, specs) for pair in pairs}
    swapped = weights | {target: weights[target][::-1] for target in ("gate_up", "down") if target in weights}
    weights = swapped if not _fit(weights) and _fit(swapped) else weights
    return Sizes(1 + max(pair.layer for pair in pairs), _experts(pairs, settings, specs), weights)


def _weight(pair: Pair, specs: Mapping[str, Spec]) -> tuple[int, int]:
    """(N, K) if the axes are the usual ones."""
    a, b = (specs[key].shape for key in (pair.a, pair.b))
    rows = 2 * b[-2] if pair.target in ("gate", "up") else b[-2]
    return rows, a[-1]


def _fit(weights: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the weights can be of one model: what reads and writes the residual stream has one width."""
    hidden = {n if target in ("o", "down") else k for target, (n, k) in weights.items()}
    both = "gate_up" in weights and "down" in weights
    return len(hidden) == 1 and (not both or weights["gate_up"][0] == 2 * weights["down"][1])


def _experts(pairs: Sequence[Pair], settings: Settings, specs: Mapping[str, Spec]) -> int:
    """How many experts there are; 1 where none has LoRA."""
    count = 1
    for pair in pairs:
        if pair.expert is not None:
            count = max(count, pair.expert + 1)
        elif pair.is_of_all_experts:
            rank = settings.rank(*pair.names)
            a, b = (specs[key].shape for key in (pair.a, pair.b))
            from_a = a[0] if len(a) == 3 else a[0] // rank
            from_b = b[0] if len(b) == 3 else b[-1] // rank
            count = max(count, from_a, from_b)
    return count
