"""Options of every command that takes an adapter."""

from typing import Annotated

import typer

from jmoe.adapters.settings import LoraBLayout

LoraBLayoutOption = Annotated[
    LoraBLayout | None,
    typer.Option(
        help="How columns of the experts' lora_B count, for an adapter that does not say: rank_major is PEFT's order, "
        "grouped_by_expert Unsloth's before September 2026."
    ),
]
"""--lora-b-layout."""
