"""`jmoe finetune`: LoRA on a gpt-oss checkpoint."""

import dataclasses
import inspect
import signal
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from rich.console import Console

from jmoe.device_memory import allow_whole_gpu
from jmoe.finetune.config import FinetuneConfig, choices_of, plain_types
from jmoe.finetune.connection import Connection, connected
from jmoe.finetune.options_file import read_file, write_example
from jmoe.finetune.stopping import exit_status

PROCESSES = "Several processes, each started by this command"
REQUIRED = "Required, here or in --config's file"


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """The function with a flag for each field of FinetuneConfig, None where it is not given, before its own."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is keyword]
    parameters = [
        inspect.Parameter(field.name, keyword, default=None, annotation=annotation_of(field))
        for field in dataclasses.fields(FinetuneConfig)
    ]
    function.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *own)}
    return function


def connection_of(
    options: FinetuneConfig, distributed: bool, coordinator: str | None, process: int | None, processes: int | None
) -> Connection | None:
    """How the processes of the run find each other; None for one process.

    Raises:
      ValueError: the flags do not go together, or there is no mesh.
    """
    connection = Connection(coordinator, process, processes)
    if not distributed:
        if connection != Connection():
            raise ValueError("--coordinator, --process and --processes are of several processes: add --distributed")
        return None
    if options.mesh is None:
        raise ValueError("several processes share a mesh of all their devices: add --mesh, as --mesh data=-1")
    return connection


def annotation_of(field: dataclasses.Field) -> Any:
    """The flag of a field, as typer reads it."""
    required = field.default is dataclasses.MISSING
    text = f"{field.metadata['help']} (required)" if required else field.metadata["help"]
    if not required and field.default is not None:
        text += f" (default: {field.default})"
    choices = choices_of(field.name)
    kind = Literal[choices] if choices else plain(get_type_hints(FinetuneConfig)[field.name])  # type: ignore[valid-type]
    flag = f"--{field.name.replace('_', '-')}"
    names = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
    option = typer.Option(
        *names,
        help=text,
        show_default=False,
        rich_help_panel=REQUIRED if required else None,
    )
    return Annotated[kind | None, option]


def plain(hint: Any) -> Any:
    """The type of a flag's value, which may be given again where a list is wanted."""
    (kind,) = (kind for kind in plain_types(hint) if kind is not types.NoneType)
    return list[str] if kind is tuple else kind


@with_flags
def finetune(
    *,
    config: Annotated[Path | None, typer.Option(help="TOML, YAML or JSON file of these options.")] = None,
    write_config: Annotated[
        bool, typer.Option("--write-config", help="Print such a file, of the options given and every other, and end.")
    ] = False,
    config_format: Annotated[Literal["toml", "yaml"], typer.Option(help="Of --write-config.")] = "toml",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Read the data, say what would be trained, how long and in what memory, and end."
        ),
    ] = False,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="This is one of several processes, which find each other under Slurm, MPI or Kubernetes, or by:",
            rich_help_panel=PROCESSES,
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(help="HOST:PORT at which process 0 listens.", rich_help_panel=PROCESSES),
    ] = None,
    process: Annotated[
        int | None, typer.Option(help="Number of this process, from 0.", rich_help_panel=PROCESSES)
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.", rich_help_panel=PROCESSES)] = None,
    **flags: Any,
) -> None:
    """Trains LoRA on a gpt-oss checkpoint's experts and attention, from rows of text to an adapter in PEFT's format.

    Options come from --config, a file of the same names, and from flags, which win. Run again with the same options, it
    goes on where it stopped. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end it after the step that is going on, with a
    checkpoint; the exit status is 128 and the signal's number.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    entries = ({} if config is None else read_file(config)) | given
    if write_config:
        typer.echo(write_example(entries, config_format), nl=False)
        return
    allow_whole_gpu()
    options = FinetuneConfig.create(entries)
    connection = connection_of(options, distributed, coordinator, process, processes)
    try:
        from jmoe.finetune.run import finetune as run
        from jmoe.finetune.run import rehearse

        with nullcontext() if connection is None else connected(connection):
            if dry_run:
                rehearse(options)
                return
            result = run(options, owns_process=True)
    except KeyboardInterrupt:  # before the first step: what is there is as it was
        Console(stderr=True).print("jmoe: interrupted", highlight=False)
        raise typer.Exit(exit_status(signal.SIGINT)) from None
    if result.signal is not None:
        raise typer.Exit(exit_status(result.signal))
