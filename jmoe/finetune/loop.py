"""The steps of a run: metrics, validation, checkpoints, and the reasons to stop."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jmoe.files import naming
from jmoe.finetune.batches import Batch
from jmoe.finetune.checkpoint import Checkpoints, Standing
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.display import Display
from jmoe.finetune.flops import PEAK, flops_per_token
from jmoe.finetune.metrics import Metrics, NoMetrics
from jmoe.finetune.processes import writes
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
    stop: whether the run shall stop after this step.
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
    stop: Callable[[], bool]


def run_steps(
    run: Run,
    state: TrainState,
    standing: Standing,
    checkpoints: Checkpoints,
    metrics: Metrics | NoMetrics,
    display: Display,
) -> tuple[TrainState, Standing, Ending]:
    """Goes on from `standing` to the end: (the last state, where it stands, why it ended).

    A step that begins is finished: where the run shall stop, it does so after it, with a checkpoint. A validation that
    has begun is not finished then; a run that goes on begins with it.

    Raises:
      NonFiniteLossError: a loss or gradient is not finite. The factors before it are saved as a checkpoint, and the
        batch as nonfinite_step_N.npz; where the validation's loss is not, nothing is.
      OSError: a file, which is named, cannot be written, as on a full disk.
    """
    rate = learning_rate(run.config, run.steps)
    standing, stopped = validate_before(run, state, standing, metrics, display)
    if stopped or (run.stop() and standing.step < run.steps):
        return state, standing, "interrupted"
    if stops_early(run, standing) and standing.step < run.steps:  # it did before
        return state, standing, "early stop"
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
        figures: dict[str, Any] = {
            "loss": loss,
            "gradient_norm": float(outcome.gradient_norm),
            "learning_rate": float(rate(standing.step)),
            "tokens": int(outcome.tokens),
            **speed(run, batch, seconds),
        }
        standing = dataclasses.replace(standing, step=standing.step + 1)
        last = standing.step == run.steps
        if run.validation and (standing.step % run.config.validate_every == 0 or last):
            standing, validated = validate(run, state, standing)
            figures |= validated
        metrics.write(standing.step, figures)
        display.show(standing.step, figures)
        early = stops_early(run, standing)
        stop = run.stop()
        # An adapter that was saved is not to stand without a checkpoint: a run could not go on from it.
        first_adapter = standing.best_loss is not None and not checkpoints.holds()
        if last or early or stop or first_adapter or standing.step % run.config.checkpoint_every == 0:
            checkpoints.save(state, standing)
        if early and not last:
            return state, standing, "early stop"
        if standing.validation_due or (stop and not last):
            return state, standing, "interrupted"
    return state, standing, "finished"


def validate_before(
    run: Run, state: TrainState, standing: Standing, metrics: Metrics | NoMetrics, display: Display
) -> tuple[Standing, bool]:
    """(where the run stands, whether it shall stop) after the validation before its first step, or one that was due."""
    figures: dict[str, Any] = {}
    if run.validation and standing.step == 0:
        loss = finite_validation_loss(run, state, 0)
        if loss is None:
            return standing, True
        figures = {"validation_loss": loss}
        metrics.write(0, figures)
    elif run.validation and standing.validation_due:
        standing, figures = validate(run, state, standing)
        if standing.validation_due:
            return standing, True
        metrics.add(standing.step, figures)
    if figures:
        display.show(standing.step, figures)
    return standing, False


def stops_early(run: Run, standing: Standing) -> bool:
    """Whether so many validations as the run's patience were no better."""
    return 0 < run.config.patience <= standing.since_best


def validate(run: Run, state: TrainState, standing: Standing) -> tuple[Standing, dict[str, Any]]:
    """(where the run stands, the validation's loss as a figure); a better adapter is saved.

    Where the run shall stop meanwhile, the validation stays due and there is no figure.
    """
    loss = finite_validation_loss(run, state, standing.step)
    if loss is None:
        return dataclasses.replace(standing, validation_due=True), {}
    if standing.best_loss is None or loss < standing.best_loss:
        run.save_adapter(state)
        standing = dataclasses.replace(standing, best_loss=loss, since_best=0, validation_due=False)
    else:
        standing = dataclasses.replace(standing, since_best=standing.since_best + 1, validation_due=False)
    return standing, {"validation_loss": loss}


def validation_loss(trainer: Trainer, state: TrainState, validation: Sequence[Batch]) -> float:
    """Mean over the validation's trained tokens."""
    loss = stoppable_validation_loss(trainer, state, validation, lambda: False)
    assert loss is not None
    return loss


def stoppable_validation_loss(
    trainer: Trainer, state: TrainState, validation: Sequence[Batch], stop: Callable[[], bool]
) -> float | None:
    """Mean over the validation's trained tokens, or None if `stop` says before some batch that it shall end."""
    losses: list[float] = []
    for batch in validation:
        if stop():
            return None
        losses.append(float(trainer.loss(state, batch)))
    return sum(losses) / sum(float(batch.weights.sum()) for batch in validation)


def finite_validation_loss(run: Run, state: TrainState, step: int) -> float | None:
    """The run's validation loss, or None if the run shall stop before it is known.

    Raises:
      NonFiniteLossError: it is not finite.
    """
    loss = stoppable_validation_loss(run.trainer, state, run.validation, run.stop)
    if loss is not None and not math.isfinite(loss):
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
    if writes():
        with naming(file):
            np.savez(
                file, tokens=batch.tokens, targets=batch.targets, weights=batch.weights, segment_ids=batch.segment_ids
            )
    checkpoints.save(state, standing)
    raise NonFiniteLossError(
        f"step {standing.step + 1}: loss {loss}, norm of the gradient {norm}. Its batch is in {file}, and the factors "
        f"before it are checkpoint {standing.step} of {checkpoints.directory}"
    )


def speed(run: Run, batch: Batch, seconds: float) -> dict[str, float]:
    """Tokens a second, padding included; on a GPU MFU, and the most memory held so far by one of this process's."""
    rate = batch.tokens.size / seconds
    device = jax.local_devices()[0]
    figures = {"seconds": seconds, "tokens_per_second": rate}
    if device.device_kind in PEAK:
        config, on_mesh = run.trainer.config, run.trainer.on_mesh
        peak = PEAK[device.device_kind] * (1 if on_mesh is None else on_mesh.mesh.size)
        figures["mfu"] = rate * flops_per_token(config, run.config.length) / peak
    memory = device.memory_stats()
    if memory and math.isfinite(most := memory.get("peak_bytes_in_use", math.nan)):
        figures["memory_gib"] = most / 2**30
    return figures
