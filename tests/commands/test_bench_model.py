"""`jmoe bench-model` and the file that several calls write; stubs stand for what measures."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jmoe.bench import record
from jmoe.bench.model import run
from jmoe.bench.model.case import Figures, ModelCase
from jmoe.cli import app

HERE = {"date": "2000-01-01", "commit": "abc", "device": "cpu", "versions": {"jax": "1", "vllm": None}}


def call(monkeypatch: pytest.MonkeyPatch, kinds: str, figures: Figures, out: Path, **other: object) -> None:
    """The command, where every case gives these figures."""

    def measured(cases: Iterable[ModelCase]) -> Iterator[tuple[ModelCase, Figures]]:
        return ((case, figures) for case in cases)

    monkeypatch.setattr(record, "certificate_elsewhere", lambda measured: HERE | other)
    monkeypatch.setattr(run, "run", measured)
    done = CliRunner().invoke(app, ["bench-model", "--kinds", kinds, "--out", str(out)])
    assert done.exit_code == ("error" in figures), done.output


def rows(out: Path) -> list[tuple[str, Figures]]:
    """Each row's kind, and its figures without the case."""
    case = ("size", "sequences", "length", "rank")
    return [
        (row.pop("kind"), {name: value for name, value in row.items() if name not in case})
        for row in json.loads(out.read_text())["rows"]
    ]


@pytest.mark.slow
def test_a_second_call_adds_its_cases_and_replaces_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.json"
    call(monkeypatch, "generate,load", {"error": "out of memory"}, out)
    call(monkeypatch, "generate,finetune", {"ms": 2.0}, out, date="2000-01-02")
    assert rows(out) == [("generate", {"ms": 2.0}), ("load", {"error": "out of memory"}), ("finetune", {"ms": 2.0})]
    results = json.loads(out.read_text())
    assert {name: results[name] for name in HERE} == HERE | {"date": "2000-01-02"}


def test_cases_that_differ_in_a_number_have_each_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.json"
    cases = (ModelCase("load", "tiny", rank=0), ModelCase("load", "tiny", rank=4))
    for case in cases:
        monkeypatch.setattr("jmoe.bench.model.case.CPU_CASES", (case,))
        call(monkeypatch, "load", {"ms": float(case.rank)}, out)
    assert rows(out) == [("load", {"ms": 0.0}), ("load", {"ms": 4.0})]


def test_figures_of_another_commit_are_kept_and_the_command_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.json"
    call(monkeypatch, "load", {"ms": 1.0}, out, commit="def")
    monkeypatch.setattr(record, "certificate_elsewhere", lambda measured: HERE)
    done = CliRunner().invoke(app, ["bench-model", "--kinds", "generate", "--out", str(out)])
    assert "model.json holds figures of commit def, this run is of abc: remove" in str(done.exception)
    assert rows(out) == [("load", {"ms": 1.0})]


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("mine")
    done = CliRunner().invoke(app, ["bench-model", "--kinds", "load", "--out", str(out)])
    assert isinstance(done.exception, ValueError)
    assert "notes.txt is not valid JSON" in str(done.exception)
    assert out.read_text() == "mine"


def test_cases_that_are_not_of_this_machine_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "certificate_elsewhere", lambda measured: HERE)
    done = CliRunner().invoke(app, ["bench-model", "--sizes", "20b"])
    assert done.exit_code == 2
    assert "no such cases on this machine" in done.output
