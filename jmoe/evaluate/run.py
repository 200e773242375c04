"""Tasks of the lm-evaluation-harness on a checkpoint, without and with an adapter, and the two side by side."""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jmoe import gpt_oss
from jmoe.adapters.settings import LoraBLayout
from jmoe.evaluate.generation_options import LIMITS, check, limit, overrides
from jmoe.evaluate.harness import HarnessModel
from jmoe.evaluate.metrics import Metric, counts_of, metrics_of
from jmoe.evaluate.tasks import NO_TASK, TaskError, broken_files, load_tasks, reason, tasks_of, title
from jmoe.gpt_oss.layout import mesh_and_layout
from jmoe.gpt_oss.load import Quantize, local_directory
from jmoe.text import ReasoningEffort, load_tokenizer, without_marks

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import hash_string
except ImportError as missing:
    raise ImportError('evaluation needs the lm-evaluation-harness: pip install "jmoe[eval]"') from missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
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
      system: a system message before each question, or None.
      reasoning_effort: what the chat template is told of it, or None.
      max_gen_toks: tokens of a reply, whatever a task says. None: the task's own limit, else 256; by a chat template
        2048 where the task has none, or less and the model thinks in channels.
      gen_kwargs: generation options that win over each task's own, as jmoe.evaluate.generation_options knows them.
      quantize: as in jmoe.gpt_oss.load.
      mesh: axes that the devices are split in, as data=2,expert=4; None: one device.
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
    system: str | None = None
    reasoning_effort: ReasoningEffort | None = None
    max_gen_toks: int | None = None
    gen_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quantize: Quantize | None = None
    mesh: str | None = None
    out: Path | None = None


def evaluate(options: EvaluateOptions) -> list[list[Metric]]:
    """The metrics of the checkpoint, and with an adapter those of the checkpoint with it.

    What a user should know beside them is printed on stderr.

    Raises:
      FileNotFoundError: the checkpoint, the adapter, a file of theirs or include_path does not exist.
      ValueError: a task that the harness does not know or that fails, an option that does not fit, or a file.
    """
    if not options.tasks:
        raise ValueError("tasks must be at least one, got none")
    check(options.gen_kwargs)
    wanted = overrides(options.gen_kwargs, options.max_gen_toks)
    if options.max_length is not None and wanted.get("max_gen_toks", 0) >= options.max_length:
        raise ValueError(f"max_gen_toks must be below max_length {options.max_length}, got {wanted['max_gen_toks']}")
    directory = local_directory(options.model)
    devices, layout = mesh_and_layout(options.mesh, gpt_oss.Config.load(directory))
    tokenizer = load_tokenizer(directory)
    check_template(tokenizer, options)
    manager = task_manager(options)
    tasks = load_tasks(manager, options.tasks)
    set_generation(tasks_of(tasks), wanted)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()  # an error now, not after hours
    model = gpt_oss.load(
        directory,
        mesh=devices,
        layout=layout,
        adapter=options.adapter,
        lora_b_layout=options.lora_b_layout,
        quantize=options.quantize,
    )
    variables = {} if options.reasoning_effort is None else {"reasoning_effort": options.reasoning_effort}
    found = []
    for adapter in [-1] if options.adapter is None else [-1, 0]:
        view = HarnessModel(
            model,
            tokenizer,
            adapter=adapter,
            batch_size=options.batch_size,
            max_length=options.max_length,
            template_variables=variables,
        )
        if options.apply_chat_template and "max_gen_toks" not in wanted:
            leave_room_to_think(tasks_of(tasks), view)
        found.append(metrics_of(run(view, manager, tasks, options, wanted)))
    for task in sorted(map(str, view.scored_in_headers)):
        notice(f"task {task} scores its answers where a reply names its channel: docs/evaluate.md says what to do")
    return found


def notice(text: str) -> None:
    """Says a line on stderr."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def check_template(tokenizer: Any, options: EvaluateOptions) -> None:
    """Raises ValueError where the options ask for what the checkpoint's chat template does not have."""
    if not options.apply_chat_template:
        if options.reasoning_effort is not None:
            raise ValueError("reasoning_effort needs apply_chat_template: the chat template says it to the model")
    elif tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template, which apply_chat_template needs")
    elif options.reasoning_effort is not None and "reasoning_effort" not in str(tokenizer.chat_template):
        raise ValueError(f"the chat template of {tokenizer.name_or_path} must know reasoning_effort, and does not")


def task_manager(options: EvaluateOptions) -> TaskManager:
    """The harness's list of tasks, without its own where all are in the included directory: they take long to list.

    Raises:
      FileNotFoundError: include_path does not exist.
      ValueError: a task is nowhere.
    """
    folder = options.include_path
    problems: dict[Path, str] = {}
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"the directory of tasks {folder} does not exist")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(options.tasks) <= set(manager.all_tasks):
            return manager
        problems = broken_files(folder)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in options.tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"the harness knows no tasks {unknown}; --include-path names a directory of more"
            + "".join(f"; {file}: {problem}" for file, problem in problems.items())
        )
    for file, problem in problems.items():
        if not problem.startswith(NO_TASK):
            notice(f"{file} is left out: {problem}")
    return manager


def set_generation(tasks: Sequence[Task], wanted: Mapping[str, Any]) -> None:
    """Lets the options win over those of each task that generates text.

    Raises:
      TaskError: generation does not know an option of a task's.
    """
    generating = [task for task in tasks if task.get_config("output_type") == "generate_until"]
    for task in generating:
        own = task.get_config("generation_kwargs")
        if not isinstance(own, dict):
            raise TaskError(f"{title(task)}: generation_kwargs must be names and values, got {own!r}")
        if "max_gen_toks" in wanted:
            for name in LIMITS:
                own.pop(name, None)
        own.update(wanted)
        try:
            check(own)
        except ValueError as error:
            raise TaskError(f"{title(task)}: {error}") from error
    if wanted and not generating:
        notice(f"no task generates text: {', '.join(wanted)} have no effect")


def leave_room_to_think(tasks: Sequence[Task], model: HarnessModel) -> None:
    """Raises tasks' limits of tokens, which are an answer's, to what a reply to a conversation needs."""
    least = model.default_limit(conversation=True)
    for task in tasks:
        if task.get_config("output_type") != "generate_until":
            continue
        options = task.get_config("generation_kwargs")
        own = limit(options)
        if own is None:
            options["max_gen_toks"] = least
        elif own < least and model.has_channels:
            for name in LIMITS:
                options.pop(name, None)
            options["max_gen_toks"] = least
            notice(
                f"task {task.task_name} allows {own} tokens for an answer: {least} are allowed, as the model thinks "
                "before it; --max-gen-toks decides otherwise"
            )


def run(
    model: HarnessModel,
    manager: TaskManager,
    tasks: Sequence[Task | Group],
    options: EvaluateOptions,
    wanted: Mapping[str, Any],
) -> dict[str, Any]:
    """The harness's results for one model, and counts beside them, written to options.out if there is one."""
    tracker = EvaluationTracker(output_path=None if options.out is None else str(options.out))
    # By the harness's own names for them: the tracker calls the results' directory after one.
    sources = {"pretrained": str(options.model)}
    if model.adapter == 0:
        sources["peft"] = str(options.adapter)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would fork, which a process with JAX may not
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the harness's own notices
            results = simple_evaluate(
                model,
                model_args=sources,
                tasks=list(tasks),
                num_fewshot=options.num_fewshot,
                batch_size=options.batch_size,
                limit=options.limit,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.apply_chat_template,
                system_instruction=options.system,
                evaluation_tracker=tracker,
                task_manager=manager,
                log_samples=options.out is not None,
            )
    except TaskError:
        raise
    except Exception as error:  # whatever a task's metric raises over all documents
        if is_of_model(error):
            raise
        raise TaskError(f"one of the tasks {', '.join(options.tasks)} fails: {reason(error)}") from error
    assert results is not None  # None is for other processes than the first
    documents = {task: number["effective"] for task, number in results["n-samples"].items()}
    results["counts"] = {
        task: {name: count._asdict() for name, count in counts.items()}
        for task, counts in counts_of(model, documents).items()
    }
    results["config"]["gen_kwargs"] = dict(wanted) or None
    samples = results.pop("samples", None)
    if samples is not None:
        assert options.out is not None
        complete_samples(samples, model)
        save(tracker, results, samples, options.out)
    return results


def is_of_model(error: Exception) -> bool:
    """Whether the error comes from the model's answers, and not from the harness around them."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == HarnessModel.__module__ for frame, _ in frames)


def complete_samples(samples: Mapping[str, list[dict[str, Any]]], model: HarnessModel) -> None:
    """Shows in samples the contexts as they are without marks, and beside the answers the whole replies."""
    replies: dict[tuple[str | None, int | None], list[dict[str, Any]]] = {}
    for request, reply in model.replies:
        replies.setdefault((request.task_name, request.doc_id), []).append(reply._asdict())
    for task, listed in samples.items():
        for sample in listed:
            marked = sample["arguments"]
            sample["arguments"] = [
                tuple(without_marks(each) if isinstance(each, str) else each for each in arguments)
                for arguments in marked
            ]
            if sample["arguments"] != marked:
                sample["prompt_hash"] = hash_string(sample["arguments"][0][0])
            if own := replies.get((task, sample["doc_id"])):
                sample["replies"] = own


def save(tracker: EvaluationTracker, results: dict[str, Any], samples: Mapping[str, Any], out: Path) -> None:
    """Writes results and samples.

    Raises:
      OSError: the tracker could not write them all, which it logs without an error.
    """
    before = set(out.rglob("*.json*"))
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    whole = [file for file in out.rglob("*.json*") if file not in before and is_whole(file)]
    if len(whole) < 1 + len(results["configs"]):
        raise OSError(f"results could not be written under {out}: whole are {[str(file) for file in whole]}")


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
