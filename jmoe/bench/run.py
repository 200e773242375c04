"""Runs the matrix: each implementation at each case, in one process, on one GPU."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jmoe.bench import grouped_mm, ours, ragged_dot, torch_peers
from jmoe.bench.case import Case, Matrix, cases
from jmoe.bench.implementation import Implementation, Measure, UnavailableError
from jmoe.bench.weights import Weights

LONGEST_REASON = 120
"""Characters of an error that go into a cell."""


class Measured(NamedTuple):
    """A finished row: a figure, or the reason why there is none, by name."""

    case: Case
    microseconds: dict[str, float | str]


def implementations(marlin_library: Path | None = None) -> tuple[Implementation, ...]:
    """All there are, ours first."""
    return (
        *ours.IMPLEMENTATIONS,
        *torch_peers.implementations(marlin_library),
        *grouped_mm.IMPLEMENTATIONS,
        *ragged_dot.IMPLEMENTATIONS,
    )


def select(all_of_them: Sequence[Implementation], only: Sequence[str], skip: Sequence[str]) -> list[Implementation]:
    """Those that take a figure in `only`, or all if it is empty, without those that take one in `skip`.

    Raises:
      ValueError: no implementation takes a figure of that name.
    """
    known = [name for implementation in all_of_them for name in implementation.names]
    for name in (*only, *skip):
        if name not in known:
            raise ValueError(f"implementations are {', '.join(known)}; got {name!r}")
    return [
        implementation
        for implementation in all_of_them
        if (not only or set(only) & set(implementation.names)) and not set(skip) & set(implementation.names)
    ]


def run(matrix: Matrix, chosen: Sequence[Implementation]) -> Iterator[Measured]:
    """Each row as it is finished. What fails is a text in its cells and does not end the run."""
    for experts in matrix.experts:
        yield from run_experts(matrix, experts, chosen)
        free()


def run_experts(matrix: Matrix, experts: int, chosen: Sequence[Implementation]) -> Iterator[Measured]:
    """The rows of one number of experts, whose weights each implementation lays out once."""
    weights = Weights(matrix.size, experts)
    ready: dict[tuple[str, ...], Measure | str] = {}
    for case in cases(matrix, experts):
        microseconds: dict[str, float | str] = {}
        for implementation in chosen:
            if implementation.wants(case):
                microseconds |= measure(implementation, case, weights, ready)
        if microseconds:
            yield Measured(case, microseconds)


def measure(
    implementation: Implementation, case: Case, weights: Weights, ready: dict[tuple[str, ...], Measure | str]
) -> dict[str, float | str]:
    """One implementation's figures at a case, or the reason why there are none; prepares it if it is not `ready`."""
    names = implementation.names
    if names not in ready:
        ready[names] = attempt(lambda: implementation.prepare(weights))
    prepared = ready[names]
    figures = prepared if isinstance(prepared, str) else attempt(lambda: prepared(case))
    return dict.fromkeys(names, figures) if isinstance(figures, str) else dict(figures)


def attempt[T](work: Callable[[], T]) -> T | str:
    """What the work returns, or why it failed: whatever a peer raises is its own affair and not the run's."""
    try:
        return work()
    except UnavailableError as reason:
        return str(reason)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line}"[:LONGEST_REASON]


def free() -> None:
    """Returns the memory of weights that are no longer used, torch's too if anyone took it."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()
