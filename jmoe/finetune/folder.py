"""The folder of a run: what may be in it before, and one run at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jmoe.finetune import metrics
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.same_run import changed_options

LOCK = ".lock"
OPTIONS = "finetune.json"
BEGUN = "begun.txt"
ADVICE = "choose another --out, or remove the folder if nothing in it is needed"


class FolderInUseError(ValueError):
    """Another run is going on in the folder."""


@contextmanager
def run_folder(config: FinetuneConfig) -> Iterator[Path]:
    """Yields config.out, made and locked: until the end of the `with`, or of the process, no other run may use it.

    Raises:
      ValueError: the folder holds what a run would overwrite, see check_folder.
      FolderInUseError: another run is going on there.
      OSError: the folder or its lock cannot be made.
    """
    out = Path(config.out)
    if not (out / LOCK).exists():  # a run that is going on there is the first thing to say
        check_folder(out, config)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FolderInUseError(
            f"another run is going on in {out}: wait until it ends, or choose another --out"
        ) from None
    try:
        check_folder(out, config)
        yield out
    finally:
        lock.release()


def check_folder(out: Path, config: FinetuneConfig) -> None:
    """Raises ValueError unless `out` is missing, empty or a run that can go on, or begin again without a loss.

    A run goes on from its checkpoints, which Checkpoints looks at. One that was stopped before the first of them begins
    again: by the same options, or by any if it had not taken a step.
    """
    if not out.is_dir():
        if out.exists() or out.is_symlink():
            raise ValueError(f"--out must be a folder, but {out} is something else: choose another --out")
        return
    names = sorted(file.name for file in out.iterdir() if file.name != LOCK)
    checkpoints = out / "checkpoints"
    unfinished = checkpoints.is_dir() and all(".orbax-checkpoint-tmp" in file.name for file in checkpoints.iterdir())
    if checkpoint_steps(out) or not names or (names == [checkpoints.name] and unfinished):
        return
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if OPTIONS not in names:
        raise ValueError(f"{out} holds no run that could go on, but {listed}: {ADVICE}")
    saved = read_options(out)
    step = max((row["step"] for row in metrics.read(out)), default=0)
    every = saved.get("checkpoint_every")
    kept = [name for name in ("adapter", "loss.png") if name in names]
    if kept or (isinstance(every, int) and step > every):
        held = " and ".join(kept) or f"{metrics.FILE} of {step} steps"
        raise ValueError(f"{out} holds {held} of a run whose checkpoints are gone, so that it cannot go on: {ADVICE}")
    changed = changed_options(saved, config)
    if changed and (step or BEGUN not in names):
        raise ValueError(f"{out} holds a run with other options ({', '.join(changed)}): {ADVICE}")


def checkpoint_steps(out: Path) -> list[int]:
    """The steps after which the run has a checkpoint."""
    return sorted(int(file.name) for file in (out / "checkpoints").glob("*") if file.name.isdecimal())


def read_options(out: Path) -> dict[str, Any]:
    """The options of the run in this folder. Raises ValueError if they cannot be read."""
    file = out / OPTIONS
    try:
        options = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{file} is not JSON ({error}), and there is not a checkpoint to go on from: {ADVICE}"
        ) from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} holds no options, and there is not a checkpoint to go on from: {ADVICE}")
    return options
