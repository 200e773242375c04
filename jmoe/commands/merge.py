"""`jmoe merge`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jmoe.commands.model_options import LoraBLayoutOption
from jmoe.commands.paths import input_path, output_path

if TYPE_CHECKING:
    from jmoe.gpt_oss import MergeReport


def merge(
    model: Annotated[str, typer.Option(help="A gpt-oss directory, or a repository on the Hub.")],
    adapter: Annotated[Path, typer.Option(help="A PEFT adapter directory.", parser=input_path, metavar="<path>")],
    out: Annotated[
        Path, typer.Option(help="A new or empty directory for the merged model.", parser=output_path, metavar="<path>")
    ],
    format: Annotated[
        Literal["bfloat16", "mxfp4"],
        typer.Option(help="What experts are written in: dense bfloat16, or MXFP4 in OpenAI's own layout."),
    ] = "bfloat16",
    lora_b_layout: LoraBLayoutOption = None,
) -> None:
    """Adds an adapter to a model's weights and writes a model that transformers and others load.

    Prints for each layer and target how much of what the adapter changes is left in bfloat16 and in MXFP4.
    """
    from jmoe import gpt_oss

    report = gpt_oss.merge(model, adapter, out, format=format, lora_b_layout=lora_b_layout)
    typer.echo(str(report))
    written = "all in bfloat16" if format == "bfloat16" else "experts in MXFP4, everything else in bfloat16"
    typer.echo(f"wrote {out}: {written}")
    if warning := rounding_warning(report):
        typer.echo(warning, err=True)


def rounding_warning(report: "MergeReport") -> str | None:
    """What to say where rounding changes more than the adapter does, or None."""
    if not report.below_rounding:
        return None
    return (
        f"warning: in {len(report.below_rounding)} of {len(report.rows)} weights that the adapter changes, rounding "
        "changes more than the adapter does. --format bfloat16 keeps more of it, and the adapter beside its model all; "
        "jmoe eval says what a merged model is worth"
    )
