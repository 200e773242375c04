"""What a run shows while it goes on."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

COLUMNS = ("loss", "validation_loss", "tokens_per_second", "mfu", "memory_gib")


def describe(figures: dict[str, Any]) -> str:
    """The figures in words."""
    texts = {
        "loss": "loss {:.4f}",
        "validation_loss": "validation {:.4f}",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.0%}",
        "memory_gib": "{:.1f} GiB",
    }
    return "  ".join(texts[name].format(figures[name]) for name in COLUMNS if figures.get(name) is not None)


class Display:
    """A bar on a terminal, and a line now and then elsewhere."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        self.console = console
        self.total = total
        self.latest: dict[str, Any] = {}
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, step: int, figures: dict[str, Any]) -> None:
        """The figures of a step."""
        self.latest |= figures
        text = describe(self.latest)
        self.progress.update(self.task, completed=step, description=text)
        every = max(1, self.total // 20)
        if not self.console.is_terminal and (step % every == 0 or step == self.total):
            self.say(f"step {step} of {self.total}: {text}")

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
