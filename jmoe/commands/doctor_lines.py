"""What `jmoe doctor` says in lines: of the files that text needs, and of the loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jmoe.adapters.settings import LoraBLayout
    from jmoe.gpt_oss.load import Quantize


def text_lines(model: str) -> list[str]:
    """What was found of the files that text needs, a line each."""
    from jmoe.doctor.text_files import examine_text_files
    from jmoe.gpt_oss.load import local_directory

    return [
        f"{'warning: ' if file.wrong else ''}{file.name}: {file.found}"
        for file in examine_text_files(local_directory(model))
    ]


def loss_lines(
    model: str, adapters: Sequence[Path], lora_b_layout: "LoraBLayout | None", quantize: "Quantize | None" = None
) -> list[str]:
    """The loss of the model and with each adapter, and a warning for each that is too high."""
    from jmoe.doctor.loss import bound, examine_loss

    report = examine_loss(model, adapters, lora_b_layout=lora_b_layout, quantize=quantize)
    where = "as an answer in the chat template" if report.in_template else "as bare text"
    lines = [
        f"loss of {name}: {loss:.2f} nats a token, on {report.tokens} tokens of plain English {where}"
        for name, loss in report.losses.items()
    ]
    limit = bound(report.vocabulary)
    return lines + [
        f"warning: the loss of {name} is not below {limit:.2f}, half of ln({report.vocabulary}): to know how frequent "
        "words are takes no more. Its weights do not fit together (a square down_proj whose last two axes are swapped "
        "has the right shape), the tokenizer is another model's, or it was never trained on English"
        for name in report.too_high
    ]
