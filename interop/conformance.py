"""What any function of the MXFP4 mixture-of-experts contract is tried on: small layers whose buffers lie in poison.

Every buffer stands between guards of NaN, in bytes of 0xFF (as a scale: NaN): what reads past an end shows in its
result, and what writes there in the guards. Results are compared with jmoe.interop.reference in float64.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch

from jmoe.interop import reference
from jmoe.interop.dlpack import to_jax, to_torch

GUARD = 1 << 16
"""Bytes of poison on either side: more than a tile of 64 rows that such a layer has."""

POISON = {torch.uint8: 0xFF, torch.bfloat16: math.nan}
HARMLESS = {torch.uint8: 0, torch.bfloat16: 0.0}

TOLERANCE = 5e-3
"""||y - exact|| / ||exact||: three roundings to bfloat16 on the way, of 2e-3 each."""

type Arrays = Literal["torch", "jax"]


class Contract(Protocol):
    """gpt-oss's layer in the order of its checkpoints: y [T, H] bfloat16.

    x bfloat16 [T, H]; router_logits bfloat16 [T, E]; blocks uint8 [E, N, K/32, 16] and scales uint8 [E, N, K/32] of
    gate_up [E, 2I, H] and down [E, H, I]; biases bfloat16 [E, 2I] and [E, H], or None. A token's top_k experts are
    those of its largest logits, weighted by the softmax over these; gate and up alternate in gate_up's rows, and what
    comes between the products is jmoe.SwiGLU(). Arrays are contiguous, and must not be written.
    """

    def __call__(
        self,
        x: Any,
        router_logits: Any,
        *,
        gate_up_blocks: Any,
        gate_up_scales: Any,
        gate_up_bias: Any,
        down_blocks: Any,
        down_scales: Any,
        down_bias: Any,
        top_k: int,
    ) -> Any: ...


@dataclasses.dataclass
class Case:
    """A layer. weight bytes and all else by the contract's names; None for a bias that there is not."""

    name: str
    tensors: dict[str, torch.Tensor | None]
    top_k: int


class Finding(NamedTuple):
    """What became of a case. error: relative, of the finite values; NaN where there is no result."""

    case: str
    passed: bool
    error: float
    said: str


def random_case(
    name: str, tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, bias: bool = True
) -> Case:
    """Rows of weights have norm about 1, and logits no ties."""
    g = torch.Generator().manual_seed(0)

    def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        middle = round(127 - math.log2(2.93 * math.sqrt(k)))  # 2.93: root mean square of e2m1's values
        blocks = torch.randint(0, 256, (experts, n, k // 32, 16), generator=g, dtype=torch.uint8)
        return blocks, torch.randint(middle - 1, middle + 2, (experts, n, k // 32), generator=g, dtype=torch.uint8)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).bfloat16()

    gate_up, down = weight(2 * intermediate, hidden), weight(hidden, intermediate)
    orders = [torch.randperm(experts, generator=g) for _ in range(tokens)]
    logits = torch.stack(orders) if tokens else torch.empty(0, experts)
    tensors = {
        "x": normal(tokens, hidden),
        "router_logits": ((logits - experts / 2) / 8).bfloat16(),
        "gate_up_blocks": gate_up[0],
        "gate_up_scales": gate_up[1],
        "gate_up_bias": normal(experts, 2 * intermediate) if bias else None,
        "down_blocks": down[0],
        "down_scales": down[1],
        "down_bias": normal(experts, hidden) if bias else None,
    }
    return Case(name, tensors, top_k)


def cases() -> Iterator[Case]:
    """All that is tried."""
    yield random_case("sizes of whole tiles", 64, 128, 128, 4, 2)
    yield random_case("one token", 1, 64, 64, 4, 1)
    yield random_case("no tokens", 0, 64, 64, 4, 2)
    yield random_case("no biases", 16, 64, 64, 4, 2, bias=False)
    yield random_case("odd sizes: 13 tokens, 160/224, 5 experts, top-3", 13, 160, 224, 5, 3)
    yield random_case("odd sizes: 67 tokens, 96/32, 3 experts, top-1", 67, 96, 32, 3, 1)
    empty = random_case("empty experts, whose weights are NaN", 9, 64, 96, 8, 2)
    logits, scales = empty.tensors["router_logits"], (empty.tensors["gate_up_scales"], empty.tensors["down_scales"])
    assert logits is not None
    logits[:, :] = torch.arange(8) / 8
    for each in scales:
        assert each is not None
        each[:6] = 0xFF
    yield empty
    crowded = random_case("all tokens at one expert", 130, 64, 64, 4, 1)
    logits = crowded.tensors["router_logits"]
    assert logits is not None
    logits[:, :] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    yield crowded
    for byte in (0, 254, 255):
        case = random_case(f"scale byte {byte}", 9, 64, 96, 4, 2, bias=False)
        blocks, of_blocks = case.tensors["gate_up_blocks"], case.tensors["gate_up_scales"]
        assert blocks is not None
        assert of_blocks is not None
        of_blocks[1, 10, 1] = byte
        # One value of 0.5, the rest zeros of either sign: 2^126 times an activation stays below float32's infinity.
        blocks[1, 10, 1] = torch.tensor([0x80, 0x08, 0x01, *[0] * 13], dtype=torch.uint8)
        yield case


class Surrounded(NamedTuple):
    """A copy of a tensor between guards."""

    tensor: torch.Tensor
    whole: torch.Tensor  # with the guards
    before: torch.Tensor  # the whole's bytes at first

    @classmethod
    def of(cls, tensor: torch.Tensor, device: torch.device, guard: dict[torch.dtype, Any]) -> "Surrounded":
        beside = GUARD // tensor.element_size()
        whole = torch.full((tensor.numel() + 2 * beside,), guard[tensor.dtype], dtype=tensor.dtype, device=device)
        inside = whole[beside : beside + tensor.numel()]
        inside.copy_(tensor.reshape(-1))
        return cls(inside.view(tensor.shape), whole, whole.view(torch.uint8).clone())

    def is_written(self) -> bool:
        return not torch.equal(self.whole.view(torch.uint8), self.before)


def check(function: Contract, case: Case, arrays: Arrays, device: torch.device) -> Finding:
    """The function on a case."""
    want = exact(case)
    try:
        written, y = call(function, case, arrays, device, dict.fromkeys(case.tensors, POISON))
    except Exception as raised:  # whatever it is, it is what is found
        return Finding(case.name, False, math.nan, f"raises {type(raised).__name__}: {str(raised).split(chr(10))[0]}")
    error, said = compared(y, want)
    if written:
        said = f"writes to or beside {', '.join(written)}"
    elif said:
        said = said + reads_past(function, case, arrays, device, want)
    return Finding(case.name, not said, error, said or "as it should be")


def reads_past(function: Contract, case: Case, arrays: Arrays, device: torch.device, want: torch.Tensor) -> str:
    """Which buffers' ends matter to a wrong result: it is right between zeros, and wrong with these in poison."""
    zeros = dict.fromkeys(case.tensors, HARMLESS)
    if compared(call(function, case, arrays, device, zeros)[1], want)[1]:
        return ", whatever lies beside the buffers"
    past = [
        name
        for name, tensor in case.tensors.items()
        if tensor is not None and compared(call(function, case, arrays, device, zeros | {name: POISON})[1], want)[1]
    ]
    return f": reads past the ends of {', '.join(past) or 'several buffers'}"


def call(
    function: Contract, case: Case, arrays: Arrays, device: torch.device, guards: dict[str, dict[torch.dtype, Any]]
) -> tuple[list[str], torch.Tensor]:
    """(names of buffers that were written to, y on the CPU), with each buffer between its guards."""
    placed = {
        name: Surrounded.of(tensor, device, guards[name]) for name, tensor in case.tensors.items() if tensor is not None
    }
    given: dict[str, Any] = dict.fromkeys(case.tensors)
    given |= {name: to_jax(each.tensor) if arrays == "jax" else each.tensor for name, each in placed.items()}
    y = function(given.pop("x"), given.pop("router_logits"), top_k=case.top_k, **given)
    if arrays == "jax":
        y = to_torch(y.block_until_ready(), "the function's result")
    y = y.detach().cpu().clone()
    return [name for name, each in placed.items() if each.is_written()], y


@dataclasses.dataclass
class _Weight:
    blocks: Any
    scales: Any


@dataclasses.dataclass
class _Experts:
    gate_up: Any
    gate_up_bias: Any
    down: Any
    down_bias: Any


def exact(case: Case) -> torch.Tensor:
    """y in float64."""
    t: dict[str, Any] = case.tensors
    gate_up, down = (_Weight(t[f"{name}_blocks"], t[f"{name}_scales"]) for name in ("gate_up", "down"))
    experts = _Experts(gate_up, t["gate_up_bias"], down, t["down_bias"])
    return reference.moe(t["x"], t["router_logits"], experts, top_k=case.top_k)


def compared(y: torch.Tensor, want: torch.Tensor) -> tuple[float, str]:
    """(relative error of what is finite in both, what is wrong or nothing)."""
    if y.shape != want.shape or y.dtype != torch.bfloat16:
        return math.nan, f"returns {y.dtype} {list(y.shape)} where bfloat16 {list(want.shape)} was expected"
    finite, wanted = torch.isfinite(y), torch.isfinite(want)
    both = finite & wanted
    size = float(want[both].norm())
    error = float((y[both].double() - want[both]).norm()) / size if size else float(y[both].double().norm())
    if not torch.equal(finite, wanted):
        rows = int((finite != wanted).any(dim=1).sum())
        missing = "NaN or infinity where there is none" if (wanted & ~finite).any() else "finite where NaN should be"
        return error, f"{missing}, in {rows} of {len(y)} tokens"
    return error, f"off by {error:.1e}, more than {TOLERANCE:.0e}" if error > TOLERANCE else ""


def try_all(function: Contract, arrays: Arrays, device: torch.device, only: Callable[[str], bool]) -> Iterator[Finding]:
    """The function on all cases whose names are wanted, one after another."""
    for case in cases():
        if only(case.name):
            yield check(function, case, arrays, device)
