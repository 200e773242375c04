"""What the processes of one run do together: one writes, all agree. Of one process alone each of these is nothing."""

import datetime
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jmoe.finetune.stopping import Stop

LONGEST_WAIT = 24 * 3600
"""Seconds that processes wait for each other; where one dies meanwhile, jmoe.finetune.connection ends the others."""


def several() -> bool:
    """Whether there are several; found without a look at the devices, which one process alone need not have yet."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def writes() -> bool:
    """Whether this process writes metrics and adapters, and says what happens: the first."""
    return not several() or jax.process_index() == 0


_waits = itertools.count()


def wait_for_all() -> None:
    """Returns once every process is here, as often as it was before; however long the others take."""
    if several():
        from jax._src.distributed import global_state  # has no public name

        client: Any = global_state.client
        client.wait_at_barrier(f"jmoe/wait/{next(_waits)}", LONGEST_WAIT * 1000)


def compiled_by_all(jitted: Any) -> Callable[..., Any]:
    """The jitted function, whose program no process runs before all have compiled it.

    One that waits within a program for another that still compiles gives up, on CPUs after 30 seconds.

    jitted: of positional arguments that are arrays, and of keyword arguments that are static.
    """
    programs: dict[Any, Any] = {}

    def call(*arguments: Any, **static: Any) -> Any:
        if not several():
            return jitted(*arguments, **static)
        leaves, tree = jax.tree.flatten(arguments)
        key = tree, *((leaf.shape, leaf.dtype) for leaf in leaves), *static.items()
        if key not in programs:
            programs[key] = jitted.lower(*arguments, **static).compile()
            wait_for_all()
        return programs[key](*arguments)

    return call


def first_day(day: datetime.date) -> datetime.date:
    """The first process's day, to which chat templates may refer."""
    if not several():
        return day
    wait_for_all()
    return datetime.date.fromordinal(int(multihost_utils.broadcast_one_to_all(np.int32(day.toordinal()))))


def check_alike(out: Path, **texts: str) -> None:
    """Checks that all processes have the same of each of these, by name.

    Raises:
      ValueError: one has another than the first, which is named; all processes raise it.
    """
    if not several():
        return
    digests = [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in texts.values()]
    wait_for_all()
    found = np.asarray(multihost_utils.process_allgather(np.stack(digests)))
    different = np.argwhere((found != found[0]).any(axis=-1)).tolist()
    if different:
        process, place = different[0]
        raise ValueError(
            f"all processes of a run must have the same {list(texts)[place]}, and process {process} has another than "
            f"process 0: they take the same options, read the same data, and share {out}"
        )


def first_says(answer: bool) -> bool:
    """Process 0's answer, in all of them."""
    if not several():
        return answer
    wait_for_all()
    return bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


class AgreedStop:
    """Whether somebody asked one of the processes to stop; all ask at the same places, and hear the same."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self) -> bool:
        """Whether to stop; then `stop` has a signal in every process."""
        if several():
            signals = multihost_utils.process_allgather(np.int32(self._stop.signal or 0))
            self._stop.signal = self._stop.signal or int(np.max(signals)) or None
        return self._stop()
