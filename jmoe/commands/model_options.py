"""Options that several commands have: of a model, of an adapter, of the chat template."""

from typing import Annotated

import typer

from jmoe.adapters.settings import LoraBLayout
from jmoe.gpt_oss.load import Quantize
from jmoe.text import ReasoningEffort

LoraBLayoutOption = Annotated[
    LoraBLayout | None,
    typer.Option(
        help="How columns of the experts' lora_B count, for an adapter that does not say: rank_major is PEFT's order, "
        "grouped_by_expert Unsloth's before September 2026."
    ),
]
"""--lora-b-layout."""

QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        help="mxfp4: round dense experts to MXFP4 while they are loaded; those that are MXFP4 stay as they are."
    ),
]
"""--quantize."""

MeshOption = Annotated[
    str | None,
    typer.Option(
        metavar="AXES",
        help="Split the model over all GPUs, as data=2,expert=4: sizes multiply to their number, and -1 is the rest. "
        "Axes are data (batches), expert, heads, and model (experts and heads at once).",
    ),
]
"""--mesh."""

ReasoningEffortOption = Annotated[
    ReasoningEffort | None,
    typer.Option(help="How much the model shall think; the chat template's own if not given."),
]
"""--reasoning-effort."""
