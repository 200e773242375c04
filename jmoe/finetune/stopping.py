"""Signals that ask a run to stop: the first lets it save, a later one ends it at once."""

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; what schedulers and `timeout` send before they kill; a terminal that closes; Slurm's `--signal=USR1@120`."""

SAME_SECONDS = 1.0
"""Later signals within this time are the same wish: `timeout` sends one to the process and one to its group."""


class Stop:
    """Whether somebody asked the run to stop.

    signal: the number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = False

    def __call__(self) -> bool:
        return self.signal is not None


def exit_status(number: int) -> int:
    """What a shell says of a process that this signal ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def stop_signals(say: Callable[[str], None], end_process: Callable[[int], None] | None = None) -> Iterator[Stop]:
    """Within it SIGNALS are noted instead of acted on, and a second one, a second later or more, ends the work at once.

    Signals are watched by a thread, which hears them while the main thread waits for a device or a compiler. Outside of
    the main thread, where Python lets nobody handle signals, nothing is noted.

    Args:
      say: told the first signal, in words, as soon as it comes.
      end_process: called by the thread with the second signal's exit status, and not expected to return; None: the
        second signal raises KeyboardInterrupt in the main thread, as soon as Python runs there.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: object) -> None:
        if stop.at_once:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number

    def watch() -> None:
        first = None
        while heard := os.read(reading, 1):  # empty once the other end is closed
            number = heard[0]
            if number not in SIGNALS:
                continue
            stop.signal = stop.signal or number
            now = time.monotonic()
            if first is None:
                first = now
                say(f"{signal.Signals(number).name}: the step is finished and saved; once more to end at once")
            elif now - first >= SAME_SECONDS:
                if end_process is not None:
                    end_process(exit_status(number))
                stop.at_once = True
                _thread.interrupt_main()

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    heard_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # What nohup has the process ignore stays ignored.
    handled = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
        signal.set_wakeup_fd(heard_before)
        os.close(writing)
        watcher.join()
        os.close(reading)
