"""The factors of an adapter's file: read, checked and brought into one form, whatever form the file has them in.

PEFT puts all experts of a projection into one pair of matrices. With rank r per expert, lora_A [E*r, in] has its rows
in the order (expert, rank), while lora_B [out, r*E] has its columns in the order (rank, expert) ("rank_major") or, as
Unsloth wrote them, (expert, rank) ("grouped_by_expert"). Others write [E, r, in] and [E, out, r], with 1 in place of E
for a factor that all experts share, or a pair of matrices for each expert.

Some versions of PEFT (0.19.0, and later ones beside transformers 4) take the experts' weights for [E, out, in] and
write the pair with `in` and `out` exchanged. Such an adapter is told by its shapes.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from jmoe.adapters.keys import Form, Pair, find_pairs
from jmoe.adapters.settings import LORA_B_LAYOUTS, AdapterWarning, LoraBLayout, Settings
from jmoe.checkpoint.directory import open_safetensors
from jmoe.checkpoint.layouts import grouped
from jmoe.checkpoint.tensors import Spec, tensor_spec

_DTYPES = ("F32", "BF16", "F16")

type Shape = tuple[int, ...]


class FileFactors(NamedTuple):
    """What one target of one layer gains, scale * b @ a; a leading axis for the experts on theirs.

    float32 or bf16, as in the file; float16 becomes float32.
    """

    a: Float[np.ndarray, "*E R K"]
    b: Float[np.ndarray, "*E N R"]
    scale: float


class Sizes(NamedTuple):
    """A model's: of each target the weight's (N, K); targets that are not here have no LoRA."""

    layers: int
    experts: int
    weights: Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An open adapter, whose tensors' names, dtypes and shapes are as they must be.

    pairs: by layer and target; of several, one for each expert.
    specs: the header of every tensor.
    lora_b_layout: by which lora_B of all experts in one matrix is read.
    is_swapped: whether the experts' pairs have `in` and `out` exchanged; None: shapes fit both, and it is read as not.
    """

    file: Path
    settings: Settings
    sizes: Sizes
    pairs: Mapping[tuple[int, str], Sequence[Pair]]
    specs: Mapping[str, Spec]
    lora_b_layout: LoraBLayout
    is_swapped: bool | None
    _shard: safe_open

    @property
    def form(self) -> Form | None:
        """How keys name the experts; None without LoRA on them."""
        return next((of[0].form for of in self.pairs.values() if of[0].form != "attention"), None)

    @property
    def orders_differ(self) -> bool:
        """Whether there is a lora_B that the two orders of columns read differently."""
        return _orders_differ(
            self.settings, self.sizes, [pair for of in self.pairs.values() for pair in of], self.specs
        )

    def pairs_on(self, layer: int, target: str) -> list[Pair]:
        """What makes up a target's LoRA in a layer: one pair, the experts', or those of gate and of up."""
        return [pair for part in _parts(target) for pair in self.pairs.get((layer, part), ())]

    def read(self, layer: int, target: str) -> FileFactors | None:
        """The factors of q, k, v, o, gate_up or down of a layer; None without LoRA there."""
        found = {part: self._read_part(layer, part) for part in _parts(target)}
        gate, up = (found.get(half) for half in ("gate", "up"))
        return found[target] if gate is None and up is None else _interleave(gate, up)

    def _read_part(self, layer: int, target: str) -> FileFactors | None:
        pairs = self.pairs.get((layer, target), ())
        factors = [self._read_pair(pair) for pair in pairs]
        if pairs and pairs[0].expert is not None:
            return _stack(factors)
        return factors[0] if factors else None

    def _read_pair(self, pair: Pair) -> FileFactors:
        a, b = (_kept(self._shard.get_tensor(key)) for key in (pair.a, pair.b))
        rank, scale = self.settings.rank(*pair.names), self.settings.scale(*pair.names)
        experts = self.sizes.experts
        if pair.is_of_all_experts:
            if a.ndim == 2:
                a = a.reshape(experts, rank, -1)
            if b.ndim == 2 and self.lora_b_layout == "rank_major":
                b = b.reshape(-1, rank, experts).transpose(2, 0, 1)
            elif b.ndim == 2:
                b = b.reshape(-1, experts, rank).transpose(1, 0, 2)
            a, b = (np.broadcast_to(factor, (experts, *factor.shape[1:])) for factor in (a, b))
        # Swapped, the file's product b @ a is [in, out]: the factors' transposes change places.
        swapped = self.is_swapped and pair.form != "attention"
        return FileFactors(b.swapaxes(-2, -1), a.swapaxes(-2, -1), scale) if swapped else FileFactors(a, b, scale)


@contextlib.contextmanager
def open_adapter(
    path: str | os.PathLike[str],
    sizes: Sizes,
    *,
    lora_b_layout: LoraBLayout | None = None,
    only_experts: bool = False,
) -> Iterator[AdapterFile]:
    """Opens a PEFT adapter directory; headers are read, data is not.

    Args:
      sizes: the model's.
      lora_b_layout: how to read lora_B of all experts in one matrix where adapter_config.json does not say; None: as
        PEFT does, with a warning where Unsloth may have written it otherwise.
      only_experts: leave LoRA on anything but the layers' MLP out.

    Warns:
      AdapterWarning: as said of lora_b_layout.

    Raises:
      FileNotFoundError: adapter_config.json or adapter_model.safetensors does not exist.
      ValueError: lora_b_layout is not what adapter_config.json says; a setting is not supported; the tensors do not
        match the settings and the model's sizes, or the file is truncated or corrupt.
    """
    settings = Settings.load(Path(path) / "adapter_config.json")
    file = Path(path) / "adapter_model.safetensors"
    with open_safetensors(file) as shard:
        keys = [key for key in shard.keys() if not only_experts or ".mlp." in key]  # noqa: SIM118  no container itself
        pairs = find_pairs(file, keys, settings, layers=sizes.layers, experts=sizes.experts)
        specs = {key: tensor_spec(shard, key) for pair in pairs for key in (pair.a, pair.b)}
        _check_dtypes(file, specs)
        is_swapped = _is_swapped(file, settings, sizes, pairs, specs)
        if is_swapped is None and settings.may_be_swapped:
            _warn_of_axes(Path(path), settings)
        layout = _lora_b_layout(Path(path), settings, lora_b_layout, _orders_differ(settings, sizes, pairs, specs))
        by_target: dict[tuple[int, str], list[Pair]] = {}
        for pair in pairs:
            by_target.setdefault((pair.layer, pair.target), []).append(pair)
        yield AdapterFile(file, settings, sizes, by_target, specs, layout, is_swapped, shard)


def _parts(target: str) -> tuple[str, ...]:
    """What a target's LoRA may be written as."""
    return ("gate_up", "gate", "up") if target == "gate_up" else (target,)


def _check_dtypes(file: Path, specs: Mapping[str, Spec]) -> None:
    wrong = [(key, f"wanted F32, BF16 or F16, got {spec}") for key, spec in specs.items() if spec.dtype not in _DTYPES]
    if wrong:
        raise ValueError("\n  ".join([f"{file} has factors of unsupported dtypes:", *grouped(wrong)]))


def _shapes(pair: Pair, settings: Settings, sizes: Sizes, *, swapped: bool) -> dict[str, tuple[Shape, ...]]:
    """Of the two keys the shapes that they may have, the likeliest first; swapped: with `in` and `out` exchanged."""
    whole = "gate_up" if pair.target in ("gate", "up") else pair.target
    n, k = sizes.weights[whole]
    n = n // 2 if pair.target != whole else n
    if swapped and pair.form != "attention":
        n, k = k, n
    rank, experts = settings.rank(*pair.names), sizes.experts
    if not pair.is_of_all_experts:
        return {pair.a: ((rank, k),), pair.b: ((n, rank),)}
    flat_a, flat_b = (experts * rank, k), (n, rank * experts)
    a, b = ((experts, rank, k), (1, rank, k)), ((experts, n, rank), (1, n, rank))
    if pair.form == "parameters":
        return {pair.a: (flat_a, *a), pair.b: (flat_b, *b)}
    return {pair.a: (*a, flat_a), pair.b: (*b, flat_b)}


def _is_swapped(
    file: Path, settings: Settings, sizes: Sizes, pairs: Sequence[Pair], specs: Mapping[str, Spec]
) -> bool | None:
    """Decides the layout by the shapes of all pairs together; None where PEFT wrote them and they fit both."""
    usual, exchanged = (
        {key: of for pair in pairs for key, of in _shapes(pair, settings, sizes, swapped=swapped).items()}
        for swapped in (False, True)
    )
    is_usual, is_exchanged = (
        all(specs[key].shape in of for key, of in shapes.items()) for shapes in (usual, exchanged)
    )
    if is_usual:
        # Only PEFT, on parameters, takes the one for the other.
        return None if is_exchanged and any(pair.form == "parameters" for pair in pairs) else False
    if is_exchanged:
        return True
    wrong = [
        (
            key,
            f"wanted {usual[key][0]}"
            + (f", or {exchanged[key][0]} if all are swapped" if ".experts." in key else "")
            + f", got {spec.shape}",
        )
        for key, spec in specs.items()
        if spec.shape not in usual[key]
    ]
    raise ValueError("\n  ".join([f"{file} does not match the model and its adapter_config.json:", *grouped(wrong)]))


def _warn_of_axes(path: Path, settings: Settings) -> None:
    """Says that the experts' factors may be swapped."""
    warnings.warn(
        f"{path} is of PEFT {settings.peft_version}, which writes the experts' factors with in and out exchanged "
        "beside some versions of transformers (0.19.0 beside 5, later ones beside 4), and has LoRA on one projection "
        "whose shapes fit both ways. It is read as not exchanged; whether it helps so, jmoe eval says",
        AdapterWarning,
        stacklevel=5,
    )


def _orders_differ(settings: Settings, sizes: Sizes, pairs: Sequence[Pair], specs: Mapping[str, Spec]) -> bool:
    """Whether there is a lora_B that the two orders of columns read differently."""
    return sizes.experts > 1 and any(
        pair.is_of_all_experts and len(specs[pair.b].shape) == 2 and settings.rank(*pair.names) > 1 for pair in pairs
    )


def _lora_b_layout(path: Path, settings: Settings, asked: LoraBLayout | None, matters: bool) -> LoraBLayout:
    """By which order of columns lora_B is read."""
    if asked is not None and asked not in LORA_B_LAYOUTS:
        raise ValueError(f"lora_b_layout must be one of {', '.join(LORA_B_LAYOUTS)} or None, got {asked!r}")
    said = settings.lora_b_layout
    if said is not None and asked not in (None, said):
        raise ValueError(
            f"{path}: adapter_config.json says lora_B_layout {said!r}, and lora_b_layout {asked!r} contradicts it: "
            "leave that out, as it is for adapters that do not say"
        )
    if said is None and asked is None and settings.unsloth_fixed and matters:
        warnings.warn(
            f"{path} is of an Unsloth that may have written the experts' lora_B grouped by expert, where PEFT has them "
            "by rank: adapter_config.json has auto_mapping.unsloth_fixed and no lora_B_layout, and the shapes are the "
            "same. It is read as PEFT does; if its results are poor, try lora_b_layout grouped_by_expert "
            "(--lora-b-layout)",
            AdapterWarning,
            stacklevel=5,
        )
    return said or asked or "rank_major"


def _kept(array: np.ndarray) -> np.ndarray:
    """float32 and bf16 as they are, float16 as float32: bf16 has fewer bits for the mantissa."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _rescaled(factors: FileFactors, scale: float) -> FileFactors:
    """The same product with this scale, of factors in float32 if that is another."""
    if factors.scale == scale:
        return factors
    return FileFactors(factors.a, factors.b.astype(np.float32) * np.float32(factors.scale / scale), scale)


def _stack(factors: Sequence[FileFactors]) -> FileFactors:
    """Each expert's pair as one; smaller ranks are padded with zeros, and the first expert's scale holds for all."""
    scaled = [_rescaled(one, factors[0].scale) for one in factors]
    rank = max(one.a.shape[0] for one in scaled)
    a = np.stack([np.pad(one.a, ((0, rank - one.a.shape[0]), (0, 0))) for one in scaled])
    b = np.stack([np.pad(one.b, ((0, 0), (0, rank - one.b.shape[1]))) for one in scaled])
    return FileFactors(a, b, factors[0].scale)


def _interleave(gate: FileFactors | None, up: FileFactors | None) -> FileFactors:
    """gate_up's factors from those of its halves, whose rows alternate in B.

    The ranks add up, unless both have the same A, as where one adapter of gate_up was taken apart.
    """
    scale = next(half.scale for half in (gate, up) if half is not None)
    halves = [None if half is None else _rescaled(half, scale) for half in (gate, up)]
    there = [half for half in halves if half is not None]
    shared = len(there) == 2 and np.array_equal(there[0].a, there[1].a)
    a = there[0].a if shared else np.concatenate([half.a for half in there], axis=-2)
    experts, n, _ = there[0].b.shape
    b = np.zeros((experts, n, 2, a.shape[-2]), np.result_type(*(half.b.dtype for half in there)))
    start = 0
    for row, half in enumerate(halves):
        if half is not None:
            rank = half.b.shape[-1]
            b[:, :, row, start : start + rank] = half.b
            start += 0 if shared else rank
    return FileFactors(a, b.reshape(experts, 2 * n, -1), scale)
