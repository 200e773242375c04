"""`jmoe bench-serve`: a server's speed, measured from outside."""

import asyncio
import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jmoe.commands.comma_lists import words
from jmoe.commands.paths import output_path
from jmoe.commands.serve import KEY_VARIABLE
from jmoe.extras import require
from jmoe.files import naming


def bench_serve(
    url: Annotated[str, typer.Option(help="Of a server with OpenAI's /v1/completions.")] = "http://127.0.0.1:8000",
    models: Annotated[
        str,
        typer.Option(help="Models or adapters that requests ask for in turn, with commas between; the server's first."),
    ] = "",
    num_prompts: Annotated[int, typer.Option(help="Requests that are measured.", min=1)] = 256,
    num_warmups: Annotated[int, typer.Option(help="Requests before them.", min=0)] = 16,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 16,
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 215,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 199,
    sigma: Annotated[
        float,
        typer.Option(
            help="Above 0, lengths are lognormal, with this deviation of their logarithm and the lengths above as "
            "means; those of chats have some 1.2.",
            min=0,
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts and lengths.", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the figures, and what was asked, as JSON.", parser=output_path, metavar="<path>"),
    ] = None,
) -> None:
    """Asks a server many things at once, and says how fast its tokens came.

    Prompts are random tokens, answers have exactly their number of tokens; what is measured is what `vllm bench serve`
    measures. A key is taken from the variable JMOE_API_KEY. Exits with 1 if a request failed.
    """
    require("jmoe bench-serve", "serve", "aiohttp")
    from jmoe.bench.serve.client import ask_all
    from jmoe.bench.serve.figures import figures
    from jmoe.bench.serve.load import Load

    load = Load(
        url=url,
        models=tuple(words(models)),
        requests=num_prompts,
        warm_ups=num_warmups,
        concurrency=concurrency,
        input_len=input_len,
        output_len=output_len,
        sigma=sigma,
        seed=seed,
    )
    outcomes, seconds = asyncio.run(ask_all(load, os.environ.get(KEY_VARIABLE)))
    found = figures(outcomes, seconds)
    if out is not None:
        result = {"date": datetime.date.today().isoformat(), "load": dataclasses.asdict(load), **found}
        with naming(out):
            out.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(found))
    if failures := [outcome.error for outcome in outcomes if outcome.error is not None]:
        typer.echo(f"jmoe: {len(failures)} of {len(outcomes)} requests failed, the first: {failures[0]}", err=True)
        raise typer.Exit(1)


def table(found: dict[str, Any]) -> Table:
    """The figures for people."""
    shown = Table(box=box.SIMPLE_HEAD, title=f"{found['output_tokens_per_second']:.1f} output tokens/s")
    for column in ("milliseconds", "mean", "median", "p99"):
        shown.add_column(column, justify="left" if column == "milliseconds" else "right")
    for name, says in (
        ("ttft_ms", "to the first token"),
        ("tpot_ms", "a token after it"),
        ("itl_ms", "between chunks"),
        ("e2e_ms", "to the last token"),
    ):
        if found[name] is not None:
            shown.add_row(says, *(f"{found[name][column]:.2f}" for column in ("mean", "median", "p99")))
    return shown
