"""A run's figures: one JSON object a line, TensorBoard where it is installed, a curve at the end."""

import importlib.util
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FILE = "metrics.jsonl"


class Metrics:
    """Writes metrics.jsonl of a directory, each line as it comes; closed at the end of a `with`."""

    def __init__(self, directory: Path, step: int) -> None:
        """Goes on after this step: what a run that was cut off wrote of later ones is taken out."""
        file = directory / FILE
        # A run that begins again writes its loss before the first step again.
        first = step + 1 if step else 0
        kept = [row for row in read(directory) if row["step"] < first]
        fresh = file.with_suffix(".new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        fresh.replace(file)
        self.file = file.open("a")
        self.board = None
        if importlib.util.find_spec("tensorboardX") is not None:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=first)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """One line."""
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in figures.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, step)


def read(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut off is left out."""
    file = directory / FILE
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
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
    figure.savefig(file, dpi=120)
    return file
