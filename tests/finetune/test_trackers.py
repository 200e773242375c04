"""TensorBoard and Weights & Biases, by their own clients."""

import dataclasses
import importlib.util
import struct
import sys
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.metrics import Metrics
from jmoe.finetune.trackers import check_trackers, make_trackers

CONFIG = FinetuneConfig(model="m", data="d", out="o")


def events(folder: Path) -> list[Event]:
    """The records of its event files, in order: each is its length in 8 bytes, 4 of a checksum, itself, and 4."""
    found = []
    for file in sorted(folder.glob("events.*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            found.append(Event.FromString(content[place + 12 : place + 12 + length]))
            place += length + 16
    return found


@pytest.mark.parametrize("log_to", [None, "tensorboard"])
def test_tensorboard_gets_the_numbers_where_it_is_installed(log_to: str | None, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, log_to=log_to)
    with Metrics(tmp_path, 3, make_trackers(config, tmp_path, 3)) as metrics:
        metrics.write(4, {"loss": 2.0, "tokens": 5})
    found = events(tmp_path / "tensorboard")
    # What a run that was cut off wrote of later steps is hidden.
    assert [event.step for event in found if event.session_log.status == event.session_log.START] == [4]
    scalars = [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]
    assert scalars == [(4, "loss", 2.0)]


def test_a_run_that_begins_again_hides_the_loss_before_the_first_step_too(tmp_path: Path) -> None:
    for tracker in make_trackers(dataclasses.replace(CONFIG, log_to="tensorboard"), tmp_path, 0):
        tracker.close()
    starts = [event for event in events(tmp_path / "tensorboard") if event.session_log.status]
    assert [event.step for event in starts] == [0]


def test_weights_and_biases_gets_the_numbers_and_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = dataclasses.replace(CONFIG, log_to="wandb")
    with Metrics(tmp_path, 0, make_trackers(config, tmp_path, 0)) as metrics:
        metrics.write(1, {"seen_by_wandb": 2.0, "tokens": 5})
    name = (tmp_path / "wandb_run.txt").read_text().strip()
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    deadline = time.monotonic() + 30
    while b"seen_by_wandb" not in file.read_bytes() and time.monotonic() < deadline:  # wandb's own process writes it
        time.sleep(0.01)
    assert b"seen_by_wandb" in file.read_bytes()

    asked: list[dict[str, object]] = []
    monkeypatch.setattr("wandb.init", lambda **options: asked.append(options))
    for step in (4, 0):  # going on, and beginning again
        make_trackers(config, tmp_path, step)
    assert asked[0]["id"] == name != asked[1]["id"]
    assert asked[0]["resume"] == "allow"
    assert (asked[0]["name"], asked[0]["dir"]) == (tmp_path.name, str(tmp_path))


def test_what_weights_and_biases_refuses_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**options: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(OSError, match=r"Weights & Biases: No API key configured\."):
        make_trackers(dataclasses.replace(CONFIG, log_to="wandb"), tmp_path, 0)


def test_nothing_is_tracked_unless_it_is_installed_or_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert make_trackers(dataclasses.replace(CONFIG, log_to="none"), tmp_path, 0) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert make_trackers(CONFIG, tmp_path, 0) == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'--log-to wandb needs wandb: pip install "jmoe\[wandb\]"'):
        check_trackers(("wandb",))
    check_trackers(())


@pytest.mark.parametrize("log_to", ["", ",", "mlflow", "tensorboard,mlflow", "none,wandb"])
def test_other_trackers_are_refused(log_to: str) -> None:
    with pytest.raises(ValueError, match="log_to must be tensorboard,wandb, one or none, got"):
        dataclasses.replace(CONFIG, log_to=log_to)
    assert dataclasses.replace(CONFIG, log_to="tensorboard, wandb").trackers == ("tensorboard", "wandb")
