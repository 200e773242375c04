"""What other threads ask of the engine's."""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from jmoe.serve.engine.failures import GaveUpError
from jmoe.serve.engine.request import EngineStoppedError


@dataclasses.dataclass(frozen=True)
class Command:
    """Work for the engine's thread, and who waits for it.

    may_fail: its error, if it is no GaveUpError, concerns nobody but who waits; else it ends the engine.
    """

    work: Callable[[], None]
    may_fail: bool
    done: Future[None] = dataclasses.field(default_factory=Future)


class Commands:
    """Commands in their order; the engine's lock, which `changed` is, guards them."""

    def __init__(self, changed: threading.Condition) -> None:
        """None yet."""
        self._changed = changed
        self._waiting: deque[Command] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, work: Callable[[], None], *, may_fail: bool = False) -> Future[None]:
        """Has the engine's thread do this between two steps; the lock must be held."""
        command = Command(work, may_fail)
        self._waiting.append(command)
        self._changed.notify_all()
        return command.done

    def obey(self, count: int) -> None:
        """Does so many of them, without the lock.

        Raises:
          BaseException: of one that may not fail; those after it still wait.
        """
        for _ in range(count):
            with self._changed:
                command = self._waiting.popleft()
            try:
                command.work()
            except BaseException as error:
                command.done.set_exception(error)
                if not command.may_fail or isinstance(error, GaveUpError) or not isinstance(error, Exception):
                    raise
            else:
                command.done.set_result(None)

    def refuse(self, message: str) -> None:
        """Does none of those that wait; the lock must be held."""
        for command in self._waiting:
            command.done.set_exception(EngineStoppedError(message))
        self._waiting.clear()
