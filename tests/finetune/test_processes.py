"""Runs of several processes, for real: two of two CPU devices each, over loopback; and one that goes on elsewhere."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmoe.finetune.connection import ALIVE, ENDED, Connection, Watch
from jmoe.finetune.metrics import read
from tests.finetune.test_run import command

ROOT = Path(__file__).parents[2]
SAME_RATE = ("--schedule", "constant", "--warmup", "0", "--batch-size", "4")
ROUNDING = 1e-5
"""Of losses in float32 after steps at a high rate on other devices, relative."""


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def environment(devices: int, port: int | None = None) -> dict[str, str]:
    """Of a process with so many CPU devices, which listens on loopback alone if it is the first of several."""
    listens = {} if port is None else {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | listens


@contextlib.contextmanager
def two_processes(
    arguments: Sequence[str], coordinator: str = "--coordinator"
) -> Iterator[list[subprocess.Popen[str]]]:
    """Both processes of this command, each told which it is; ended at the end of the `with`."""
    port = free_port()
    started = []
    for number in ("0", "1"):
        who = [coordinator, f"127.0.0.1:{port}", "--process", number, "--processes", "2"]
        started.append(
            subprocess.Popen([*arguments, *who], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(2, port))
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def figures(out: Path) -> list[dict[str, Any]]:
    """What a run computed."""
    names = ("step", "loss", "gradient_norm", "validation_loss", "tokens")
    return [{name: row[name] for name in names if name in row} for row in read(out)]


def assert_same_run(found: Path, wanted: Path) -> None:
    """The same batches in the same order: the same losses but for rounding."""
    for one, other in zip(figures(found), figures(wanted), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=ROUNDING)


def finish(arguments: list[str], devices: int) -> str:
    """What a run of one process printed, which must end well."""
    run = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT, env=environment(devices))
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Is {n} even?", "completion": "no yes"}) + "\n" for n in range(40)))
    return file


@pytest.fixture(scope="module")
def on_one_device(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that went through, on one device without a mesh."""
    out = tmp_path_factory.mktemp("one")
    finish(command(data, out, *SAME_RATE), 1)
    return out


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(
    data: Path, on_one_device: Path, tmp_path: Path
) -> None:
    arguments = command(data, tmp_path, *SAME_RATE, "--mesh", "data=2,expert=2", "--distributed")
    with two_processes(arguments) as (first, second):
        deadline = time.monotonic() + 600
        while not (tmp_path / "checkpoints" / "2").exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        second.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, said = first.communicate(timeout=60)
        assert first.returncode == 1, said
        assert time.monotonic() - killed < 60
        assert re.search(r"jmoe: process 1 of 2 has ended, .* goes on from the newest checkpoint", said)
    with two_processes(arguments) as (first, second):
        said = first.communicate(timeout=600)[1]
        assert first.returncode == second.wait(60) == 0, said
    assert "4 devices of 2 processes; each computes 1 of 4 sequences at once and holds 4 of 8 experts" in said
    assert re.search(r"going on after step [24]", said)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert_same_run(tmp_path, on_one_device)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_the_same_data(data: Path, on_one_device: Path, tmp_path: Path) -> None:
    first, then, last = (command(data, tmp_path, *SAME_RATE, "--steps", steps) for steps in ("2", "4", "6"))
    finish([*first, "--mesh", "data=2", "--fsdp"], 2)
    assert "going on after step 2" in finish(then, 1)
    assert "going on after step 4" in finish([*last, "--mesh", "data=2,expert=2"], 4)
    losses = [[row["loss"] for row in figures(out) if "loss" in row] for out in (tmp_path, on_one_device)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=ROUNDING)


AGREEING = """
import datetime, pathlib, sys
from jmoe.finetune.connection import Connection, connected
from jmoe.finetune.processes import AgreedStop, check_alike, first_day, wait_for_all, writes
from jmoe.finetune.stopping import Stop
number = int(sys.argv[4])
with connected(Connection(sys.argv[2], number, int(sys.argv[6]))):
    assert writes() == (number == 0)
    assert first_day(datetime.date(2026, 1, 1 + number)) == datetime.date(2026, 1, 1)
    stop = Stop()
    agreed = AgreedStop(stop)
    assert not agreed()
    stop.signal = 15 if number == 1 else None
    assert agreed() and stop.signal == 15
    check_alike(pathlib.Path("out"), options="same", data="same")
    wait_for_all()
    if number == 0:
        raise ValueError("the disk is full")
    wait_for_all()
"""


def test_processes_agree_and_when_one_fails_the_other_says_why() -> None:
    with two_processes([sys.executable, "-c", AGREEING]) as (first, second):
        failed, said = first.communicate(timeout=120)[1], second.communicate(timeout=120)[1]
    assert first.returncode == 1
    assert "ValueError: the disk is full" in failed
    assert second.returncode == 1
    assert re.search(r"jmoe: process 0 of 2 has ended, on .*: the disk is full; the same command goes on", said)


class Store:
    """Holds what processes tell each other, of which the second never says anything."""

    def __init__(self) -> None:
        self.entries = {f"{ALIVE}1": "7"}

    def key_value_set(self, name: str, value: str, allow_overwrite: bool = False) -> None:
        self.entries[name] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.entries.items() if name.startswith(prefix)]


def watch(store: object, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which a watch of two processes ends this one, which is the first."""
    monkeypatch.setattr("jax._src.distributed.global_state.client", store)
    for name in ("LOST_SECONDS", "BEAT_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(f"jmoe.finetune.connection.{name}", 0.01)
    ended: list[int] = []
    one = Watch(0, 2, ended.append)
    one.start()
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    one.leave("")
    return ended


def test_a_process_that_is_silent_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store()
    assert watch(store, monkeypatch) == [1]
    assert "process 1 of 2 has ended, it has not been heard for 0 s" in capsys.readouterr().err
    assert f"{ALIVE}0" in store.entries
    assert f"{ENDED}0" in store.entries


def test_a_coordinator_that_does_not_answer_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch(object(), monkeypatch) == [1]
    assert "process 0 of 2 has ended, it does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", None, None), "go together"),
        ((None, 0, 2), "go together"),
        (("host", 0, 2), "must be a host and a port as host:1234, got 'host'"),
        (("host:1", 2, 2), r"--process must be in \[0, 2\), got 2"),
    ],
)
def test_a_connection_by_hand_is_given_whole(given: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Connection(*given)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--process", "0"], "go together"),
        (
            ["--coordinator", "h:1", "--process", "0", "--processes", "2"],
            "are of several processes: add --distributed",
        ),
        (["--distributed"], "several processes share a mesh of all their devices: add --mesh"),
    ],
)
def test_flags_of_several_processes_go_together(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from jmoe.cli import main

    monkeypatch.setattr(sys, "argv", ["jmoe", *command(tmp_path, tmp_path)[3:], *flags])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
