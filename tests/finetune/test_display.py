"""What a run shows on a terminal and elsewhere."""

import io
import time

import pytest
from rich.console import Console

from jmoe.finetune.display import MOST_SECONDS, Display, Output


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(display: Display) -> list[str]:
    return display.console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def off_a_terminal(total: int, done: int, **options: object) -> Display:
    return Display(total, done, Console(file=io.StringIO(), width=200), **options)  # type: ignore[arg-type]


def test_a_validation_loss_is_shown_where_it_is_new() -> None:
    display = off_a_terminal(40, 0)
    display.show(1, {"loss": 2.0})
    display.show(2, {"loss": 1.5, "validation_loss": 1.25})
    display.show(3, {"loss": 1.0, "validation_loss": 1.125})  # no line is due but for it
    display.show(4, {"loss": 0.5})
    assert ["validation" in line for line in shown(display)] == [True, True, False]
    assert shown(display)[-1].startswith("step 4 of 40: loss 0.5000")


def test_on_a_terminal_the_bar_keeps_no_old_validation_loss() -> None:
    display = Display(40, 0, Console(file=io.StringIO(), force_terminal=True, width=200))
    display.show(1, {"loss": 1.5, "validation_loss": 1.25})
    display.show(2, {"loss": 1.0})
    assert display.progress.tasks[0].description == "loss 1.0000"
    assert shown(display) == ["step 1 of 40: loss 1.5000  validation 1.2500"]


def test_a_run_that_goes_on_tells_its_own_speed_and_time_left() -> None:
    clock = Clock()
    display = off_a_terminal(200, 100, clock=clock, log_every=1)
    for step, seconds in ((101, 1000.0), (102, 40.0), (103, 60.0)):  # the first is compiled
        clock.now += seconds
        display.show(step, {"loss": 1.0, "tokens_per_second": 7.0})
    first, second, third = shown(display)
    assert first == "step 101 of 200: loss 1.0000"
    assert second == "step 102 of 200: loss 1.0000  7 tok/s  1:05:20 left"
    assert third == "step 103 of 200: loss 1.0000  7 tok/s  1:20:50 left"


def test_off_a_terminal_the_figures_are_said_again_while_a_step_takes_long() -> None:
    assert MOST_SECONDS <= 30
    with off_a_terminal(1000, 0, most_seconds=0.05) as display:
        deadline = time.monotonic() + 30
        while len(shown(display)) < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        display.show(1, {"loss": 2.0})
        display.show(2, {"loss": 1.5, "tokens_per_second": 12345.0})
        before = len(shown(display))
        while len(shown(display)) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = shown(display)
    assert lines[0] == "step 0 of 1000: the first step is being compiled or validated"
    assert lines[-1].startswith("step 2 of 1000: loss 1.5000  12,345 tok/s  ")
    assert lines[-1].endswith(" left")


@pytest.mark.parametrize("terminal", [False, True])
def test_log_every_says_how_often(terminal: bool) -> None:
    display = Display(10, 0, Console(file=io.StringIO(), force_terminal=terminal, width=200), log_every=4)
    for step in range(1, 11):
        display.show(step, {"loss": 1.0})
    assert [line.split()[1] for line in shown(display)] == ["4", "8", "10"]


def test_a_terminal_that_is_gone_is_no_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    console = Console(file=Output(Gone()))  # type: ignore[arg-type]
    Display(10, 0, console).show(10, {"loss": 1.0})
