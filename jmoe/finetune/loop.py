"""The steps of a run: metrics, validation, checkpoints, and the reasons to stop."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jmoe.finetune.batches import Batch
from jmoe.finetune.checkpoint import Checkpoints, Standing
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.display import Display
from jmoe.finetune.flops import PEAK, flops_per_token
from jmoe.finetune.metrics import Metrics
from jmoe.finetune.step import Outcome, Trainer, TrainState, learning_rate

type Ending = Literal["finished", "early stop", "interrupted"]


class NonFiniteLossError(ValueError):
    """A loss or a gradient is NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run goes through.

    batch: the batch of each step, numpy arrays [accumulate, batch_size, length].
    validation: batches of arrays [batch_size, length]; none: no validation.
    steps: of the optimizer in all.
    save_adapter: called with the state whose adapter is the best so far.
    before_step, after_step: called around each step, which uses its state up, with its number from 0.
    """

    config: FinetuneConfig
    trainer: Trainer
    batch: Callable[[int], Batch]
    validation: Sequence[Batch]
    steps: int
    out: Path
    save_adapter: Callable[[TrainState], None]
    before_step: Callable[[int, TrainState, Batch], None]
    after_step: Callable[[int, Outcome], None]


def run_steps(
    run: Run, state: TrainState, standing: Standing, checkpoints: Checkpoints, metrics: Metrics, display: Display
) -> tuple[TrainState, Standing, Ending]:
    """Goes on from `standing` to the end: (the last state, where it stands, why it ended).

    A step that begins is finished: Ctrl-C stops the run after it, with a checkpoint.

    Raises:
      NonFiniteLossError: a loss or gradient is not finite. The factors before it are saved as a checkpoint, and the
        batch as nonfinite_step_N.npz; where the validation's loss is not, nothing is.
      OSError: the disk is full.
    """
    rate = learning_rate(run.config, run.steps)
    if run.validation and standing.step == 0:
        figures: dict[str, Any] = {"validation_loss": finite_validation_loss(run, state, 0)}
        metrics.write(0, figures)
        display.show(0, figures)
    if stops_early(run, standing) and standing.step < run.steps:  # it did before
        return state, standing, "early stop"
    with interrupts() as interrupted:
        while standing.step < run.steps:
            batch = run.batch(standing.step)
            run.before_step(standing.step, state, batch)
            began = time.perf_counter()
            state, outcome = run.trainer.step(state, batch)
            loss = float(outcome.loss)
            seconds = time.perf_counter() - began
            if not bool(outcome.finite):
                stop_at(run, state, standing, checkpoints, batch, loss, float(outcome.gradient_norm))
            run.after_step(standing.step, outcome)
            figures = {
                "loss": loss,
                "gradient_norm": float(outcome.gradient_norm),
                "learning_rate": float(rate(standing.step)),
                "tokens": int(outcome.tokens),
                **speed(run, batch, seconds),
            }
            standing = dataclasses.replace(standing, step=standing.step + 1)
            last = standing.step == run.steps
            if run.validation and (standing.step % run.config.validate_every == 0 or last):
                standing, figures = validate(run, state, standing, figures)
            metrics.write(standing.step, figures)
            display.show(standing.step, figures)
            early = stops_early(run, standing)
            if last or early or interrupted() or standing.step % run.config.checkpoint_every == 0:
                checkpoints.save(state, standing)
            if early and not last:
                return state, standing, "early stop"
            if interrupted() and not last:
                return state, standing, "interrupted"
    return state, standing, "finished"


def stops_early(run: Run, standing: Standing) -> bool:
    """Whether so many validations as the run's patience were no better."""
    return 0 < run.config.patience <= standing.since_best


def validate(
    run: Run, state: TrainState, standing: Standing, figures: dict[str, Any]
) -> tuple[Standing, dict[str, Any]]:
    """(where the run stands, the figures) with the validation's loss; a better adapter is saved."""
    loss = finite_validation_loss(run, state, standing.step)
    if standing.best_loss is None or loss < standing.best_loss:
        run.save_adapter(state)
        standing = dataclasses.replace(standing, best_loss=loss, since_best=0)
    else:
        standing = dataclasses.replace(standing, since_best=standing.since_best + 1)
    return standing, {**figures, "validation_loss": loss}


def validation_loss(trainer: Trainer, state: TrainState, validation: Sequence[Batch]) -> float:
    """Mean over the validation's trained tokens."""
    losses = sum(float(trainer.loss(state, batch)) for batch in validation)
    return losses / sum(float(batch.weights.sum()) for batch in validation)


def finite_validation_loss(run: Run, state: TrainState, step: int) -> float:
    """The run's validation loss.

    Raises:
      NonFiniteLossError: it is not finite.
    """
    loss = validation_loss(run.trainer, state, run.validation)
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"step {step}: validation loss {loss}")
    return loss


def stop_at(
    run: Run,
    state: TrainState,
    standing: Standing,
    checkpoints: Checkpoints,
    batch: Batch,
    loss: float,
    norm: float,
) -> None:
    """Saves what shows the fault, and raises NonFiniteLossError."""
    file = run.out / f"nonfinite_step_{standing.step + 1}.npz"
    np.savez(file, tokens=batch.tokens, targets=batch.targets, weights=batch.weights, segment_ids=batch.segment_ids)
    checkpoints.save(state, standing)
    raise NonFiniteLossError(
        f"step {standing.step + 1}: loss {loss}, norm of the gradient {norm}. Its batch is in {file}, and the factors "
        f"before it are checkpoint {standing.step} of {checkpoints.directory}"
    )


def speed(run: Run, batch: Batch, seconds: float) -> dict[str, float]:
    """Tokens a second, padding included; on a GPU MFU and the most memory held so far."""
    rate = batch.tokens.size / seconds
    device = jax.devices()[0]
    figures = {"seconds": seconds, "tokens_per_second": rate}
    if device.device_kind in PEAK:
        config = run.trainer.config
        figures["mfu"] = rate * flops_per_token(config, run.config.length) / PEAK[device.device_kind]
    memory = device.memory_stats()
    if memory and math.isfinite(peak := memory.get("peak_bytes_in_use", math.nan)):
        figures["memory_gib"] = peak / 2**30
    return figures


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C is remembered instead of raised; a second one is raised. Yields whether there was one."""
    seen: list[int] = []

    def remember(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
