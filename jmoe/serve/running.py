"""The engine's events, which come on its thread, in the event loop; what goes away is cancelled."""

import asyncio
import functools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from jmoe.serve.engine import Engine, Event, Failed, Finished, Request
from jmoe.serve.metrics import Metrics, RequestTimes


class Bridge:
    """Calls from the engine's thread to the event loop: one wake-up for all that come at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Has the loop call the function; from any thread."""
        self._calls.append((function, arguments))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._run)
            except RuntimeError:  # the loop has ended, and nobody waits any more
                self._calls.clear()

    def _run(self) -> None:
        self._woken = False  # before the calls are taken, so that none comes too late for them and wakes nobody
        while self._calls:
            function, arguments = self._calls.popleft()
            function(*arguments)


class Running:
    """The engine's requests of one request of HTTP, within `async with`.

    Whatever ends the block, nothing of it is left in the engine.
    """

    def __init__(self, engine: Engine, bridge: Bridge, metrics: Metrics) -> None:
        """Nothing yet."""
        self._engine = engine
        self._bridge = bridge
        self._metrics = metrics
        self._open: dict[int, str] = {}
        self._times: dict[int, RequestTimes] = {}
        self._events: deque[tuple[int, Event]] = deque()
        self._came = asyncio.Event()

    def submit(self, requests: Sequence[Request]) -> None:
        """Gives the engine these requests, which events count from 0; all of them or none.

        Raises:
          QueueFullError, TooLongError and others: as the engine's submit.
        """
        try:
            for i, request in enumerate(requests):
                self._open[i] = request.id
                self._times[i] = self._metrics.begin()
                self._engine.submit(request, functools.partial(self._bridge.call, self._put, i))
        except BaseException:
            del self._open[i]
            self.close()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(the request's number, its event) until each has finished, failed or been ended."""
        while self._open:
            if not self._events:
                self._came.clear()
                await self._came.wait()
            while self._events:
                i, event = self._events.popleft()
                if i in self._open:
                    if isinstance(event, Finished | Failed):
                        del self._open[i]
                        self._metrics.end(self._times[i], event)
                    yield i, event

    def end(self, number: int) -> None:
        """Ends a request that has come to a string that ends it."""
        self._engine.cancel(self._open.pop(number))
        self._metrics.end(self._times[number], None)

    def close(self) -> None:
        """Cancels what is still open."""
        for number, name in self._open.items():
            self._engine.cancel(name)
            self._metrics.cancelled(self._times[number])
        self._open.clear()
        self._came.set()

    def _put(self, number: int, event: Event) -> None:
        self._times[number].note(event)
        self._events.append((number, event))
        self._came.set()

    async def __aenter__(self) -> Self:
        """Itself."""
        self._metrics.answers += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves nothing in the engine."""
        self._metrics.answers -= 1
        self.close()
