"""A fine-tuning run from its configuration to an adapter."""

import dataclasses
import datetime
import json
import os
import signal
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from rich.console import Console

from jmoe.adapters.settings import AdapterWarning
from jmoe.files import replace
from jmoe.finetune.batches import Batch, digest
from jmoe.finetune.checkpoint import Checkpoints, Standing
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.display import Display, stderr_console
from jmoe.finetune.expert_check import ExpertCheck
from jmoe.finetune.folder import BEGUN, OPTIONS, checkpoint_steps, run_folder
from jmoe.finetune.loop import Ending, Run, run_steps
from jmoe.finetune.metrics import Metrics, NoMetrics, check_plot, plot
from jmoe.finetune.prepare import Prepared, prepare
from jmoe.finetune.processes import AgreedStop, check_alike, first_day, first_says, wait_for_all, writes
from jmoe.finetune.start_adapter import start_adapter
from jmoe.finetune.start_report import say
from jmoe.finetune.step import Trainer, TrainState, make_optimizer
from jmoe.finetune.stopping import stop_signals
from jmoe.finetune.trackers import check_trackers, make_trackers
from jmoe.gpt_oss.load import load
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.save import save_adapter
from jmoe.nn.report import trainable_report


class Result(NamedTuple):
    """How a run ended.

    adapter: its directory, in PEFT's format: of the lowest validation loss, or the last without validation. A run that
      was interrupted before its first step has none.
    best_loss: that validation loss, or None.
    signal: the number of the signal that interrupted it, or None.
    """

    ending: Ending
    steps: int
    adapter: Path
    best_loss: float | None
    signal: int | None = None


def finetune(config: FinetuneConfig, console: Console | None = None, *, owns_process: bool = False) -> Result:
    """Trains LoRA on a gpt-oss checkpoint, or goes on with the run that config.out holds.

    Once steps are taken, SIGINT, SIGTERM, SIGHUP and SIGUSR1 end the run after the step that is going on, with a
    checkpoint. A run that had ended goes on if it is now given more steps or epochs, or more patience.

    Args:
      console: told what happens; standard error if None.
      owns_process: whether a second such signal ends the process; else it raises KeyboardInterrupt.

    Raises:
      FileNotFoundError: the model or a file is missing.
      ValueError: an option, a row of the data or the checkpoint does not fit; config.out holds a run with others, or
        what a run would overwrite; a loss was not finite (NonFiniteLossError); another run is going on in config.out
        (FolderInUseError).
      OSError: a file, which is named, cannot be written, as on a full disk.
      ImportError: the extra "finetune" is not installed, or what config.log_to names.
    """
    check_plot()
    check_trackers(config.trackers)
    console = stderr_console() if console is None else console
    if not writes():
        console = Console(quiet=True)
    notices = Console(quiet=True) if config.quiet else console
    with run_folder(config) if writes() else nullcontext(Path(config.out)) as out:
        wait_for_all()
        result = run_in(out, config, notices, owns_process)
        wait_for_all()
    by = f" by {signal.Signals(result.signal).name}" if result.signal is not None else ""
    adapter = f"adapter in {result.adapter}" if result.adapter.is_dir() else "no adapter yet"
    on = "; the same command goes on" if result.ending == "interrupted" else ""
    steps = "1 step" if result.steps == 1 else f"{result.steps} steps"
    text = f"{result.ending}{by} after {steps}; {adapter}{on}"
    say(console, text)
    return result


def run_in(out: Path, config: FinetuneConfig, console: Console, owns_process: bool) -> Result:
    """Trains in a folder that is locked, see finetune."""
    day = first_day(day_begun(out))
    prepared = prepare(config, day, console)
    batches, held_out, steps = prepared.batches, prepared.held_out, prepared.steps
    data = digest(batches.packed, *held_out)
    # Before one of them reads a checkpoint, which all do together.
    check_alike(out, options=same_in_all(config), data=data, checkpoints=str(checkpoint_steps(out)))
    with Checkpoints(out / "checkpoints", config, data) as checkpoints:
        standing, notes = go_on(checkpoints.standing(), steps, config)
        for note in notes:
            say(console, note)
        trainer = make_trainer(config, new_model(config, prepared), steps)
        say(console, str(trainable_report(trainer.model(trainer.start))).splitlines()[-1])
        state, _ = checkpoints.restore(trainer.start)
        if writes():
            write(out / OPTIONS, json.dumps(dataclasses.asdict(config), indent=2))
            write(out / BEGUN, day.isoformat())

        saver = AdapterSaver(out / "adapter", config, trainer, console)

        def end_process(status: int) -> None:
            console.show_cursor()
            os._exit(status)

        display = Display(steps, standing.step, console, log_every=config.log_every)
        with (
            stop_signals(display.say, end_process if owns_process else None) as stop,
            open_metrics(out, config, standing.step) as metrics,
        ):
            experts = ExpertCheck(trainer, display)
            run = Run(
                config,
                trainer,
                batch=lambda step: in_micro_batches(batches.batch(step), config.accumulate),
                validation=held_out,
                steps=steps,
                out=out,
                save_adapter=saver.save,
                before_step=experts.before,
                after_step=experts.after,
                stop=AgreedStop(stop),
            )
            with display:
                state, standing, ending = run_steps(run, state, standing, checkpoints, metrics, display)
            if standing.step:  # else nothing was learnt, and the run begins again
                saver.save_last(state, standing, display)
                if writes():
                    plot(out)
    signal_number = stop.signal if ending == "interrupted" else None
    return Result(ending, standing.step, saver.directory, standing.best_loss, signal_number)


def open_metrics(out: Path, config: FinetuneConfig, step: int) -> Metrics | NoMetrics:
    """The run's metrics, to go on after this step, where this process writes them."""
    return Metrics(out, step, make_trackers(config, out, step)) if writes() else NoMetrics()


def same_in_all(config: FinetuneConfig) -> str:
    """The options that all processes of a run must have."""
    options = dataclasses.asdict(config)
    return json.dumps({name: options[name] for name in options if name not in ("quiet", "log_every", "log_to")})


def make_trainer(config: FinetuneConfig, model: GptOss, steps: int) -> Trainer:
    """The model's trainer for so many steps."""
    return Trainer(
        model,
        make_optimizer(config, steps),
        loss_chunk=config.loss_chunk,
        dropout=config.lora_dropout,
        seed=config.seed,
    )


class AdapterSaver:
    """Saves a run's adapter in PEFT's format; what is to be said of it is said once."""

    def __init__(self, directory: Path, config: FinetuneConfig, trainer: Trainer, console: Console) -> None:
        """Nothing is saved yet; the directory may hold what the run saved before it was interrupted."""
        self.directory = directory
        self._config = config
        self._trainer = trainer
        self._console = console
        self._told: set[str] = set()

    def save(self, state: TrainState) -> None:
        """Saves the adapter of this state in place of another; OSError names the file."""
        lora = self._trainer.adapter(state)
        if not writes():
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AdapterWarning)
            save_adapter(self.directory, lora, base_model=self._config.model, dropout=self._config.lora_dropout)
        for text in {str(warning.message) for warning in caught} - self._told:  # each save has the same
            self._told.add(text)
            say(self._console, text)

    def save_last(self, state: TrainState, standing: Standing, display: Display) -> None:
        """Saves the last state's adapter, unless the best one's is there."""
        there = (self.directory / "adapter_model.safetensors").is_file()
        gone = standing.best_loss is not None and not first_says(there)  # all save together, or none
        if gone:
            display.say(f"the best adapter is gone from {self.directory}: the last is saved")
        if gone or standing.best_loss is None:
            self.save(state)


def go_on(standing: Standing, steps: int, config: FinetuneConfig) -> tuple[Standing, list[str]]:
    """(where a run of so many steps begins, what is to be said of it) by where the run in its folder stands.

    Raises:
      ValueError: the run has taken more steps already.
    """
    if standing.step > steps:
        raise ValueError(
            f"{config.out} holds a run that has taken {standing.step} steps, and this one is to take {steps}: ask for "
            "as many or more, or choose another --out"
        )
    notes = [f"going on after step {standing.step}"] if standing.step else []
    before = standing.steps
    if standing.step and before is not None and before != steps:
        notes.append(
            f"the run was to take {before} steps and now takes {steps}: from here on the learning rate is that of a "
            f"schedule of {steps}"
        )
        if steps > standing.step and 0 < config.patience <= standing.since_best:
            standing = dataclasses.replace(standing, since_best=0)
        if steps == standing.step:  # which is now the last, after which there is a validation
            standing = dataclasses.replace(standing, validation_due=steps % config.validate_every != 0)
    return dataclasses.replace(standing, steps=steps), notes


def write(file: Path, text: str) -> None:
    """A file of this text and a line's end, whole or not at all. Raises OSError, with its name, if it cannot be."""
    replace(file, f"{text}\n".encode())


def rehearse(config: FinetuneConfig, console: Console | None = None) -> None:
    """Says all that a run says before its first step, and more of it; loads no model and writes nothing.

    Raises:
      FileNotFoundError, ValueError: as finetune.
    """
    console = Console(quiet=not writes()) if console is None else console
    prepare(config, day_begun(Path(config.out)), console, whole_report=True)


def day_begun(out: Path) -> datetime.date:
    """The day on which the run whose checkpoints `out` holds began; today if there are none.

    Chat templates may write the day, and the data of a run that goes on later must be the same.

    Raises:
      ValueError: begun.txt is not a date.
    """
    file = out / BEGUN
    if not file.is_file() or not checkpoint_steps(out):
        return datetime.date.today()
    try:
        return datetime.date.fromisoformat(file.read_text().strip())
    except ValueError as error:
        raise ValueError(f"{file} is not a date: {error}") from error


def new_model(config: FinetuneConfig, prepared: Prepared) -> GptOss:
    """The checkpoint with the adapter to start from, or a new one that changes nothing yet."""
    model = load(
        prepared.directory,
        mesh=prepared.mesh,
        layout=prepared.layout,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        progress=not config.quiet and writes(),
        quantize=config.quantize,
    )
    return model.with_adapters(start_adapter(config, model.config) if prepared.lora is None else prepared.lora)


def in_micro_batches(batch: Batch, accumulate: int) -> Batch:
    """[accumulate * B, T] -> [accumulate, B, T] of each array."""
    return Batch(*(array.reshape(accumulate, -1, array.shape[-1]) for array in batch))
