"""`jmoe tune`: the best launch parameters of this machine's GPU."""

from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console

from jmoe.bench.record import birth_certificate, write
from jmoe.bench.source_hash import LAYER
from jmoe.commands.comma_lists import numbers
from jmoe.commands.paths import output_path

console = Console(width=max(150, Console().width))


def tune(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to measure at, with commas between.")] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the table here instead of to the user's cache.", parser=output_path, metavar="<path>"),
    ] = None,
) -> None:
    """Measures which launch parameters are best on this machine's GPU, and writes the table that jmoe then uses here.

    It takes some minutes. jmoe.moe and jmoe.interop.moe read the table from the user's cache; a jmoe.Target, which may
    be of another GPU, does not.
    """
    from jmoe.bench import tune as measuring

    if jax.default_backend() != "gpu":
        raise typer.BadParameter("jmoe tune measures on a GPU, and JAX sees none")
    chosen = []
    for choice in measuring.tune(numbers("--tokens", tokens, least=1) or measuring.TOKENS):
        console.print(str(choice), markup=False, highlight=False, soft_wrap=True)
        chosen.append(choice)
    from jmoe.triton_src.tile_tables import as_json, user_table

    file = user_table(jax.devices()[0].device_kind) if out is None else out
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, {**birth_certificate(LAYER), **as_json(measuring.tables_of(chosen))})
    console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
