"""Tasks of the lm-evaluation-harness on a checkpoint, without and with an adapter, and the two side by side."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jmoe import gpt_oss
from jmoe.adapters.settings import LoraBLayout
from jmoe.evaluate.harness import HarnessModel
from jmoe.gpt_oss.config import stop_tokens
from jmoe.gpt_oss.load import local_directory
from jmoe.text import load_tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
except ImportError as missing:
    raise ImportError('evaluation needs the lm-evaluation-harness: pip install "jmoe[eval]"') from missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to evaluate.

    Attributes:
      model: a gpt-oss directory, or a repository on the Hugging Face Hub.
      adapter: a PEFT adapter's directory, or None.
      lora_b_layout: of an adapter that does not say it itself; see jmoe.gpt_oss.load_adapter.
      tasks: names that the harness knows.
      include_path: a directory of more task files, or None.
      limit: documents of each task; None: all.
      num_fewshot: examples before each question; None: the task's own number.
      batch_size, max_length: as in HarnessModel.
      apply_chat_template: ask by the checkpoint's chat template.
      out: a directory for results and samples in the harness's format, or None.
    """

    model: Path | str
    adapter: Path | None = None
    lora_b_layout: LoraBLayout | None = None
    tasks: Sequence[str]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    apply_chat_template: bool = False
    out: Path | None = None


class Metric(NamedTuple):
    """One number of a task, and its standard error if the harness estimates one; filter: of the task's answers."""

    task: str
    name: str
    filter: str
    value: float
    error: float | None


def evaluate(options: Options) -> list[list[Metric]]:
    """The metrics of the checkpoint, and with an adapter those of the checkpoint with it.

    Raises:
      FileNotFoundError: the checkpoint, the adapter, a file of theirs or include_path does not exist.
      ValueError: a task that the harness does not know, or a file that does not fit.
    """
    if not options.tasks:
        raise ValueError("tasks must be at least one, got none")
    directory = local_directory(options.model)
    tokenizer = load_tokenizer(directory)
    manager = task_manager(options)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()  # an error now, not after hours
    model = gpt_oss.load(directory, adapter=options.adapter, lora_b_layout=options.lora_b_layout)
    ends = stop_tokens(directory, model.config)
    return [
        metrics_of(
            run(
                HarnessModel(
                    model,
                    tokenizer,
                    adapter=adapter,
                    batch_size=options.batch_size,
                    max_length=options.max_length,
                    stop_tokens=ends,
                ),
                manager,
                options,
            )
        )
        for adapter in ([-1] if options.adapter is None else [-1, 0])
    ]


def include_path(options: Options) -> str | None:
    """The directory of more task files.

    Raises:
      FileNotFoundError: there is none.
    """
    if options.include_path is None:
        return None
    if not options.include_path.is_dir():
        raise FileNotFoundError(f"the directory of tasks {options.include_path} does not exist")
    return str(options.include_path)


def task_manager(options: Options) -> TaskManager:
    """What knows the tasks. The harness's own are listed only if include_path does not have them all: it takes long.

    Raises:
      FileNotFoundError: include_path does not exist.
      ValueError: a task is nowhere.
    """
    folder = include_path(options)
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(options.tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in options.tasks if task not in manager.all_tasks]:
        raise ValueError(f"the harness knows no tasks {unknown}; --include-path names a directory of more")
    return manager


def run(model: HarnessModel, manager: TaskManager, options: Options) -> dict[str, Any]:
    """The harness's results for one model, written to options.out if there is one."""
    tracker = EvaluationTracker(output_path=None if options.out is None else str(options.out))
    # By the harness's own names for them: the tracker calls the results' directory after one.
    sources = {"pretrained": str(options.model)}
    if model.adapter == 0:
        sources["peft"] = str(options.adapter)
    results = simple_evaluate(
        model,
        model_args=sources,
        tasks=list(options.tasks),
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.apply_chat_template,
        evaluation_tracker=tracker,
        task_manager=manager,
        log_samples=options.out is not None,
    )
    assert results is not None  # None is for other processes than the first
    samples = results.pop("samples", None)
    if samples is not None:
        assert options.out is not None
        before = set(options.out.rglob("*.json*"))
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        # The tracker logs what it could not write, and goes on.
        whole = [file for file in options.out.rglob("*.json*") if file not in before and is_whole(file)]
        if len(whole) < 1 + len(results["configs"]):
            raise OSError(
                f"results could not be written under {options.out}: whole are {[str(file) for file in whole]}"
            )
    return results


def is_whole(file: Path) -> bool:
    """Whether all of a JSON or JSONL file is there."""
    text = file.read_text(encoding="utf-8")
    values = text.removesuffix("\n").split("\n") if file.suffix == ".jsonl" else [text]
    try:
        for value in values:
            json.loads(value)
    except ValueError:
        return False
    return True


def metrics_of(results: Mapping[str, Any]) -> list[Metric]:
    """The numbers in the harness's results, which are keyed "name,filter" and "name_stderr,filter"."""

    def found() -> Iterator[Metric]:
        for task, values in results["results"].items():
            for key, value in values.items():
                name, comma, own_filter = key.partition(",")
                if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = values.get(f"{name}_stderr,{own_filter}")
                error = float(error) if isinstance(error, int | float) else None
                yield Metric(task, name, own_filter, float(value), error)

    return list(found())
