"""A results file: what it holds, and how a run adds to it."""

import dataclasses
from pathlib import Path
from typing import Any

from jmoe.bench import record
from jmoe.bench.case import Case, Size
from jmoe.bench.figures import Row, case_of, find

type Results = dict[str, Any]
"""A birth certificate (see jmoe.bench.record), the layer's size and the rows."""


def start(certificate: dict[str, Any], size: Size, out: Path | None) -> Results:
    """jmoe.bench.record.start for layers of this size, and raises as it does."""
    return record.start({**certificate, "layer": dataclasses.asdict(size)}, out)


def add(results: Results, case: Case, microseconds: dict[str, float | str]) -> None:
    """Puts a row's figures in. A figure replaces an earlier one; a reason why there is none replaces only a reason."""
    row = find(results["rows"], case)
    if row is None:
        results["rows"].append({**dataclasses.asdict(case), "microseconds": microseconds})
        results["rows"].sort(key=order)
        return
    for name, value in microseconds.items():
        if not (isinstance(value, str) and isinstance(row["microseconds"].get(name), float)):
            row["microseconds"][name] = value


def order(row: Row) -> tuple[int, int, int, int]:
    """Rows stand by experts, then adapters, rank and tokens."""
    case = case_of(row)
    return case.experts, case.adapters, case.rank, case.tokens
