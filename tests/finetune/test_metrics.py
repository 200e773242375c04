"""A run's figures on disk."""

from pathlib import Path

import pytest

from jmoe.finetune.metrics import Metrics, read


class Tracker:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.logged.append((step, figures))

    def close(self) -> None:
        self.closed = True


def test_trackers_get_the_numbers_too(tmp_path: Path) -> None:
    tracker = Tracker()
    with Metrics(tmp_path, 3, [tracker]) as metrics:
        metrics.write(4, {"loss": 2.0, "tokens": 5})
    assert (tracker.logged, tracker.closed) == ([(4, {"loss": 2.0})], True)
    assert read(tmp_path) == [{"step": 4, "loss": 2.0, "tokens": 5}]
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


def test_a_run_that_begins_again_writes_its_loss_before_the_first_step_again(tmp_path: Path) -> None:
    for loss in (2.0, 3.0):  # cut off before its first checkpoint, and again
        with Metrics(tmp_path, step=0) as metrics:
            metrics.write(0, {"validation_loss": loss})
    assert read(tmp_path) == [{"step": 0, "validation_loss": 3.0}]


def test_figures_are_added_to_the_last_line(tmp_path: Path) -> None:
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(1, {"loss": 2.0})
        metrics.add(1, {"validation_loss": 3.0})
        metrics.write(2, {"loss": 1.0})
    assert read(tmp_path) == [{"step": 1, "loss": 2.0, "validation_loss": 3.0}, {"step": 2, "loss": 1.0}]


def test_a_full_disk_is_said_with_the_files_name(tmp_path: Path) -> None:
    tracker = Tracker()
    full = pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'")
    with full, Metrics(tmp_path, 0, [tracker]) as metrics:
        metrics.file.close()
        metrics.file = Path("/dev/full").open("a")  # noqa: SIM115
        metrics.write(1, {"loss": 2.0})
    assert tracker.closed
