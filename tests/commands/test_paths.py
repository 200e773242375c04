"""Where commands read from and write to: an empty path is not a path."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jmoe.cli import app
from jmoe.commands.paths import output_path


@pytest.mark.parametrize(
    "command",
    [
        ["parity"],
        ["bench"],
        ["tune"],
        ["bench-model"],
        ["merge", "--model", "a-model", "--adapter", "an-adapter"],
        ["convert-adapter", "--model", "a-model", "--adapter", "an-adapter"],
        ["generate", "--model", "a-model", "a prompt"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_refused_before_anything_runs(command: list[str], path: str) -> None:
    run = CliRunner().invoke(app, [*command, "--out", path])
    assert run.exit_code == 2
    assert "Invalid value for '--out': must name a file or directory to write to" in run.output


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["merge", "--model", "a-model", "--out", "out"],
        ["convert-adapter", "--model", "a-model", "--out", "out"],
    ],
    ids=lambda command: command[0],
)
def test_an_empty_adapter_is_refused_before_anything_runs(command: list[str]) -> None:
    run = CliRunner().invoke(app, [*command, "--adapter", ""], env={"COLUMNS": "200"})
    assert run.exit_code == 2
    assert "Invalid value for '--adapter': must name a file or directory to read, got an empty path" in run.output


def test_any_other_path_is_one() -> None:
    assert output_path(".") == Path()
    assert output_path("a b/c") == Path("a b", "c")
    with pytest.raises(typer.BadParameter, match="got an empty path"):
        output_path("")
