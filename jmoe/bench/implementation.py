"""What every implementation that is measured offers, ours and the peers'."""

import dataclasses
from collections.abc import Callable

from jmoe.bench.case import Case
from jmoe.bench.weights import Weights

type Figures = dict[str, float]
"""Microseconds a call by name; where the name says MiB, mebibytes."""

type Measure = Callable[[Case], Figures]


class UnavailableError(Exception):
    """An implementation cannot run here; the text is the reason, in the few words that fit a table's cell."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Something to measure.

    names: of the figures it takes, as they stand in the results.
    wants: whether it is measured at a case.
    prepare: called once for a number of experts, and what it returns once for each case.
    """

    names: tuple[str, ...]
    wants: Callable[[Case], bool]
    prepare: Callable[[Weights], Measure]


def without_lora(case: Case) -> bool:
    """Whether a case has no adapters."""
    return case.rank == 0
