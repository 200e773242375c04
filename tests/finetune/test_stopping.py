"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jmoe.finetune import stopping
from jmoe.finetune.stopping import exit_status, stop_signals

ROOT = Path(__file__).parents[2]

# The main thread computes in C, where Python runs no signal handler.
BUSY = """
import hashlib, os
from jmoe.finetune.stopping import stop_signals
with stop_signals(lambda text: print(text, flush=True), os._exit):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def wait_for(texts: list[str]) -> None:
    deadline = time.monotonic() + 30
    while not texts and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_second_signal_ends_the_process_at_once_unless_it_is_the_first_one_sent_twice() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("SIGTERM: the step is finished and saved")
        process.send_signal(signal.SIGTERM)  # as `timeout` does
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_noted_and_handled_as_before_afterwards(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    said: list[str] = []
    with stop_signals(said.append) as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        wait_for(said)
    assert (stop.signal, len(said)) == (number, 1)
    assert signal.getsignal(number) == before
    assert exit_status(number) == 128 + number


def test_a_second_signal_is_raised_in_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SAME_SECONDS", 0.0)
    said: list[str] = []

    def work() -> None:
        with stop_signals(said.append):
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(said)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for([])

    with pytest.raises(KeyboardInterrupt):
        work()


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(lambda text: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_nothing_is_handled() -> None:
    noted: list[bool] = []

    def work() -> None:
        with stop_signals(lambda text: None) as stop:
            noted.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [False]
