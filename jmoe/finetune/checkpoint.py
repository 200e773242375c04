"""Checkpoints of a run: what a step changes and where the run stands, whole or not at all, by orbax."""

import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from jmoe.errors import first_line
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.same_run import changed_options
from jmoe.finetune.step import TrainState


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stands beside its arrays. Batches follow from seed and step, so the step is the data's position.

    best_loss: lowest validation loss so far, or None.
    since_best: validations since then.
    validation_due: whether the run was stopped in the validation after this step.
    steps: of the optimizer that the run was to take in all; None if a checkpoint does not say so.
    """

    step: int = 0
    best_loss: float | None = None
    since_best: int = 0
    validation_due: bool = False
    steps: int | None = None


class Checkpoints:
    """The checkpoints in a directory; closed at the end of a `with`."""

    def __init__(self, directory: Path, config: FinetuneConfig, data: str) -> None:
        """Opens the directory, which is made if it is not there.

        data: the digest of what the run trains and validates on, see jmoe.finetune.batches.digest.
        """
        self.directory = directory.absolute()
        self.config = config
        self.data = data
        self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.manager.close()

    def save(self, state: TrainState, standing: Standing) -> None:
        """Writes a checkpoint of this step, unless it is there.

        Raises:
          OSError: it cannot be written, as when the disk has no room for it; those before it stay.
        """
        if self.holds(standing.step):
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < 1.1 * needed:
            raise OSError(f"no room for a checkpoint of {needed:,} bytes in {self.directory}: {free:,} are free")
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
            run=ocp.args.JsonSave(  # type: ignore[call-arg]
                {"standing": dataclasses.asdict(standing), "config": dataclasses.asdict(self.config), "data": self.data}
            ),
        )
        try:
            with errors_raised_alone():
                self.manager.save(standing.step, args=items)
                self.manager.wait_until_finished()
        except jax.errors.JaxRuntimeError:  # of the device
            raise
        except Exception as error:  # OSError and others, by which part could not be written
            raise OSError(
                f"checkpoint {standing.step} could not be written to {self.directory}: {first_line(error)}; those "
                "before it stay"
            ) from error

    def holds(self, *steps: int) -> bool:
        """Whether there is a checkpoint of this step, or of any if none is given."""
        return bool(set(steps) & set(self.manager.all_steps())) if steps else bool(self.manager.all_steps())

    def standing(self) -> Standing:
        """Where the run of the newest checkpoint stands, or a beginning if there is none.

        Raises:
          ValueError: the checkpoint is of a run with other options, which are named, or on other data; it is damaged.
        """
        step = self.manager.latest_step()
        if step is None:
            return Standing()
        run = self._read(step, run=ocp.args.JsonRestore())["run"]  # type: ignore[call-arg]
        try:
            config, data = run["config"], run["data"]
            standing = Standing(**{"steps": config.get("steps"), **run["standing"]})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.directory / str(step)} is not a checkpoint of a run: {first_line(error)}"
            ) from error
        if changed := changed_options(config, self.config):
            listed = ", ".join(changed)
            raise ValueError(f"{self.directory} holds a run with other options ({listed}): choose another --out")
        if data != self.data:
            raise ValueError(
                f"{self.directory} holds a run on other data: rows of the training or validation file, or the "
                "tokenizer, have changed since; choose another --out"
            )
        return standing

    def restore(self, state: TrainState) -> tuple[TrainState, Standing]:
        """The newest checkpoint, or (state, a beginning) if there is none.

        Args:
          state: of the same shapes, which says where the arrays go.

        Raises:
          ValueError: the checkpoint is of a run with other options, which are named, or on other data; it is damaged.
        """
        standing = self.standing()
        if not standing.step:
            return state, standing
        return self._read(standing.step, state=ocp.args.StandardRestore(state))["state"], standing  # type: ignore[call-arg]

    def _read(self, step: int, **items: Any) -> Any:
        """These items of a checkpoint. Raises ValueError if orbax cannot read them."""
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:  # of the device, as when its memory runs out
            raise
        except Exception as error:  # KeyError, OSError, ValueError and others, by what is damaged
            older = len(self.manager.all_steps()) > 1
            remedy = "without it the run goes on from the one before" if older else "choose another --out"
            raise ValueError(f"{self.directory / str(step)} cannot be read: {first_line(error)}; {remedy}") from error


@contextmanager
def errors_raised_alone() -> Iterator[None]:
    """Within it what orbax and tensorstore raise is not also printed with its traceback from their threads.

    After an error tensorstore goes on to tell orbax's event loop, which is closed: that stays unprinted.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def all_but_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = all_but_closed_loops
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)
