"""A results file of `jmoe bench-model`, and how a run adds to it."""

import dataclasses
from pathlib import Path
from typing import Any

from jmoe.bench.model.case import Figures, ModelCase
from jmoe.checkpoint import read_json

type Results = dict[str, Any]
"""A birth certificate (see jmoe.bench.record) and the rows, each a case and its figures."""

SAME = ("commit", "device", "versions")
"""What must agree for rows to stand in one file."""


def start(certificate: dict[str, Any], out: Path | None) -> tuple[Results, list[str]]:
    """(results with the rows of `out`, what is other there than in this run); without rows where anything is.

    Raises:
      ValueError: `out` exists and does not hold a JSON object.
    """
    results = {**certificate, "rows": []}
    if out is None or not out.exists():
        return results, []
    earlier = read_json(out)
    others = [f"{key} {earlier.get(key)}" for key in SAME if earlier.get(key) != certificate[key]]
    return results if others else {**results, "rows": earlier["rows"]}, others


def add(results: Results, case: ModelCase, figures: Figures) -> None:
    """Puts a case's row in, in the place of an earlier one of the same case."""
    own = dataclasses.asdict(case)
    row = {**own, **figures}
    for index, earlier in enumerate(results["rows"]):
        if own.items() <= earlier.items():
            results["rows"][index] = row
            return
    results["rows"].append(row)
