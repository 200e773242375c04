"""`jmoe convert-adapter`."""

from pathlib import Path
from typing import Annotated

import typer

from jmoe.commands.model_options import LoraBLayoutOption
from jmoe.commands.paths import input_path, output_path


def convert_adapter(
    model: Annotated[Path, typer.Option(help="The gpt-oss directory that the adapter is for; config.json is read.")],
    adapter: Annotated[
        Path,
        typer.Option(help="An adapter directory in any layout that jmoe reads.", parser=input_path, metavar="<path>"),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="A new or empty directory for the adapter as PEFT writes it.", parser=output_path, metavar="<path>"
        ),
    ],
    portable: Annotated[
        bool,
        typer.Option(
            "--portable",
            help="One rank and scale for all, and both of the experts' projections, so that vLLM cannot misread it.",
        ),
    ] = False,
    lora_b_layout: LoraBLayoutOption = None,
) -> None:
    """Writes an adapter in PEFT's usual layout, float32, of the same effect.

    Experts' factors in 3-D, one pair for each expert, another order of lora_B's columns or float16 become what PEFT and
    vLLM read.
    """
    from jmoe import gpt_oss
    from jmoe.adapters.settings import Settings
    from jmoe.gpt_oss.config import Config

    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; an adapter is written to a new directory")
    base_model = Settings.load(adapter / "adapter_config.json").base_model
    lora = gpt_oss.load_adapter(adapter, Config.load(model), lora_b_layout=lora_b_layout)
    gpt_oss.save_adapter(out, lora, base_model=base_model, portable=portable)
    typer.echo(f"wrote {out}")
