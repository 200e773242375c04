"""`jmoe bench`: one layer beside its peers."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jmoe.bench.record import birth_certificate, write
from jmoe.bench.source_hash import LAYER
from jmoe.commands.comma_lists import numbers, words
from jmoe.commands.paths import output_path

console = Console(width=max(150, Console().width))


def bench(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, with commas between.")] = "",
    experts: Annotated[str, typer.Option(help="Numbers of experts.")] = "",
    ranks: Annotated[str, typer.Option(help="LoRA ranks; 0 is without LoRA.")] = "",
    implementations: Annotated[str, typer.Option(help="Only these, by the names in the results.")] = "",
    skip: Annotated[str, typer.Option(help="All but these.")] = "",
    gradient: Annotated[bool, typer.Option("--gradient", help="Forward and backward pass, and memory.")] = False,
    marlin_library: Annotated[
        Path | None, typer.Option(help="vLLM's compiled library with Marlin, if vLLM is not installed; .xz or not.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the figures as JSON, with date, commit, GPU and versions, after each row; a file of the same "
            "commit, GPU and versions keeps its other figures.",
            parser=output_path,
            metavar="<path>",
        ),
    ] = None,
) -> None:
    """Times one layer of gpt-oss's size beside every peer that is installed: microseconds a call.

    On a machine without a GPU it times backend "xla" at a small size. Exits with 1 if jmoe itself fails.
    """
    from jmoe.bench import report, results
    from jmoe.bench.case import Matrix, default_matrix
    from jmoe.bench.gradient import IMPLEMENTATIONS as WITH_GRADIENT
    from jmoe.bench.gradient import gradient_matrix
    from jmoe.bench.run import implementations as forward_alone
    from jmoe.bench.run import run, select

    default = gradient_matrix() if gradient else default_matrix()
    matrix = Matrix(
        default.size,
        numbers("--tokens", tokens, least=1) or default.tokens,
        numbers("--experts", experts, least=default.size.top_k) or default.experts,
        numbers("--ranks", ranks, least=0) or default.ranks,
    )
    everyone = WITH_GRADIENT if gradient else forward_alone(marlin_library)
    chosen = select(everyone, words(implementations), words(skip))
    measured_passes = {"passes": "forward and backward" if gradient else "forward"}
    figures = results.start(birth_certificate(LAYER) | measured_passes, matrix.size, out)
    failed = False
    for measured in run(matrix, chosen):
        results.add(figures, *measured)
        if out is not None:
            write(out, figures)
        console.print(report.line(figures["rows"], measured), markup=False, highlight=False, soft_wrap=True)
        failed |= report.jmoe_failed(measured)
    console.print(report.table(figures["rows"]))
    if failed:
        raise typer.Exit(1)
