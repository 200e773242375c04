"""Checkpoints of a run: what a step changes and where the run stands, whole or not at all, by orbax."""

import dataclasses
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.step import TrainState


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stands beside its arrays. Batches follow from seed and step, so the step is the data's position.

    best_loss: lowest validation loss so far, or None.
    since_best: validations since then.
    """

    step: int = 0
    best_loss: float | None = None
    since_best: int = 0


class Checkpoints:
    """The checkpoints in a directory; closed at the end of a `with`."""

    def __init__(self, directory: Path, config: FinetuneConfig, data: str) -> None:
        """Opens the directory, which is made if it is not there.

        data: the digest of what the run trains and validates on, see jmoe.finetune.batches.digest.
        """
        self.directory = directory.absolute()
        self.config = dataclasses.asdict(config)
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
          OSError: the disk has no room for it; those before it stay.
        """
        if standing.step in self.manager.all_steps():
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < 1.1 * needed:
            raise OSError(f"no room for a checkpoint of {needed:,} bytes in {self.directory}: {free:,} are free")
        self.manager.save(
            standing.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
                run=ocp.args.JsonSave(  # type: ignore[call-arg]
                    {"standing": dataclasses.asdict(standing), "config": self.config, "data": self.data}
                ),
            ),
        )
        self.manager.wait_until_finished()

    def restore(self, state: TrainState) -> tuple[TrainState, Standing]:
        """The newest checkpoint, or (state, a beginning) if there is none.

        Args:
          state: of the same shapes, which says where the arrays go.

        Raises:
          ValueError: the checkpoint is of a run with other options, which are named, or on other data; it is damaged.
        """
        step = self.manager.latest_step()
        if step is None:
            return state, Standing()
        run = self._read(step, run=ocp.args.JsonRestore())["run"]  # type: ignore[call-arg]
        self._check_config(run["config"])
        if run.get("data") != self.data:
            raise ValueError(
                f"{self.directory} holds a run on other data: rows of the training or validation file, or the "
                "tokenizer, have changed since; choose another --out"
            )
        saved = self._read(step, state=ocp.args.StandardRestore(state))["state"]  # type: ignore[call-arg]
        return saved, Standing(**run["standing"])

    def _read(self, step: int, **items: Any) -> Any:
        """These items of a checkpoint. Raises ValueError if orbax cannot read them."""
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:  # of the device, as when its memory runs out
            raise
        except Exception as error:  # KeyError, OSError, ValueError and others, by what is damaged
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.directory / str(step)} cannot be read: {first}; without it the run goes on from the one before"
            ) from error

    def _check_config(self, saved: dict[str, Any]) -> None:
        """Raises ValueError unless the options that decide what is computed are the same."""
        free = {"out", "keep", "checkpoint_every"}
        names = sorted({*saved, *self.config} - free)
        changed = [name for name in names if saved.get(name) != self.config.get(name)]
        if changed:
            listed = ", ".join(f"{name} was {saved.get(name)!r}, is {self.config.get(name)!r}" for name in changed)
            raise ValueError(f"{self.directory} holds a run with other options ({listed}): choose another --out")
