"""A run's figures: one JSON object a line, what else follows them, a curve at the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jmoe.files import naming, replace
from jmoe.finetune.trackers import Tracker

FILE = "metrics.jsonl"


class Metrics:
    """Writes metrics.jsonl of a directory, each line as it comes; closed at the end of a `with`."""

    def __init__(self, directory: Path, step: int, trackers: Sequence[Tracker] = ()) -> None:
        """Goes on after this step: what a run that was cut off wrote of later ones is taken out.

        trackers: are given every line's numbers too, and closed with the file.

        Raises:
          OSError: the file, which is named, cannot be written.
        """
        self.path = directory / FILE
        self.trackers = trackers
        # A run that begins again writes its loss before the first step again.
        first = step + 1 if step else 0
        self._rewrite([row for row in read(directory) if row["step"] < first])
        self.file = self.path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with naming(self.path):
                self.file.close()
        finally:
            for tracker in self.trackers:
                tracker.close()

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """One line. Raises OSError, with the file's name, if it cannot be written."""
        with naming(self.path):
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            self.file.flush()
        self._track(step, figures)

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """Adds figures to the line of a step, which is the last. Raises OSError if they cannot be written."""
        rows = read(self.path.parent)
        self._rewrite([row | figures if row["step"] == step else row for row in rows])
        self.file.close()
        self.file = self.path.open("a")
        self._track(step, figures)

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        replace(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _track(self, step: int, figures: dict[str, Any]) -> None:
        numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
        for tracker in self.trackers:
            tracker.log(step, numbers)


class NoMetrics:
    """Of a process that writes none, as another of its run does."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Nothing."""

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """Nothing."""


def read(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut off is left out."""
    file = directory / FILE
    rows: list[dict[str, Any]] = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def check_plot() -> None:
    """Raises ImportError unless plot can run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('fine-tuning draws its losses with matplotlib: pip install "jmoe[finetune]"') from error


def plot(directory: Path) -> Path:
    """Draws loss.png, the loss against the steps of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    for name, label, marker in (("loss", "training", ""), ("validation_loss", "validation", "o")):
        rows = [row for row in read(directory) if name in row]
        if rows:
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.legend()
    file = directory / "loss.png"
    with naming(file):
        figure.savefig(file, dpi=120)
    return file
