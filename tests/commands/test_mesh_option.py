"""--mesh of the commands that compute with a model, on the two CPU devices that tests have."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from jmoe.bench.model.case import ModelCase
from jmoe.bench.model.generation import measure
from jmoe.cli import app

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--model", str(TINY), "Hi"],
        ["eval", "--model", str(TINY), "--tasks", "arc_easy"],
        ["serve", "--model", str(TINY)],
        ["bench-model", "--kinds", "generate"],
    ],
)
def test_a_mesh_of_other_sizes_is_one_line(command: list[str]) -> None:
    run = CliRunner().invoke(app, [*command, "--mesh", "expert=3"])
    assert str(run.exception) == (
        "mesh expert=3 is of 3 devices, and there are 2 devices; with the others as they are expert=2 would fit"
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "expert=2"])
def test_texts_on_a_mesh_are_those_of_one_device(mesh: str) -> None:
    adapter = ["--adapter", str(TINY / "adapter")]
    command = ["generate", "--model", str(TINY), "--max-new-tokens", "10", "--raw", *adapter, "The License", "Hi"]
    alone, split = (CliRunner().invoke(app, [*command, *options]) for options in ([], ["--mesh", mesh]))
    assert alone.exit_code == split.exit_code == 0, split.output
    assert split.stdout == alone.stdout


@pytest.mark.slow
def test_generation_is_measured_on_a_mesh() -> None:
    figures = measure(ModelCase("generate", "tiny", 2, 8, 4, mesh="model=2"))
    assert figures["decode_step_ms"] > 0


def test_a_case_of_one_device_has_no_mesh_in_its_row() -> None:
    assert "mesh" not in ModelCase("generate", "tiny").row
    assert ModelCase("generate", "tiny", mesh="data=2").row["mesh"] == "data=2"
