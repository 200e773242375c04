"""What a run shows while it goes on: a bar on a terminal, lines of figures elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

TEXTS = {
    "loss": "loss {:.4f}",
    "validation_loss": "validation {:.4f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.0%}",
    "memory_gib": "{:.1f} GiB",
}
SPEEDS = ("tokens_per_second", "mfu")

MOST_SECONDS = 30.0
"""Between lines off a terminal."""

SPEED_SECONDS = 600.0
"""The time left is estimated from the steps of so long before."""


def describe(figures: dict[str, Any]) -> str:
    """The figures in words."""
    return "  ".join(text.format(figures[name]) for name, text in TEXTS.items() if figures.get(name) is not None)


class Display:
    """A bar on a terminal, and lines: of validations, and off a terminal of steps, each 30 seconds at the latest.

    Losses are those of the step that is shown. Speeds and the time left are of what this process has done, its first
    step, which is compiled, left out.
    """

    def __init__(
        self,
        total: int,
        done: int,
        console: Console,
        *,
        log_every: int | None = None,
        most_seconds: float = MOST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A run of `total` steps that goes on after `done`.

        log_every: steps between lines, on a terminal too; None: 20 lines in all, and none on a terminal.
        most_seconds: between lines off a terminal.
        clock: seconds, by which the time left is told.
        """
        self.console = console
        self.total = total
        self.log_every = log_every
        self.most_seconds = most_seconds
        self.step, self.first = done, done + 1
        self.latest: dict[str, Any] = {}
        self.clock = clock
        self.said = clock()
        self.closed = threading.Event()
        self.lock = threading.Lock()
        self.heartbeat = threading.Thread(target=self._beat, name="display", daemon=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.progress = Progress(
            *columns,
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=SPEED_SECONDS,
            get_time=clock,
        )
        self.task = self.progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self.progress.start()
        if not self.console.is_terminal:
            self.heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        if self.heartbeat.is_alive():
            self.heartbeat.join()
        self.progress.stop()

    def show(self, step: int, figures: dict[str, Any]) -> None:
        """The figures of a step."""
        with self.lock:
            self.step = step
            self.latest = {name: value for name, value in figures.items() if step > self.first or name not in SPEEDS}
            text = describe(self.latest)
            self.progress.update(self.task, completed=step, description=text)
            every = self.log_every or (None if self.console.is_terminal else max(1, self.total // 20))
            due = every is not None and (step % every == 0 or step == self.total)
            if due or "validation_loss" in figures:
                self._say_step(text)

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _say_step(self, text: str) -> None:
        left = self.progress.tasks[self.task].time_remaining
        ends = f"  {timedelta(seconds=round(left))} left" if left is not None and self.step < self.total else ""
        self.say(f"step {self.step} of {self.total}: {text}{ends}")
        self.said = self.clock()

    def _beat(self) -> None:
        """Says the last step's figures again whenever nothing was said for so long, as in a long step or validation."""
        while not self.closed.wait(max(0.0, self.said + self.most_seconds - self.clock())):
            with self.lock:
                if self.clock() - self.said >= self.most_seconds and not self.closed.is_set():
                    losses = {name: value for name, value in self.latest.items() if name != "validation_loss"}
                    self._say_step(describe(losses) or "the first step is being compiled or validated")


class Output:
    """A text stream for a console; where it is gone, as with its terminal, nothing is written and nothing raised."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """All of the text, or none."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """What was written so far."""
        with contextlib.suppress(OSError):
            self.stream.flush()


def stderr_console() -> Console:
    """Standard error, which may go away while a run goes on."""
    output: Any = Output(sys.stderr)
    return Console(file=output)
