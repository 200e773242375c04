"""Listening, loading, answering, and ending: the life of a server."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn

from jmoe.serve.app import State, create_app
from jmoe.serve.connection import connection_class
from jmoe.serve.service import Service
from jmoe.serve.settings import Settings

SAME_SECONDS = 1.0
"""Later signals within this time are the same wish: `timeout` sends one to the process and one to its group."""

SWITCH_SECONDS = 0.0005
"""After which one of Python's threads lets another run that waits: the engine's, which a device waits for."""

type Load = Callable[[asyncio.AbstractEventLoop], Service]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is one that is free.

    Raises:
      OSError: it cannot; the address is named.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


def serve(settings: Settings, load: Load, say: Callable[[str], None]) -> int:
    """Serves until a signal ends it; returns the process's exit status.

    It listens at once, and says 503 until the model is there. SIGTERM and Ctrl-C let it answer what it has and end; a
    second one ends it at once.

    Args:
      load: makes what is served, in a thread of its own.
      say: told in a line what happens.

    Raises:
      OSError: it cannot listen.
      Exception: what load raises.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.basicConfig(format="jmoe: %(message)s", level=logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what clients do wrong is told to them
    state = State()
    listening = listen(settings.host, settings.port)
    server = Server(settings, state, load, say)
    host, port = listening.getsockname()[:2]
    say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, loading the model")
    wakes = signal.set_wakeup_fd(-1) if threading.current_thread() is threading.main_thread() else None
    try:
        asyncio.run(server.serve([listening]), loop_factory=server.config.get_loop_factory())
    finally:
        if wakes is not None:
            signal.set_wakeup_fd(wakes)
        if state.service is not None:
            state.service.engine.stop()
            state.service.close()
    if server.error is not None:
        raise server.error
    return server.status


class Server(uvicorn.Server):
    """uvicorn's, that loads what it serves, and answers what it has before it ends.

    Attributes:
      error: what loading raised.
      status: the process's exit status.
    """

    def __init__(self, settings: Settings, state: State, load: Load, say: Callable[[str], None]) -> None:
        """A server that has not begun."""
        super().__init__(
            uvicorn.Config(
                create_app(settings, state),
                http=connection_class(settings.timeouts.head),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=round(settings.timeouts.keep_alive),
            )
        )
        self.error: BaseException | None = None
        self.status = 0
        self._state = state
        self._load = load
        self._say = say
        self._signalled: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and begins to load."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        threading.Thread(target=self._load_here, name="load", daemon=True).start()

    def _load_here(self) -> None:
        try:
            service = self._load(self._loop)
        except BaseException as error:
            self.error = error
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._be_ready, service)

    def _be_ready(self, service: Service) -> None:
        self._state.service = service
        names = ", ".join([*service.model.names, *service.engine.adapters()])
        self._say(f"ready: {names}, {service.model.max_model_len} tokens at most")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal that asks for an end."""
        now = time.monotonic()
        name = signal.Signals(sig).name
        if self._state.service is None:
            self._say(f"{name}: ended before the model was loaded")
            os._exit(128 + sig)  # whatever is being loaded or compiled
        if self._signalled is None:
            self._signalled = now
            self._say(f"{name}: answering what there is; once more to end at once")
            self._loop.call_soon_threadsafe(self._begin, self._drain)
        elif now - self._signalled >= SAME_SECONDS:
            self.status = 128 + sig
            self.force_exit = self.should_exit = True
            self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        """Ends all connections, which cancels what they wait for."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]

    def _begin(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.ensure_future(work())
        self._tasks.add(task)  # type: ignore[arg-type]

    async def _drain(self) -> None:
        """Ends once all answers have."""
        self._state.draining = True
        assert self._state.service is not None
        while self._state.service.metrics.answers:
            await asyncio.sleep(0.02)
        self.should_exit = True
