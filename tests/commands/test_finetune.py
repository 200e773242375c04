"""`jmoe finetune` up to the first step."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from jmoe import cli
from jmoe.finetune import prepare, run
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.memory import GIB
from jmoe.finetune.options_file import read_file

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny_gpt_oss"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "the first of the rows"}\n{"text": "the second"}\n{"words": 3}\n')
    return file


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["finetune", *map(str, words)])


def needed(data: Path, out: Path) -> list[object]:
    return ["--model", TINY, "--data", data, "--out", out]


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("a dry run loads no model"))
    more = ["--length", 64, "--steps", 3, "--bad-rows", "skip", "--validation-fraction", 0, "--dry-run"]
    done = invoke(*needed(data, tmp_path / "out"), "--data", data, *more)
    assert done.exit_code == 0, done.output
    assert "6 rows" in done.output
    assert "2 skipped as bad" in done.output
    assert f"{data}, line 3: a row must be" in done.output
    assert "4 rows" in done.output
    assert "[[" in done.output
    assert "3 steps of 64 tokens" in done.output
    assert "memory of a step: about" in done.output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_plans_for_a_mesh_of_devices_that_are_not_here(data: Path, tmp_path: Path) -> None:
    more = ["--length", 64, "--bad-rows", "skip", "--validation-fraction", 0, "--dry-run", "--batch-size", 64]
    done = invoke(*needed(data, tmp_path / "out"), *more, "--mesh", "data=8,expert=8")
    assert "mesh data=8,expert=8: 64 devices; each computes 1 of 64 sequences at once and holds 1 of 8" in done.output
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "data=2"], "must be a multiple of 2, those along mesh data, got 1"),
        (["--mesh", "data=3"], "mesh data=3 is of 3 devices, and there are 2 devices"),
        (["--mesh", "expert=2", "--fsdp"], "fsdp splits experts over the data axis, and there is none"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error_before_rows_are_read(
    flags: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    assert message in str(invoke(*needed(data, tmp_path / "out"), *flags).exception)


def test_a_step_that_does_not_fit_is_warned_of_before_the_model_is_loaded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "device_limit", lambda: GIB // 8)
    done = invoke(*needed(data, tmp_path / "out"), "--bad-rows", "skip", "--length", 64, "--dry-run")
    assert "warning: a step is likely to take more memory" in done.output


def test_the_example_of_a_file_has_what_is_given_and_runs(data: Path, tmp_path: Path) -> None:
    given = [*needed(data, tmp_path / "out"), "--rank", 3, "--bad-rows", "skip", "--length", 64]
    for kind in ("toml", "yaml"):
        file = tmp_path / f"run.{kind}"
        file.write_text(invoke(*given, "--write-config", "--config-format", kind).output)
        config = FinetuneConfig.create(read_file(file))
        assert (config.rank, config.data, config.length) == (3, (str(data),), 64)
        done = invoke("--config", file, "--rank", 5, "--dry-run")
        assert done.exit_code == 0, done.output
        assert "rank                 5" in done.output


def test_a_list_of_files_is_replaced_by_flags(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": str(TINY), "data": ["nowhere", "gone"], "out": "o", "length": 64}))
    assert "nowhere" in str(invoke("--config", file, "--dry-run").exception)
    assert invoke("--config", file, "--data", data, "--bad-rows", "skip", "--dry-run").exit_code == 0


def test_a_choice_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    done = invoke("--remat", "everything")
    assert done.exit_code == 2
    for choice in ("nothing", "experts", "layers"):
        assert choice in done.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", f"learning_rate = {'1' * 400}", "learning_rate must be below 1.8e308"),
        ("a.toml", f"steps = {'1' * 400}", "steps must be at most"),
        ("a.toml", f"rank = 0x{'f' * 9999}", "rank must be at most"),
        ("a.yaml", f"alpha: {'1' * 400}", "alpha must be below 1.8e308"),
        ("a.json", '{"clip": NaN}', "clip must be 0 or more, and finite, got nan"),
        ("a.yaml", "epochs: .inf", "epochs must be positive and finite, got inf"),
        ("a.yaml", "rslora: yes", "rslora must be one of bool, got 'yes'"),
        ("a.toml", "out = 2026-11-30", "out must be one of str, got datetime.date"),
        ("a.yaml", "rank: 4\nrank: 4", "is not YAML: 'rank' is there twice"),
        ("a.yaml", "1: 4", "names must be texts"),
        ("a.json", '{"data": {"a": 1}}', "data must be a text or a list of texts"),
    ],
)
def test_a_file_with_a_value_that_does_not_fit_is_one_line(
    tmp_path: Path,
    name: str,
    content: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / name).write_text(content)
    words = ["jmoe", "finetune", "--config", str(tmp_path / name), "--model", "m", "--dry-run"]
    words += ["--data", "d"] if "data" not in content else []
    words += ["--out", "o"] if "out" not in content else []
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--out", "--model", "--data"])
def test_an_empty_name_is_refused(flag: str, data: Path, tmp_path: Path) -> None:
    words = {"--model": str(TINY), "--data": str(data), "--out": str(tmp_path / "out")} | {flag: ""}
    done = invoke(*(word for pair in words.items() for word in pair))
    assert isinstance(done.exception, ValueError)
    assert f"{flag[2:]} must be" in str(done.exception)
