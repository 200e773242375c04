"""Layers as torch tensors, for tests of the kernels: random, hostile, and surrounded by poison."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.scoring import Scoring


@dataclasses.dataclass
class Weight:
    """MXFP4 bytes."""

    blocks: torch.Tensor
    scales: torch.Tensor


@dataclasses.dataclass
class Experts:
    gate_up: Weight | torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: Weight | torch.Tensor
    down_bias: torch.Tensor | None


@dataclasses.dataclass
class Lora:
    gate_up_a: torch.Tensor | None = None
    gate_up_b: torch.Tensor | None = None
    gate_up_scale: torch.Tensor | None = None
    down_a: torch.Tensor | None = None
    down_b: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None


@dataclasses.dataclass
class Routing:
    experts: torch.Tensor
    weights: torch.Tensor


@dataclasses.dataclass
class Layer:
    """The tensor arguments of jmoe.interop.moe, top_k, the activation and the scoring."""

    x: torch.Tensor
    router_logits: torch.Tensor
    experts: Experts
    lora: Lora | None
    adapter_ids: torch.Tensor | None
    top_k: int
    activation: SwiGLU = SwiGLU()
    scoring: Scoring = Scoring()
    choice_bias: torch.Tensor | None = None

    @property
    def options(self) -> dict:
        return {
            "top_k": self.top_k,
            "lora": self.lora,
            "adapter_ids": self.adapter_ids,
            "activation": self.activation,
            "scoring": self.scoring,
            "choice_bias": self.choice_bias,
        }


def random_layer(
    *,
    tokens: int,
    hidden: int = 64,
    intermediate: int = 96,
    experts: int = 4,
    top_k: int = 2,
    adapters: int = 0,
    gate_up_rank: int | None = None,
    down_rank: int | None = None,
    mixed: bool = False,
    mxfp4: bool = True,
    bias: bool = True,
    activation: SwiGLU = SwiGLU(),
    seed: int = 0,
) -> Layer:
    """Rows of weights have norm about 1, logits have no ties, adapters are about as strong as the weights."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731

    def weight(n: int, k: int) -> Weight | torch.Tensor:
        if not mxfp4:
            return (normal(experts, n, k) / math.sqrt(k)).bfloat16()
        middle = round(127 - math.log2(2.93 * math.sqrt(k)))
        return Weight(
            torch.randint(0, 256, (experts, n, k // 32, 16), generator=g, dtype=torch.uint8),
            torch.randint(middle - 1, middle + 2, (experts, n, k // 32), generator=g, dtype=torch.uint8),
        )

    def adapter(n: int, k: int, rank: int | None) -> tuple:
        if not adapters or rank is None:
            return None, None, None
        a, b = normal(adapters, experts, rank, k) / math.sqrt(k), normal(adapters, experts, n, rank) / math.sqrt(rank)
        return a.bfloat16(), b.bfloat16(), torch.rand(adapters, generator=g) + 0.5

    gate_up, down = weight(2 * intermediate, hidden), weight(hidden, intermediate)
    biases = [normal(experts, n).bfloat16() if bias else None for n in (2 * intermediate, hidden)]
    lora = Lora(*adapter(2 * intermediate, hidden, gate_up_rank), *adapter(hidden, intermediate, down_rank))
    logits = (
        torch.stack([torch.randperm(experts, generator=g) for _ in range(tokens)])
        if tokens
        else torch.empty(0, experts)
    )
    return Layer(
        x=normal(tokens, hidden).bfloat16(),
        router_logits=((logits - experts / 2) / 8).bfloat16(),
        experts=Experts(gate_up, biases[0], down, biases[1]),
        lora=lora if adapters else None,
        adapter_ids=torch.randint(-1, adapters, (tokens,), generator=g, dtype=torch.int32) if mixed else None,
        top_k=top_k,
        activation=activation,
    )


def tensors(tree: object) -> list[torch.Tensor]:
    """Every tensor in a layer or a part of it."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if dataclasses.is_dataclass(tree):
        return [t for field in dataclasses.fields(tree) for t in tensors(getattr(tree, field.name))]
    return []


def transform(tree: object, fn: object) -> object:
    """The same layer with fn applied to every tensor."""
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    if dataclasses.is_dataclass(tree):
        return type(tree)(**{f.name: transform(getattr(tree, f.name), fn) for f in dataclasses.fields(tree)})
    return tree


def leaves(layer: Layer) -> dict[str, torch.Tensor]:
    """What is differentiated, by name."""
    named = {"x": layer.x, "router_logits": layer.router_logits}
    for projection in ("gate_up", "down"):
        named[f"{projection}_bias"] = getattr(layer.experts, f"{projection}_bias")
        if layer.lora is not None:
            named |= {f"{projection}_{part}": getattr(layer.lora, f"{projection}_{part}") for part in "ab"}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def gradients(
    layer: Layer, function: Callable[..., torch.Tensor], dy: torch.Tensor, **options: object
) -> dict[str, torch.Tensor]:
    """Of <y, dy> in every leaf."""
    found = leaves(layer)
    for tensor in found.values():
        tensor.requires_grad_()
    y = function(layer.x, layer.router_logits, layer.experts, **{**layer.options, **options})
    grads = torch.autograd.grad(y, list(found.values()), dy.to(y.dtype), allow_unused=True)
    for tensor in found.values():
        tensor.requires_grad_(False)
    return {name: grad for name, grad in zip(found, grads, strict=True) if grad is not None}


POISON = {torch.uint8: 0xFF, torch.int32: 0x7FFFFFF0, torch.bfloat16: math.nan, torch.float32: math.nan}
"""What must never be read: 0xFF is the scale that is NaN, the integer indexes out of every buffer."""

GUARD = 256
"""Elements of poison on either side; a multiple of 16 bytes for every dtype."""


def surround(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that lies in the middle of poison."""
    flat = torch.full((tensor.numel() + 2 * GUARD,), POISON[tensor.dtype], dtype=tensor.dtype, device=tensor.device)
    inside = flat[GUARD : GUARD + tensor.numel()]
    inside.copy_(tensor.reshape(-1))
    return inside.view(tensor.shape)


class PoisonedAllocator:
    """Stands for jmoe.interop.launch.allocate: results start as poison, in poison, and writes past them are noticed."""

    def __init__(self) -> None:
        self.flats: list[torch.Tensor] = []

    def __call__(self, buffer: object, device: torch.device) -> torch.Tensor:
        dtype = getattr(torch, buffer.dtype)
        count = math.prod(buffer.shape)
        flat = torch.full((count + 2 * GUARD,), POISON[dtype], dtype=dtype, device=device)
        self.flats.append(flat)
        return flat[GUARD : GUARD + count].view(buffer.shape)

    def guards_are_intact(self) -> bool:
        """Whether nothing was written outside the results."""
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        for flat in self.flats:
            whole = flat.view(bits[flat.element_size()])
            poison = torch.full_like(flat, POISON[flat.dtype]).view(whole.dtype)
            if not (torch.equal(whole[:GUARD], poison[:GUARD]) and torch.equal(whole[-GUARD:], poison[-GUARD:])):
                return False
        return True


@contextlib.contextmanager
def poisoned_results() -> Iterator[None]:
    """What kernels write starts as poison, in poison, and nothing is written beside it."""
    from jmoe.interop import launch

    allocate, allocator = launch.allocate, PoisonedAllocator()
    launch.allocate = allocator
    try:
        yield
        assert allocator.guards_are_intact()
    finally:
        launch.allocate = allocate


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """||y - exact|| / ||exact|| over finite entries; infinity unless both are finite in the same places."""
    finite = torch.isfinite(exact)
    if not torch.equal(torch.isfinite(y), finite):
        return math.inf
    want = exact[finite].double()
    difference = (y[finite].double() - want).norm()
    return float(difference / want.norm()) if float(want.norm()) else float(difference)
