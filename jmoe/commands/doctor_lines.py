"""What `jmoe doctor` says in lines: of the files that text needs, and of the loss."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jmoe.doctor_loss import ParagraphLoss
    from jmoe.doctor_text import TextFile


def text_line(file: "TextFile") -> str:
    """What was found of a file that text needs."""
    return f"{'warning: ' if file.wrong else ''}{file.name}: {file.found}"


def loss_lines(report: "ParagraphLoss") -> list[str]:
    """The losses, and a warning for each that is not below the bound."""
    from jmoe.doctor_loss import bound

    where = "as an answer in the chat template" if report.in_template else "as bare text"
    lines = [
        f"loss of {name}: {loss:.2f} nats a token, on {report.tokens} tokens of plain English {where}"
        for name, loss in report.losses.items()
    ]
    limit = bound(report.vocabulary)
    return lines + [
        f"warning: the loss of {name} is above {limit:.2f}, half of ln({report.vocabulary}), which knowing how frequent "
        "words are takes already: its weights do not fit together (a square down_proj whose last two axes are swapped has "
        "the right shape), the tokenizer is another model's, or it was never trained on English"
        for name in report.too_high
    ]
