"""The lm-evaluation-harness's own models of servers, beside jmoe's model in this process."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import lm_eval
from lm_eval.tasks import TaskManager

from jmoe import gpt_oss
from jmoe.evaluate.harness import HarnessModel
from jmoe.text import load_tokenizer
from tests.serve.serving import TINY, Serving

PATHS = {"local-completions": "v1/completions", "local-chat-completions": "v1/chat/completions"}


class Found(NamedTuple):
    """What the harness found.

    metrics: of each task, by name and filter, their standard errors left out.
    answers: of each task, the model's answers to each document: texts, or log-probabilities and whether greedy.
    """

    metrics: dict[str, dict[str, float]]
    answers: dict[str, list[Any]]


def results(model: Any, folder: Path, tasks: list[str], **options: Any) -> Found:
    """Runs the tasks of a folder."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    metrics = {
        task: {name: value for name, value in metrics.items() if "," in name and "stderr" not in name}
        for task, metrics in found["results"].items()
    }
    answers = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda each: (each["filter"], each["doc_id"]))]
        for task, samples in found["samples"].items()
    }
    return Found(metrics, answers)


def by_server(server: Serving, kind: str, model: str, folder: Path, tasks: list[str], **options: Any) -> Found:
    """Asked of the server, as docs/serve.md says."""
    arguments = {
        "model": model,
        "base_url": f"{server.url}/{PATHS[kind]}",
        "tokenizer_backend": None if kind == "local-chat-completions" else "huggingface",
        "tokenizer": str(TINY),
        "max_length": 512,
        "num_concurrent": 16,
        "max_retries": 1,
        "eos_string": "<|endoftext|>",
    }
    return results(kind, folder, tasks, model_args=arguments, **options)


def in_process(adapter: Path | None, folder: Path, tasks: list[str], **options: Any) -> Found:
    """As `jmoe eval` asks, in float32."""
    model = gpt_oss.load(TINY, dtype=jnp.float32, adapter=adapter, progress=False)
    view = HarnessModel(model, load_tokenizer(TINY), batch_size=4, max_length=511)
    return results(view, folder, tasks, **options)


GSM8K = """\
include: {original}
task: local_gsm8k
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    train: {folder}/gsm8k_train.jsonl
    test: {folder}/gsm8k_test.jsonl
"""


def write_gsm8k(folder: Path) -> str:
    """The harness's own file of gsm8k, on local rows of its form; returns the task's name."""
    original = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    rows = [
        {"question": f"Ann has {i} and finds {i + 1}.", "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}"}
        for i in range(1, 29)
    ]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (folder / f"gsm8k_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "local_gsm8k.yaml").write_text(GSM8K.format(original=original, folder=folder))
    return "local_gsm8k"
