"""A results file: what it holds, and how a run adds to it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jmoe.bench.case import Case, Size
from jmoe.bench.figures import Row, case_of, find

type Results = dict[str, Any]
"""A birth certificate (see jmoe.bench.record), the layer's size and the rows."""

SAME = ("commit", "device", "versions", "layer", "passes")
"""What must agree for figures to stand in one file."""


def start(certificate: dict[str, object], size: Size, out: Path | None) -> Results:
    """Results without rows, or with those of `out` if it exists.

    Raises:
      ValueError: `out` holds figures of another commit, GPU, version, size or pass.
    """
    results = {**certificate, "layer": dataclasses.asdict(size), "rows": []}
    if out is None or not out.exists():
        return results
    earlier = json.loads(out.read_text())
    for key in SAME:
        if earlier.get(key) != results.get(key):
            raise ValueError(
                f"{out} holds figures of {key} {earlier.get(key)}, this run is of {results.get(key)}: "
                "remove the file or name another"
            )
    return {**results, "rows": earlier["rows"]}


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
