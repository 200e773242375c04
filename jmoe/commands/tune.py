"""`jmoe tune`: the best launch parameters of this machine's GPU."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import typer
from rich.console import Console

from jmoe.bench.record import birth_certificate, write
from jmoe.bench.source_hash import LAYER
from jmoe.commands.comma_lists import numbers, words
from jmoe.commands.paths import output_path

if TYPE_CHECKING:
    from jmoe.triton_src.tiles import LaunchTable

console = Console(width=max(150, Console().width))


def size(text: str) -> Any:
    """The option of a size of the model."""
    return typer.Option(help=text, min=1)


def tune(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to measure at, with commas between.")] = "",
    parts: Annotated[
        str,
        typer.Option(
            help="Which of forward, lora, gradient, decode and prefill to tune, with commas between; all if empty."
        ),
    ] = "",
    experts: Annotated[int, size("Experts of a layer.")] = 32,
    hidden: Annotated[int, size("Width of the model, a multiple of 32.")] = 2880,
    intermediate: Annotated[int, size("Width of an expert, a multiple of 32.")] = 2880,
    top_k: Annotated[int, size("Experts of a token.")] = 4,
    rank: Annotated[int, size("Of LoRA.")] = 16,
    context: Annotated[int, size("Tokens in the cache that attention reads.")] = 4096,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the table here instead of to the user's cache.", parser=output_path, metavar="<path>"),
    ] = None,
) -> None:
    """Measures which launch parameters are best on this machine's GPU, and writes the table that jmoe then uses here.

    It takes an hour or less, by numbers of tokens and parts; what is not tuned stays as it was. Sizes are gpt-oss-20b's
    unless given. jmoe.moe and jmoe.interop.moe read the table from the user's cache; a jmoe.Target, which may be of
    another GPU, does not.
    """
    from jmoe.bench import tune as measuring
    from jmoe.bench.tuned_work import Sizes

    chosen_parts = words(parts) or measuring.PARTS
    for part in chosen_parts:
        if part not in measuring.PARTS:
            raise typer.BadParameter(f"--parts takes {', '.join(measuring.PARTS)}, got {part!r}")
    counts = numbers("--tokens", tokens, least=1) or measuring.TOKENS
    sizes = Sizes(experts=experts, hidden=hidden, intermediate=intermediate, top_k=top_k, rank=rank, context=context)
    if jax.default_backend() != "gpu":
        raise typer.BadParameter("jmoe tune measures on a GPU, and JAX sees none")
    from jmoe.ops.launch.local_gpu import local_gpu

    capability, device = local_gpu()
    table, before = tables_before(capability, device)
    chosen = []
    prepare = functools.partial(measuring.prepare_on_gpu, capability)
    for choice in measuring.tune(counts, sizes, chosen_parts, table, prepare):
        console.print(str(choice), markup=False, highlight=False, soft_wrap=True)
        chosen.append(choice)
    from jmoe.triton_src.tile_tables import as_json, user_file

    file = user_file(device) if out is None else out
    file.parent.mkdir(parents=True, exist_ok=True)
    sections = before | measuring.sections_of(chosen, table)
    certificate = birth_certificate(LAYER) | {"capability": capability, "sizes": vars(sizes)}
    write(file, {**certificate, **as_json(sections)})
    console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


def tables_before(capability: int, device: str) -> tuple["LaunchTable", dict[str, tuple[Any, ...]]]:
    """The table to begin with, and the sections of it that the user has measured; none of a file that is invalid."""
    from jmoe.triton_src.tile_tables import own_table, read_user_table

    try:
        before = read_user_table(device) or {}
    except ValueError as error:
        console.print(f"{error}: it will be replaced", markup=False, highlight=False, soft_wrap=True)
        before = {}
    return own_table(capability, device).over(before), before
