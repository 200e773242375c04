"""`jmoe eval`: the harness itself on task files of each kind."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from jmoe.cli import app
from jmoe.evaluate.run import EvaluateOptions, evaluate, is_whole
from jmoe.text import load_tokenizer
from tests.evaluate.tasks import write_tasks

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


@pytest.fixture(autouse=True)
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the harness's own tasks, whose thousands of files take long to list."""
    monkeypatch.setattr("jmoe.evaluate.run.TaskManager", functools.partial(TaskManager, include_defaults=False))


@pytest.mark.slow
def test_a_checkpoint_and_its_adapter_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    arguments = ["eval", "--model", str(TINY), "--adapter", str(TINY / "adapter"), "--tasks", "tiny_choice"]
    arguments += ["--include-path", str(tmp_path), "--apply-chat-template", "--limit", "2", "--batch-size", "4"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for word in ("base", "adapter", "difference", "tiny_choice", "acc"):
        assert word in done.output
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "out").rglob("results_*.json"))]
    assert [each["config"]["adapter"] for each in results] == [-1, 0]
    assert results[0]["chat_template"] == load_tokenizer(TINY).chat_template
    samples = [file.read_text() for file in sorted((tmp_path / "out").rglob("samples_tiny_choice_*.jsonl"))]
    first, second = (json.loads(text.splitlines()[0])["resps"] for text in samples)
    assert first != second


def test_results_that_could_not_be_written_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    monkeypatch.setattr("jmoe.evaluate.run.EvaluationTracker.save_results_samples", lambda *_, **__: None)
    options = EvaluateOptions(model=TINY, tasks=["tiny_choice"], include_path=tmp_path, limit=2, out=tmp_path / "out")
    with pytest.raises(OSError, match=r"results could not be written under .*out: whole are "):
        evaluate(options)


def test_standard_errors_are_resampled_without_a_fork_and_standard_output_is_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("a process with JAX forks"))
    write_tasks(tmp_path)
    task = tmp_path / "tiny_perplexity.yaml"
    text = task.read_text().replace("loglikelihood_rolling", "loglikelihood").replace("word_", "")
    task.write_text(text.replace("  - metric: bits_per_byte\n", ""))
    ((perplexity,),) = evaluate(EvaluateOptions(model=TINY, tasks=["tiny_perplexity"], include_path=tmp_path))
    assert perplexity.name == "perplexity"
    assert perplexity.error
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "text", "whole"),
    [
        ("a.json", "{}", True),
        ("a.json", '{"x": ', False),
        ("a.jsonl", '{"x": "\u2028"}\n{}\n', True),
        ("a.jsonl", '{}\n{"x', False),
        ("a.jsonl", "", False),
    ],
)
def test_a_file_that_was_cut_is_not_whole(name: str, text: str, whole: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert is_whole(tmp_path / name) == whole


def test_the_examples_tasks_score_answers_with_and_without_a_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(TINY.parents[1])
    options = EvaluateOptions(
        model=TINY, tasks=["even", "even_in_channels"], include_path=TINY.parent / "even", limit=2
    )
    metrics = evaluate(dataclasses.replace(options, apply_chat_template=True))[0]
    assert [metric.task for metric in metrics if metric.name == "acc"] == ["even", "even_in_channels"]
    plain, channels = (TINY.parent / "even" / f"{metric.task}.yaml" for metric in metrics)
    assert "<|channel|>final<|message|>yes" in channels.read_text()
    assert "<|channel|>" not in plain.read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ["no_such_task"]}, ValueError, r"the harness knows no tasks \['no_such_task'\]"),
        ({"tasks": []}, ValueError, "tasks must be at least one, got none"),
        ({"tasks": ["gsm8k"], "include_path": Path("nowhere")}, FileNotFoundError, "nowhere does not exist"),
        (
            {"tasks": ["gsm8k"], "model": Path("nowhere")},
            FileNotFoundError,
            "directory nowhere does not exist",
        ),
    ],
)
def test_what_is_not_there_is_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(EvaluateOptions(**({"model": TINY} | options)))
