"""Where a run's figures go beside its own file: TensorBoard and Weights & Biases, each by its own client.

The clients are optional and imported only here. Common interfaces over both were passed over: those of Lightning and
accelerate need torch, CLU's has no Weights & Biases, and metrax's cannot hide what a run that was cut off wrote after
the step from which it goes on.
"""

import dataclasses
import importlib.util
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from jmoe.files import replace
from jmoe.finetune.config import FinetuneConfig

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""--log-to's name -> the module that must be installed; extras of jmoe have the same names as --log-to."""


class Tracker(Protocol):
    """Takes the figures of each step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step, whose number never falls."""

    def close(self) -> None:
        """Writes what is not written yet."""


class TensorBoard:
    """Writes event files to the folder `tensorboard` of a run."""

    def __init__(self, out: Path, first: int) -> None:
        """first: what an earlier run wrote of this step and later ones is hidden."""
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Scalars of the figures' names."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes the last events."""
        self.writer.close()


class WeightsAndBiases:
    """Sends to wandb.ai, or writes to the folder `wandb` of a run, as wandb's own settings say (`WANDB_MODE=offline`).

    Project and entity are wandb's own settings too; the run is named after its folder.
    """

    def __init__(self, out: Path, config: FinetuneConfig, first: int) -> None:
        """Begins a run, or goes on with the folder's if first is above 0.

        Raises:
          OSError: Weights & Biases refuses, as when nobody is logged in.
        """
        import wandb

        file = out / "wandb_run.txt"
        if first == 0 or not file.is_file():
            replace(file, f"{uuid.uuid4().hex[:12]}\n".encode())
        try:
            self.run = wandb.init(
                dir=str(out),
                id=file.read_text().strip(),
                name=out.absolute().name,
                config=dataclasses.asdict(config),
                resume="allow",
                settings=wandb.Settings(console="off"),  # the run's figures alone
            )
        except wandb.Error as error:
            raise OSError(f"Weights & Biases: {error}") from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One row of wandb's history."""
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        """Sends the last rows."""
        self.run.finish()


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises ImportError if a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ImportError(f'--log-to {name} needs {PACKAGES[name]}: pip install "jmoe[{name}]"')


def make_trackers(config: FinetuneConfig, out: Path, step: int) -> list[Tracker]:
    """What config.log_to names, for a run that goes on after this step; TensorBoard if it names nothing and is there.

    Raises:
      OSError: Weights & Biases refuses.
    """
    first = step + 1 if step else 0  # a run that begins again writes its loss before the first step again
    names = config.trackers
    if config.log_to is None and importlib.util.find_spec(PACKAGES["tensorboard"]) is not None:
        names = ("tensorboard",)
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(out, first),
        "wandb": lambda: WeightsAndBiases(out, config, first),
    }
    return [makers[name]() for name in names]
