"""`jmoe eval`: tasks of the lm-evaluation-harness."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jmoe.commands.adapter_options import LoraBLayoutOption
from jmoe.device_memory import allow_whole_gpu

if TYPE_CHECKING:
    from jmoe.evaluate.run import Metric


def evaluate(
    model: Annotated[Path, typer.Option(help="A gpt-oss directory, or a repository on the Hub.")],
    tasks: Annotated[str, typer.Option(help="Tasks of the lm-evaluation-harness, with commas between.")],
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter's directory: runs without and with it, and compares.")
    ] = None,
    lora_b_layout: LoraBLayoutOption = None,
    include_path: Annotated[Path | None, typer.Option(help="A directory of task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task; all if not given.", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; the task's own number if not given.", min=0)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences computed at once.", min=1)] = 8,
    apply_chat_template: Annotated[bool, typer.Option(help="Ask by the checkpoint's chat template.")] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of context and answer; longer contexts are cut from the left.", min=2)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write results and samples here, in the harness's format.")] = None,
) -> None:
    """Evaluates a checkpoint, and an adapter beside it, on tasks of the lm-evaluation-harness."""
    allow_whole_gpu()
    from jmoe.evaluate.run import Options
    from jmoe.evaluate.run import evaluate as run

    results = run(
        Options(
            model=model,
            adapter=adapter,
            lora_b_layout=lora_b_layout,
            tasks=[task.strip() for task in tasks.split(",") if task.strip()],
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            max_length=max_length,
            apply_chat_template=apply_chat_template,
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
