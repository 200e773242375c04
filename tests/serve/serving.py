"""A server in a thread on a free port of this machine, by an engine that is given."""

import asyncio
import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from jmoe.serve.app import State
from jmoe.serve.metrics import Metrics
from jmoe.serve.run import Server, listen
from jmoe.serve.service import ModelFacts, Service
from jmoe.serve.settings import Settings
from jmoe.text import load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
"""A tokenizer without channels, and its model."""

SECONDS = 60


class Serving:
    """A server that runs.

    Attributes:
      url: without a slash at its end.
    """

    def __init__(self, server: Server, state: State, port: int, settings: Settings) -> None:
        self.server = server
        self.state = state
        self.url = f"http://127.0.0.1:{port}"
        self.key = settings.api_keys[0] if settings.api_keys else None

    def client(self, **options: Any) -> httpx.Client:
        """A client with the server's key."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=SECONDS, **options)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def service_of(
    engine: Any, directory: Path, *, stop_tokens: tuple[int, ...], vocab_size: int, read_adapter: Any = None
) -> Callable[[asyncio.AbstractEventLoop], Service]:
    """What loads an engine that has started, beside the tokenizer of a directory."""
    tokenizers = [load_tokenizer(directory, datetime.date(2025, 8, 5)) for _ in range(2)]

    def load(loop: asyncio.AbstractEventLoop) -> Service:
        facts = ModelFacts(
            names=("base", "base-too"),
            root=str(directory),
            vocab_size=vocab_size,
            stop_tokens=stop_tokens,
            max_model_len=engine.stats().max_model_len,
        )
        metrics = Metrics()
        metrics.watch(engine.stats)
        return Service(engine, facts, *tokenizers, metrics, loop, read_adapter)

    return load


@contextlib.contextmanager
def serving(
    load: Callable[[asyncio.AbstractEventLoop], Service],
    settings: Settings | None = None,
    *,
    wait: bool = True,
    seconds: float = SECONDS,
) -> Iterator[Serving]:
    """A server that is ready, unless `wait` is off; it must end by itself, with nothing left in the engine."""
    settings = settings or Settings()
    listening = listen("127.0.0.1", 0)
    state = State()
    server = Server(settings, state, load, lambda line: None)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve([listening]), loop_factory=server.config.get_loop_factory())
    )
    thread.start()
    try:
        wait_until(
            lambda: server.error is not None or (server.started and (state.service is not None or not wait)),
            "the server is ready",
            seconds,
        )
        if server.error is not None:
            raise server.error
        yield Serving(server, state, listening.getsockname()[1], settings)
        if state.service is not None:
            wait_until(lambda: not state.service.metrics.answers, "all answers have ended")
    finally:
        server.should_exit = server.force_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()
        if state.service is not None:
            state.service.close()
