"""`jmoe merge`."""

from pathlib import Path
from typing import Annotated

import typer

from jmoe.commands.adapter_options import LoraBLayoutOption


def merge(
    model: Annotated[str, typer.Option(help="A gpt-oss directory, or a repository on the Hub.")],
    adapter: Annotated[Path, typer.Option(help="A PEFT adapter directory.")],
    out: Annotated[Path, typer.Option(help="A new or empty directory for the merged model.")],
    lora_b_layout: LoraBLayoutOption = None,
) -> None:
    """Adds an adapter to a model's weights and writes them in bfloat16, which transformers and others load.

    Prints for each layer and target how much of what the adapter changes is left, and how much would be in MXFP4.
    """
    from jmoe import gpt_oss

    typer.echo(str(gpt_oss.merge(model, adapter, out, lora_b_layout=lora_b_layout)))
    typer.echo(f"wrote {out}")
