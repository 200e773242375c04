"""`jmoe eval`: tasks of the lm-evaluation-harness."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jmoe.commands.comma_lists import words
from jmoe.commands.model_options import LoraBLayoutOption, MeshOption, QuantizeOption, ReasoningEffortOption
from jmoe.commands.paths import input_path, output_path
from jmoe.device_memory import allow_whole_gpu

if TYPE_CHECKING:
    from jmoe.evaluate.metrics import Metric


def evaluate(
    model: Annotated[
        Path, typer.Option(help="A gpt-oss directory, or a repository on the Hub.", parser=input_path, metavar="<path>")
    ],
    tasks: Annotated[str, typer.Option(help="Tasks of the lm-evaluation-harness, with commas between.")],
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="A PEFT adapter's directory: runs without and with it, and compares.",
            parser=input_path,
            metavar="<path>",
        ),
    ] = None,
    lora_b_layout: LoraBLayoutOption = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A directory of task files of your own.", parser=input_path, metavar="<path>")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task; all if not given.", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; the task's own number if not given.", min=0)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences computed at once.", min=1)] = 8,
    apply_chat_template: Annotated[bool, typer.Option(help="Ask by the checkpoint's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before each question.")] = None,
    reasoning_effort: ReasoningEffortOption = None,
    max_gen_toks: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a reply, whatever a task says. If not given, the task's limit or 256; with the chat "
            "template at least 2048 for a model that thinks.",
            min=1,
        ),
    ] = None,
    gen_kwargs: Annotated[
        str,
        typer.Option(
            help="Generation options that win over a task's, as temperature=0.7,top_p=0.9 or a JSON object: until, "
            "do_sample, temperature, top_p, top_k, min_p, repetition_penalty, seed."
        ),
    ] = "",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of context and answer; longer contexts are cut from the left.", min=2)
    ] = None,
    quantize: QuantizeOption = None,
    mesh: MeshOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write results and samples here, in the harness's format.", parser=output_path, metavar="<path>"
        ),
    ] = None,
) -> None:
    """Evaluates a checkpoint, and an adapter beside it, on tasks of the lm-evaluation-harness.

    With the chat template, what is scored of a model that thinks is what it answers after it. The table says how many
    replies were cut, empty, or without an answer.
    """
    allow_whole_gpu()
    from jmoe.evaluate.generation_options import parse
    from jmoe.evaluate.run import EvaluateOptions
    from jmoe.evaluate.run import evaluate as run

    results = run(
        EvaluateOptions(
            model=model,
            adapter=adapter,
            lora_b_layout=lora_b_layout,
            tasks=words(tasks),
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            max_length=max_length,
            apply_chat_template=apply_chat_template,
            system=system,
            reasoning_effort=reasoning_effort,
            max_gen_toks=max_gen_toks,
            gen_kwargs=parse(gen_kwargs),
            quantize=quantize,
            mesh=mesh,
            out=out,
        )
    )
    console = Console(width=max(120, Console().width))
    console.print(table(results))
    if out is not None:
        console.print(f"wrote results under {out}", markup=False, highlight=False, soft_wrap=True)


def table(results: "list[list[Metric]]") -> Table:
    """The metrics of the model, or of it without and with an adapter and how far apart they are.

    The difference's standard error takes the two runs for independent; as both answer the same questions, it is rather
    smaller.
    """
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("task", "metric", "filter"):
        shown.add_column(column)
    for column in ("base", "adapter", "difference") if len(results) == 2 else ("base",):
        shown.add_column(column, justify="right", no_wrap=True)
    for metrics in zip(*results, strict=True):
        if metrics[0].is_count:
            counts = [int(metric.value) for metric in metrics]
            numbers = [*map(str, counts), *(f"{b - a:+d}" for a, b in itertools.pairwise(counts))]
            shown.add_row(metrics[0].task, metrics[0].name, metrics[0].filter, *numbers)
            continue
        numbers = [number(metric.value, metric.error) for metric in metrics]
        if len(metrics) == 2:
            base, adapted = metrics
            errors = (base.error, adapted.error)
            error = None if None in errors else math.hypot(*(each for each in errors if each is not None))
            numbers.append(number(adapted.value - base.value, error, sign="+"))
        shown.add_row(metrics[0].task, metrics[0].name, metrics[0].filter, *numbers)
    return shown


def number(value: float, error: float | None, sign: str = "-") -> str:
    """A value and its standard error."""
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
