"""`jmoe serve`: an OpenAI-compatible server."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jmoe.commands.model_options import LoraBLayoutOption, MeshOption, QuantizeOption
from jmoe.commands.paths import input_path
from jmoe.device_memory import allow_whole_gpu
from jmoe.extras import require

if TYPE_CHECKING:
    from jmoe.serve.engine import EngineSettings

KEY_VARIABLE = "JMOE_API_KEY"

LOOPBACK = ("127.0.0.1", "::1", "localhost")

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def serve(
    model: Annotated[str, typer.Option(help="A gpt-oss directory, or a repository on the Hub.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="A PEFT adapter, which requests ask for by this name as model; may be given again."
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="What requests call the model, by default what --model says; may be given again."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is all, and then wants a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Ask for this key on all paths but /health; may be given again. Others of the machine can read a "
            f"command's options: the variable {KEY_VARIABLE} and --api-key-file keep it from them.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=input_path, help="Keys, one a line.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name that clients may call this server by, beside localhost, --host and IP addresses; * is any.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages of https://example.org, say, may ask this server; * is any."),
    ] = None,
    adapter_directory: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            parser=input_path,
            help="Adapters below it may be loaded and dropped while the server runs, by /v1/load_lora_adapter; may be "
            "given again.",
        ),
    ] = None,
    max_loras: Annotated[
        int | None,
        typer.Option(
            help="Adapters that have room at once; as many as --lora, or 4 more with --adapter-directory.", min=0
        ),
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="The largest rank of an adapter; that of those there are, or 16 if less.", min=1)
    ] = None,
    lora_b_layout: LoraBLayoutOption = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that are computed at once.", min=1, max=128)] = 64,
    prefill_tokens: Annotated[
        int,
        typer.Option(help="Tokens of prompts computed at once between two steps of sequences that run.", min=1),
    ] = 1024,
    cache_memory: Annotated[
        str,
        typer.Option(
            help="For keys and values: bytes, as 20G; or a fraction of the device's memory, as 0.9, which weights and "
            "adapters are part of."
        ),
    ] = "0.9",
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt and its answer; as many as the model and the memory allow.", min=2),
    ] = None,
    prefix_caching: Annotated[
        bool,
        typer.Option("--prefix-caching/--no-prefix-caching", help="Prompts that begin alike share what was computed."),
    ] = True,
    queue_limit: Annotated[
        int, typer.Option(help="Requests that may wait; more are told to come later.", min=1)
    ] = 1024,
    quantize: QuantizeOption = None,
    mesh: MeshOption = None,
) -> None:
    """Serves a model and adapters of it to OpenAI's clients, and a page at / that compares two of them.

    It listens at once, and /health says 200 when all is compiled. SIGTERM or Ctrl-C: it answers what it has, then ends;
    a second one ends it at once. Prompts and answers are not logged.
    """
    require("jmoe serve", "serve", "starlette", "uvicorn", "httptools", "pydantic", "prometheus_client")
    adapters = named_adapters(lora or [])
    keys = read_keys(api_key or [], api_key_file)
    settings = engine_settings(
        cache_memory=cache_memory,
        max_sequences=max_num_seqs,
        prefill_tokens=prefill_tokens,
        max_model_len=max_model_len,
        max_loras=places(max_loras, len(adapters), bool(adapter_directory)),
        prefix_caching=prefix_caching,
        queue_limit=queue_limit,
    )
    names = tuple(dict.fromkeys(served_model_name or [model]))
    if taken := sorted(set(names) & adapters.keys()):
        raise typer.BadParameter(f"--lora {taken[0]}=... has the name of the model: --served-model-name names that")
    directories = tuple(adapter_directory or ())
    if missing := [str(each) for each in directories if not each.is_dir()]:
        raise typer.BadParameter(f"--adapter-directory {missing[0]} is not a directory")
    allow_whole_gpu()
    from jmoe.gpt_oss.config import Config
    from jmoe.gpt_oss.layout import mesh_and_layout
    from jmoe.gpt_oss.load import local_directory
    from jmoe.serve.engine.placement import check_layout
    from jmoe.serve.load import Served, load_service
    from jmoe.serve.run import serve as run
    from jmoe.serve.settings import Settings

    directory = local_directory(model)
    devices, layout = mesh_and_layout(mesh, Config.load(directory))  # an error now, not once it listens
    if devices is not None and layout is not None:
        check_layout(devices, layout)
    served = Served(
        directory=directory,
        root=model,
        names=names,
        adapters=adapters,
        engine=settings,
        max_lora_rank=max_lora_rank,
        lora_b_layout=lora_b_layout,
        quantize=quantize,
        mesh=mesh,
    )
    http = Settings(
        host=host,
        port=port,
        api_keys=keys,
        allowed_hosts=tuple(allow_host or ()),
        allowed_origins=tuple(allow_origin or ()),
        adapter_directories=directories,
    )
    if not keys and host not in LOOPBACK:
        typer.echo(f"jmoe: all who reach {host} may ask, as there is no --api-key", err=True)
    status = run(http, lambda loop: load_service(served, loop), lambda line: typer.echo(f"jmoe: {line}", err=True))
    if status:
        raise typer.Exit(status)


def named_adapters(given: list[str]) -> dict[str, Path]:
    """The directories of NAME=DIR by their names."""
    found: dict[str, Path] = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not (equals and name.strip() and path.strip()):
            raise typer.BadParameter(f"--lora takes NAME=DIR, got {each!r}")
        if name in found:
            raise typer.BadParameter(f"--lora {name}=... is given twice")
        if not Path(path).is_dir():
            raise typer.BadParameter(f"--lora {name}: {path} is not a directory")
        found[name] = Path(path)
    return found


def read_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """The keys of options, of a file and of the environment.

    An empty one is an error: it comes of a variable that is not set, and would let everybody in.
    """
    keys = list(given)
    if file is not None:
        lines = [line.strip() for line in file.read_text().splitlines()]
        keys += [line for line in lines if line] or [""]
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE].strip())
    if any(not key.strip() for key in keys):
        raise typer.BadParameter(f"a key of --api-key, --api-key-file or {KEY_VARIABLE} is empty")
    return tuple(keys)


def places(max_loras: int | None, adapters: int, more_may_come: bool) -> int:
    """How many adapters have room."""
    if max_loras is None:
        return adapters + 4 * more_may_come
    if max_loras < adapters:
        raise typer.BadParameter(f"--max-loras must be at least {adapters}, as many as --lora, got {max_loras}")
    return max_loras


def engine_settings(*, cache_memory: str, **others: int | bool | None) -> "EngineSettings":
    """The engine's settings, their numbers checked."""
    from jmoe.serve.engine import EngineSettings

    try:
        return EngineSettings(**memory(cache_memory), **others)  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def memory(text: str) -> dict[str, int | float]:
    """--cache-memory as the engine's settings name it: bytes if it is 1 or more, else a fraction."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?(?:iB)?|)", text.strip(), re.IGNORECASE)
    if found is None or found[2].upper() not in UNITS:
        raise typer.BadParameter(f"--cache-memory takes bytes, as 20G, or a fraction, as 0.9, got {text!r}")
    value = float(found[1])
    if not found[2] and value < 1:
        return {"cache_fraction": value}
    return {"cache_bytes": int(value * UNITS[found[2].upper()])}
