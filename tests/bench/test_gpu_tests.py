"""The record of the GPU tests: from pytest's reports to README's line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jmoe.bench.gpu_tests import GPU_TESTS, summary
from jmoe.bench.source_hash import ROOT, source_hash
from tests.gpu import record

HERE = {"date": "2000-01-01", "commit": "abc", "source_hash": "1", "device": "NVIDIA H200", "versions": {"jax": "1"}}

TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_errs(broken): pass
@pytest.mark.skip(reason="no such peer")
def test_skips(): pass
"""


def test_reports_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_some.py"]
    environment = dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    result = record.outcome(report.read_text())
    assert (result["passed"], result["skipped"]) == (1, {"no such peer": 1})
    assert sorted(result["failed"]) == ["test_some::test_errs", "test_some::test_fails"]


def result(passed: int, failed: tuple[str, ...] = (), skipped: int = 0) -> dict[str, Any]:
    return {"passed": passed, "failed": list(failed), "skipped": {"why": skipped} if skipped else {}, "seconds": 1}


def test_phases_add_up_to_one_record() -> None:
    first = record.merge(None, HERE, "small", result(5, skipped=2))
    assert summary(first) == "5 passed, 0 failed, 2 skipped. Not run: large, alone."
    second = record.merge(first, {**HERE, "date": "2000-01-02"}, "large", result(3, ("test_moe::test_x",)))
    assert summary(second) == "8 passed, 1 failed, 2 skipped. Failed: test_moe::test_x. Not run: alone."
    assert second["date"] == "2000-01-02"
    again = record.merge(second, HERE, "large", result(4))
    assert summary(record.merge(again, HERE, "alone", result(1))) == "10 passed, 0 failed, 2 skipped."


@pytest.mark.parametrize("other", [{"source_hash": "2"}, {"device": "NVIDIA H100"}, {"versions": {"jax": "2"}}])
def test_what_other_code_or_another_gpu_gave_is_dropped(other: dict[str, object]) -> None:
    first = record.merge(None, HERE, "small", result(5))
    assert summary(record.merge(first, HERE | other, "large", result(3))).endswith("Not run: small, alone.")


def test_each_gpu_test_is_of_one_phase() -> None:
    """By what their marks may be: a test that measures is alone, whatever memory it takes."""
    for marks in ({"gpu"}, {"gpu", "large_memory"}, {"gpu", "alone"}):
        phases = [name for name, phase in record.PHASES.items() if eval(phase.marked, {}, marked(marks))]
        assert len(phases) == 1


def marked(marks: set[str]) -> dict[str, bool]:
    return {name: name in marks for name in ("gpu", "large_memory", "alone")}


def test_every_file_with_gpu_tests_is_run() -> None:
    names = {Path(file).name for file in record.files()}
    assert {"test_moe.py", "test_packed.py", "test_dlpack.py", "test_flash_attention.py"} <= names
    assert source_hash(GPU_TESTS, ROOT)
