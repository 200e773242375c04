"""A run's figures on disk."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

from jmoe.finetune.metrics import Metrics, read


class Writer:
    """tensorboardX.SummaryWriter, as far as it is used."""

    made: ClassVar[list["Writer"]] = []

    def __init__(self, directory: str, purge_step: int) -> None:
        self.directory, self.purge_step = directory, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("tensorboardX", loader=None)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


def test_tensorboard_gets_the_numbers_where_it_is_installed(tensorboard: list[Writer], tmp_path: Path) -> None:
    with Metrics(tmp_path, step=3) as metrics:
        metrics.write(4, {"loss": 2.0, "tokens": 5})
    (writer,) = tensorboard
    assert writer.directory == str(tmp_path / "tensorboard")
    assert writer.purge_step == 4  # what a run that was cut off wrote of later steps is hidden
    assert writer.scalars == [("loss", 2.0, 4)]
    assert writer.closed
    assert read(tmp_path) == [{"step": 4, "loss": 2.0, "tokens": 5}]


def test_a_run_that_begins_again_purges_the_loss_before_the_first_step_too(
    tensorboard: list[Writer], tmp_path: Path
) -> None:
    for loss in (2.0, 3.0):  # cut off before its first checkpoint, and again
        with Metrics(tmp_path, step=0) as metrics:
            metrics.write(0, {"validation_loss": loss})
    assert [writer.purge_step for writer in tensorboard] == [0, 0]
    assert read(tmp_path) == [{"step": 0, "validation_loss": 3.0}]


def test_without_tensorboard_there_is_the_file_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(1, {"loss": 2.0})
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_after_the_step_gone_on_from_are_taken_out(tmp_path: Path) -> None:
    with Metrics(tmp_path, step=0) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": float(step)})
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "lo')  # killed while it wrote
    with Metrics(tmp_path, step=2) as metrics:
        metrics.write(3, {"loss": 30.0})
    assert [row["loss"] for row in read(tmp_path)] == [1.0, 2.0, 30.0]
