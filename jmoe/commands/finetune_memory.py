"""The table of `jmoe doctor` that says what memory fine-tuning a model takes."""

import dataclasses
import typing
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from jmoe.gpt_oss.load import Quantize

FinetuneLengthOption = Annotated[int, typer.Option(help="Of fine-tuning: tokens of a sequence.", min=2)]
FinetuneBatchOption = Annotated[int, typer.Option(help="Of fine-tuning: sequences computed at once.", min=1)]
FinetuneRankOption = Annotated[int, typer.Option(help="Of fine-tuning: LoRA's rank, on experts and attention.", min=1)]


def finetune_table(model: str, *, length: int, batch_size: int, rank: int, quantize: "Quantize | None" = None) -> Table:
    """What a step of fine-tuning holds with each --remat, and whether that fits where JAX says how much there is.

    Raises:
      FileNotFoundError, ValueError: the model cannot be read.
    """
    from jmoe.checkpoint import Checkpoint
    from jmoe.device_memory import byte_size
    from jmoe.finetune.config import FinetuneConfig, Remat
    from jmoe.finetune.memory import device_limit, estimate, experts_in_mxfp4, new_adapter_shapes
    from jmoe.gpt_oss.config import Config
    from jmoe.gpt_oss.load import local_directory

    directory = local_directory(model)
    config, mxfp4 = Config.load(directory), experts_in_mxfp4(Checkpoint(directory), quantize)
    options = FinetuneConfig(model=model, data="-", out="-", length=length, batch_size=batch_size, rank=rank)
    shapes, limit = new_adapter_shapes(options, config), device_limit()
    title = f"memory of fine-tuning, about: {batch_size} x {length} tokens, LoRA r={rank}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    estimates = {
        remat: estimate(dataclasses.replace(options, remat=remat), config, shapes, mxfp4=mxfp4)
        for remat in reversed(typing.get_args(Remat.__value__))
    }
    for column in ("jmoe finetune --remat", *next(iter(estimates.values())).parts, "in all"):
        table.add_column(column)
    for remat, estimated in estimates.items():
        fits = (
            "" if limit is None else ", fits" if estimated.total <= limit else f", of {byte_size(limit)} that there are"
        )
        table.add_row(remat, *map(byte_size, estimated.parts.values()), f"{byte_size(estimated.total)}{fits}")
    return table
