"""The connection of a run's processes: they find each other, and each hears when another ends."""

import atexit
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from jmoe.__main__ import INTERRUPTED
from jmoe.errors import first_line

LOST_SECONDS = 30.0
"""A process that has not been heard for so long is taken for dead."""

BEAT_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""After another process has ended in which this one may still end with an error of its own, which says more."""

ALIVE, ENDED = "jmoe/alive/", "jmoe/ended/"


@dataclasses.dataclass(frozen=True)
class Connection:
    """How the processes of a run find each other. What is None JAX finds: under Slurm, MPI and Kubernetes, all of it.

    coordinator: host and port at which process 0 listens.
    process: the number of this one, from 0.
    processes: how many there are.

    Raises:
      ValueError: a number is out of range, or some are given where one of them needs the others.
    """

    coordinator: str | None = None
    process: int | None = None
    processes: int | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.coordinator, self.process, self.processes)]
        if any(given) and not all(given):
            raise ValueError("--coordinator HOST:PORT, --process N and --processes M go together")
        if self.coordinator is not None and self.process is not None and self.processes is not None:
            host, colon, port = self.coordinator.rpartition(":")
            if not colon or not host or not port.isdecimal():
                raise ValueError(f"--coordinator must be a host and a port as host:1234, got {self.coordinator!r}")
            if not 0 <= self.process < self.processes:
                raise ValueError(f"--process must be in [0, {self.processes}), got {self.process}")


@contextmanager
def connected(connection: Connection) -> Iterator[None]:
    """Within it this process is one of a run's; to be entered before JAX has seen a device.

    Where another process ends before its run does, this one ends too, with a line that says so and status 1.

    Raises:
      ValueError: JAX cannot find out where the others are.
      OSError: they cannot be reached.
    """
    try:
        jax.distributed.initialize(connection.coordinator, connection.processes, connection.process)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"JAX finds no other processes ({first_line(error)}): start this under Slurm, MPI or Kubernetes, or give "
            "--coordinator HOST:PORT --process N --processes M"
        ) from error
    except RuntimeError as error:
        raise OSError(f"the other processes cannot be reached: {first_line(error)}") from error
    watch = Watch(jax.process_index(), jax.process_count(), end_process)
    watch.start()
    try:
        yield
    except BaseException as error:
        out_of_memory = "RESOURCE_EXHAUSTED" in str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and not out_of_memory:
            time.sleep(LOST_SECONDS + GRACE_SECONDS)  # of another that ended, most likely: the watch will say so
        watch.leave(first_line(error) if isinstance(error, Exception) else "interrupted")
        # After what is wrong has been said. JAX's own end would wait for the other processes, which wait for this one.
        atexit.register(watch.end_after_others, 1 if isinstance(error, Exception) else INTERRUPTED)
        raise
    watch.leave("")
    jax.distributed.shutdown()


def end_process(status: int) -> None:
    """Ends the process without a word to anything else."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Watch:
    """Says that this process lives, by a thread, and ends it when another does not."""

    def __init__(self, process: int, processes: int, end: Callable[[int], None]) -> None:
        """Of one of so many processes. end: called with the exit status when another has ended; does not return."""
        # What JAX's own services keep their state in; it has no public name.
        from jax._src.distributed import global_state

        self._store: Any = global_state.client
        self._process = process
        self._processes = processes
        self._end = end
        self._left = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begins."""
        threading.Thread(target=self._watch, name="processes", daemon=True).start()

    def leave(self, reason: str) -> None:
        """Tells the others that this process ends, and why; an empty reason: its work is done."""
        with self._lock:
            self._left.set()
            self._tell(reason)

    def end_after_others(self, status: int, dead: int | None = None) -> None:
        """Ends the process; the first once the others have ended, since what they are told is kept by it.

        dead: the number of one that will not say that it has.
        """
        deadline = time.monotonic() + 3 * GRACE_SECONDS
        with suppress(Exception):  # a store that does not answer tells nobody anything
            while self._process == 0 and time.monotonic() < deadline:
                if len({dead, *numbered(self._store.key_value_dir_get(ENDED))} - {None}) == self._processes:
                    break
                time.sleep(BEAT_SECONDS)
        self._end(status)

    def _tell(self, reason: str) -> None:
        with suppress(Exception):  # the store is process 0's, which may have ended
            self._store.key_value_set(f"{ENDED}{self._process}", f"{socket.gethostname()}\n{reason}")

    def _watch(self) -> None:
        heard = dict.fromkeys(range(self._processes), ("", time.monotonic()))
        beats, answered = 0, time.monotonic()
        while not self._left.wait(BEAT_SECONDS):
            beats += 1
            now = time.monotonic()
            try:
                self._store.key_value_set(f"{ALIVE}{self._process}", str(beats), allow_overwrite=True)
                alive = numbered(self._store.key_value_dir_get(ALIVE))
                ended = numbered(self._store.key_value_dir_get(ENDED))
            except Exception:
                if now - answered > GRACE_SECONDS:
                    return self._say(0, "it does not answer")
                continue
            answered = now
            for process in range(self._processes):
                beat, since = heard[process]
                if process in ended:
                    host, _, reason = ended[process].partition("\n")
                    if reason:
                        self._left.wait(GRACE_SECONDS)
                        return self._say(process, f"on {host}: {reason}")
                elif alive.get(process, "") != beat:
                    heard[process] = alive[process], now
                elif now - since > LOST_SECONDS:
                    return self._say(process, f"it has not been heard for {LOST_SECONDS:.0f} s")
        return None

    def _say(self, process: int, reason: str) -> None:
        with self._lock:
            if self._left.is_set():
                return
            line = f"process {process} of {self._processes} has ended, {reason}"
            print(f"jmoe: {line}; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
            self._tell(line)
            self.end_after_others(1, dead=process)


def numbered(entries: list[tuple[str, str]]) -> dict[int, str]:
    """The store's entries by the number that each name ends in."""
    return {int(name.rpartition("/")[2]): value for name, value in entries}
