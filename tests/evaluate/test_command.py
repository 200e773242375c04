"""`jmoe eval`: the harness itself on task files of each kind."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from jmoe import gpt_oss
from jmoe.cli import app
from jmoe.evaluate.harness import HarnessModel
from jmoe.evaluate.run import Options, evaluate
from jmoe.text import encode, load_tokenizer
from tests.evaluate.tasks import TEXTS, write_tasks

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


def test_a_checkpoint_and_its_adapter_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = write_tasks(tmp_path)
    arguments = ["eval", "--model", str(TINY), "--adapter", str(TINY / "adapter"), "--tasks", ",".join(tasks[::2])]
    arguments += ["--include-path", str(tmp_path), "--apply-chat-template", "--limit", "2", "--batch-size", "4"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for word in ("base", "adapter", "difference", "tiny_choice", "bits_per_byte"):
        assert word in done.output
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "out").rglob("results_*.json"))]
    assert [each["config"]["adapter"] for each in results] == [-1, 0]
    assert results[0]["chat_template"] == load_tokenizer(TINY).chat_template
    bits = [each["results"]["tiny_perplexity"]["bits_per_byte,none"] for each in results]
    assert bits[0] != bits[1]
    assert len(list((tmp_path / "out").rglob("samples_tiny_choice_*.jsonl"))) == 2


def test_the_harness_computes_from_what_the_model_answers(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    tokenizer = load_tokenizer(TINY)
    model = gpt_oss.load(TINY, dtype=jnp.float32, progress=False)
    harness = HarnessModel(model, tokenizer, batch_size=4)
    results = simple_evaluate(harness, tasks=tasks, task_manager=TaskManager(include_path=str(tmp_path)))
    assert results is not None
    total = 0.0
    for line in TEXTS:
        tokens = [0, *encode(tokenizer, line["text"])]
        (answer,) = harness._loglikelihood_tokens([(("", ""), tokens[:1], tokens[1:])], disable_tqdm=True)
        total += answer[0]
    size = sum(len(line["text"].encode()) for line in TEXTS)
    bits = results["results"]["tiny_perplexity"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / size / math.log(2), rel=1e-4)
    best = [
        max(range(len(sample["resps"])), key=lambda i, sample=sample: sample["resps"][i][0][0])
        for sample in results["samples"]["tiny_choice"]
    ]
    right = [choice == sample["doc"]["answer"] for choice, sample in
             zip(best, results["samples"]["tiny_choice"], strict=True)]  # fmt: skip
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    for sample in results["samples"]["tiny_generation"]:
        assert "License" not in sample["resps"][0][0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ["no_such_task"]}, ValueError, r"the harness knows no tasks \['no_such_task'\]"),
        ({"tasks": []}, ValueError, "tasks must be at least one, got none"),
        ({"tasks": ["gsm8k"], "include_path": Path("nowhere")}, FileNotFoundError, "nowhere does not exist"),
        ({"tasks": ["gsm8k"], "model": Path("nowhere")}, FileNotFoundError, r"tokenizer\.json does not exist"),
    ],
)
def test_what_is_not_there_is_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(Options(**({"model": TINY} | options)))
