"""Runs the GPU tests, phase by phase, and writes the record of them that README shows: what `make gpu-test` does.

python -m tests.gpu.record [--out FILE] [PHASE...] runs all phases, or these. What a file of the same code, GPU and
versions says of other phases stays, so that a machine that is lent for minutes can take one phase at a time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jmoe.bench.gpu_tests import GPU_TESTS, RECORD
from jmoe.bench.record import certificate_elsewhere, write
from jmoe.checkpoint.config_file import read_json

TESTS = Path(__file__).parents[1]


class Phase(NamedTuple):
    """Tests that run together: which, in how many processes, and what part of the GPU's memory JAX may take in each."""

    marked: str
    workers: int
    memory: float


PHASES = {
    "small": Phase("not large_memory and not alone", 12, 0.07),
    "large": Phase("large_memory", 3, 0.25),
    "alone": Phase("alone", 1, 0.75),
}
"""For 16 cores and 139 GiB, some of which is torch's: a process's share is a limit, and taken as it is needed."""


def files() -> list[str]:
    """The files that have GPU tests."""
    return [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in file.read_text()]


def run(phase: Phase) -> dict[str, Any]:
    """What came of a phase's tests.

    Raises:
      RuntimeError: pytest did not run them to the end.
    """
    environment = dict(
        os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", XLA_PYTHON_CLIENT_MEM_FRACTION=str(phase.memory)
    )
    workers = ["-n", str(phase.workers), "--dist", "worksteal"] if phase.workers > 1 else ["-n", "0"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        marked = f"gpu and {phase.marked}"
        options = ["-q", "--durations=15", *workers, "-m", marked, f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *files()]
        status = subprocess.run(command, cwd=TESTS.parent, env=environment, check=False).returncode
        if status not in (0, 1):  # all passed, some failed
            raise RuntimeError(f"pytest did not run the tests {marked!r} to the end: exit status {status}")
        return outcome(report.read_text())


def outcome(report: str) -> dict[str, Any]:
    """The figures of pytest's report, which is JUnit's XML."""
    failed: list[str] = []
    skipped: Counter[str] = Counter()
    suites = ET.fromstring(report)
    cases = list(suites.iter("testcase"))
    for case in cases:
        kinds = {child.tag: child.get("message", "") for child in case}
        if kinds.keys() & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped[kinds["skipped"]] += 1
    return {
        "passed": len(cases) - len(failed) - skipped.total(),
        "failed": failed,
        "skipped": dict(skipped),
        "seconds": round(sum(float(suite.get("time", 0)) for suite in suites.iter("testsuite"))),
    }


def merge(earlier: Mapping[str, Any] | None, certificate: Mapping[str, Any], name: str, result: Any) -> dict[str, Any]:
    """The record with a phase's result, and the others' as they were if that was the same code on the same GPU."""
    phases = dict.fromkeys(PHASES)
    same = ("source_hash", "device", "versions")
    if earlier is not None and all(earlier.get(key) == certificate[key] for key in same):
        phases |= {known: earlier["phases"].get(known) for known in PHASES}
    return {**certificate, "phases": {**phases, name: result}}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Runs the GPU tests and writes a record of them.")
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--out", type=Path, default=RECORD, help="the record")
    options = parser.parse_args()
    if unknown := set(options.phases) - PHASES.keys():
        parser.error(f"phases are {', '.join(PHASES)}; got {', '.join(sorted(unknown))}")
    certificate = certificate_elsewhere(GPU_TESTS)
    if certificate["device"] == "cpu":
        parser.error("JAX sees no GPU here")
    failed = []
    for name in options.phases or PHASES:
        result = run(PHASES[name])
        record = merge(read_json(options.out) if options.out.exists() else None, certificate, name, result)
        write(options.out, record)
        print(f"{name}: {result['passed']} passed, {len(result['failed'])} failed, {result['skipped']} skipped")
        failed += result["failed"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
