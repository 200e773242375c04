"""README's line about the GPU tests, from the record that `make gpu-test` writes."""

from pathlib import Path
from typing import Any

from jmoe.bench.source_hash import PARITY

RECORD = Path(__file__).parent / "results" / "gpu_tests.json"

GPU_TESTS = (*PARITY, "jmoe/nn", "jmoe/gpt_oss", "tests/gpu")
"""What these tests test, and themselves; see jmoe.bench.source_hash."""


def summary(record: dict[str, Any]) -> str:
    """How many tests passed, failed and were skipped, and which phases were not run."""
    ran = {name: result for name, result in record["phases"].items() if result is not None}
    passed = sum(result["passed"] for result in ran.values())
    failed = [test for result in ran.values() for test in result["failed"]]
    skipped = sum(count for result in ran.values() for count in result["skipped"].values())
    parts = [f"{passed} passed, {len(failed)} failed, {skipped} skipped."]
    parts += [f"Failed: {', '.join(failed)}."] if failed else []
    missing = [name for name in record["phases"] if name not in ran]
    parts += [f"Not run: {', '.join(missing)}."] if missing else []
    return " ".join(parts)
