"""The command `jmoe`, which `python -m jmoe` is too."""

import os
import signal
import threading

INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C, as shells have it."""


def main() -> None:
    """Entry point: as jmoe.cli.main, but that Ctrl-C ends the process at any time, also while modules are imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else who started the command wants it ignored
        end_when_interrupted()
    from jmoe.extras import require

    try:
        require("the command jmoe", "cli", "typer", "rich", "flax", "safetensors")
    except ImportError as error:
        raise SystemExit(f"jmoe: {error}") from None
    from jmoe.cli import main as run

    run()


def end_when_interrupted() -> None:
    """Has a thread end the process once SIGINT comes, with a line and without cleaning up.

    Python's own way, an exception, leaves a traceback of what is being imported, is lost in callbacks that ignore
    exceptions, and waits for compilers. What a command has written is in its files by then; `jmoe finetune` handles
    signals itself once it trains.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # the thread hears it

    def watch() -> None:
        while heard := os.read(reading, 1):
            if heard[0] == signal.SIGINT:
                os.write(2, b"jmoe: interrupted\n")
                os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="interrupts", daemon=True).start()


if __name__ == "__main__":
    main()
