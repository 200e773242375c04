"""A run's options: from a file, from flags, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jmoe.cli import app
from jmoe.finetune.config import FinetuneConfig, read_file

NEEDED = {"model": "m", "data": "d", "out": "o"}


def test_options_come_from_toml_and_json(tmp_path: Path) -> None:
    toml, json = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text('model = "m"\ndata = "d"\nout = "o"\nrank = 4\nalpha = 8\nschedule = "linear"\n')
    json.write_text('{"model": "m", "data": "d", "out": "o", "rank": 4, "alpha": 8, "schedule": "linear"}')
    config = FinetuneConfig.create(read_file(toml))
    assert config == FinetuneConfig.create(read_file(json))
    assert (config.rank, config.alpha, config.schedule, config.scale) == (4, 8.0, "linear", 2.0)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert FinetuneConfig.create({**NEEDED, "rank": 16, "alpha": 8, "rslora": True}).scale == 2.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"ranks": 4}, "unknown options ranks"),
        ({"rank": "4"}, "rank must be one of int, got '4'"),
        ({"rank": True}, "rank must be one of int, got True"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"schedule": "step"}, "schedule must be one of 'cosine', 'linear', 'constant', got 'step'"),
        ({"targets": "q,z"}, "targets must be some of q, k, v, o, gate_up, down"),
        ({"targets": ""}, "targets must be some of"),
        ({"epochs": float("inf")}, "epochs must be positive and finite, got inf"),
        ({"seed": 2**64}, r"seed must be in \[0, 2\*\*32\), got"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"clip": -1}, "clip must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_named(entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.create({**NEEDED, **entries})


def test_missing_options_are_named() -> None:
    with pytest.raises(ValueError, match="options without a value: data, out"):
        FinetuneConfig.create({"model": "m"})


@pytest.mark.parametrize(("name", "text"), [("run.toml", "rank ="), ("run.json", "{"), ("list.json", "[]")])
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_file(tmp_path / name)


def test_every_option_is_a_flag() -> None:
    help_text = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"}).output
    for field in dataclasses.fields(FinetuneConfig):
        assert f"--{field.name.replace('_', '-')}" in help_text
    assert "LoRA's rank. (default: 16)" in help_text
