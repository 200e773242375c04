"""What is derived from the figures that were measured: a peer's whole layer, and ours in proportion to it."""

from collections.abc import Sequence
from typing import Any

from jmoe.bench.case import Case
from jmoe.bench.ours import PACKED
from jmoe.bench.torch_peers import MARLIN, TRITON_KERNELS, TRITON_KERNELS_ROUTING, VLLM_LORA

type Row = dict[str, Any]
"""{experts, tokens, rank, adapters, microseconds: {name: a number, or why there is none}}"""


def case_of(row: Row) -> Case:
    """The case a row was measured at."""
    return Case(row["experts"], row["tokens"], row["rank"], row["adapters"])


def find(rows: Sequence[Row], case: Case) -> Row | None:
    """The row of a case."""
    return next((row for row in rows if case_of(row) == case), None)


def figure(row: Row | None, name: str) -> float | None:
    """A figure of a row, or None where there is none."""
    value = None if row is None else row["microseconds"].get(name)
    return float(value) if isinstance(value, int | float) else None


def total(*parts: float | None) -> float | None:
    """The sum, or None where a part is missing."""
    present = [part for part in parts if part is not None]
    return sum(present) if len(present) == len(parts) else None


def marlin_layer(row: Row | None) -> float | None:
    """Marlin's two products and triton_kernels' routing."""
    return total(figure(row, MARLIN), figure(row, TRITON_KERNELS_ROUTING))


def peer_layer(rows: Sequence[Row], case: Case) -> float | None:
    """The faster of triton_kernels and Marlin with routing, plus vLLM's adapters if there is one; None if unknown.

    The layer without LoRA is that of the row without LoRA, so it may be in another row than this case's.
    """
    if case.adapters > 1:
        return None
    base = find(rows, Case(case.experts, case.tokens))
    layers = [time for time in (figure(base, TRITON_KERNELS), marlin_layer(base)) if time is not None]
    if not layers:
        return None
    return min(layers) if not case.rank else total(min(layers), figure(find(rows, case), VLLM_LORA))


def ratio(rows: Sequence[Row], case: Case) -> float | None:
    """jmoe on packed experts / peer: below 1 is faster than the peer."""
    ours, peer = figure(find(rows, case), PACKED), peer_layer(rows, case)
    return None if ours is None or peer is None else ours / peer
