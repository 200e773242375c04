"""`jmoe finetune`: LoRA on a gpt-oss checkpoint."""

import dataclasses
import inspect
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from jmoe.device_memory import allow_whole_gpu
from jmoe.finetune.config import FinetuneConfig, plain_types, read_file
from jmoe.finetune.stopping import exit_status


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """The function with a flag for each field of FinetuneConfig, None where it is not given."""
    hints = get_type_hints(FinetuneConfig)
    keyword = inspect.Parameter.KEYWORD_ONLY
    config = typer.Option(help="TOML or JSON file of these options.")
    parameters = [inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, config])]
    for field in dataclasses.fields(FinetuneConfig):
        text = field.metadata["help"]
        if field.default not in (dataclasses.MISSING, None):
            text += f" (default: {field.default})"
        kind: Any = plain(hints[field.name])
        flag = f"--{field.name.replace('_', '-')}"
        names = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
        annotation: Any = Annotated[kind | None, typer.Option(*names, help=text, show_default=False)]
        parameters.append(inspect.Parameter(field.name, keyword, default=None, annotation=annotation))
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def plain(hint: Any) -> type:
    """The class of a flag's value."""
    kinds = [kind for kind in plain_types(hint) if kind is not type(None)]
    return str if isinstance(kinds[0], str) else kinds[0]


@with_flags
def finetune(config: Path | None, **flags: Any) -> None:
    """Trains LoRA on a gpt-oss checkpoint's experts and attention, from JSONL to an adapter in PEFT's format.

    Options come from --config, a TOML or JSON file of the same names, and from flags, which win. Run again with the
    same options, it goes on where it stopped. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end it after the step that is going
    on, with a checkpoint; the exit status is 128 and the signal's number.
    """
    allow_whole_gpu()
    given = {name: value for name, value in flags.items() if value is not None}
    entries = ({} if config is None else read_file(config)) | given
    try:
        from jmoe.finetune.run import finetune as run

        result = run(FinetuneConfig.create(entries), owns_process=True)
    except KeyboardInterrupt:  # before the first step: what is there is as it was
        Console(stderr=True).print("jmoe: interrupted", highlight=False)
        raise typer.Exit(exit_status(signal.SIGINT)) from None
    if result.signal is not None:
        raise typer.Exit(exit_status(result.signal))
