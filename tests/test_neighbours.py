"""docs/neighbours.md: what it names as evidence is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "neighbours.md").read_text()


def test_tests_named_as_evidence_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) > 20
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file() or f"def {name or 'test_'}" not in (ROOT / file).read_text()
    ]
    assert not missing


def test_findings_are_all_told() -> None:
    assert set(re.findall(r"`findings/(\w+\.sh)`", TEXT)) == {file.name for file in (ROOT / "findings").glob("*.sh")}
