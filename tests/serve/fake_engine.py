"""An engine without a model: scripted tokens, one a step for each running request, on a thread of its own."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from jmoe.serve.engine import (
    Cancelled,
    EngineStats,
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    NameTakenError,
    NoPlaceError,
    PromptLogprobs,
    PromptToken,
    QueueFullError,
    Request,
    Token,
    TooLongError,
    UnknownAdapterError,
)

LOGPROB = -0.5
"""Of each token; the others of `top` have less."""


class FakeEngine:
    """Gives what `script` says of each request, then its own end if it is not at its limit.

    Attributes:
      going: steps are made while it is set.
      requests: all that were ever taken.
    """

    def __init__(
        self,
        script: Callable[[Request], Sequence[int]],
        *,
        stop_tokens: Sequence[int] = (),
        adapters: Sequence[str] = ("tuned",),
        places: int = 2,
        max_sequences: int = 8,
        queue_limit: int = 8,
        max_model_len: int = 200,
        step_seconds: float = 0.0,
    ) -> None:
        self.script = script
        self.going = threading.Event()
        self.going.set()
        self.requests: list[Request] = []
        self.fails: str | None = None
        self.cached: Callable[[Request], int] = lambda request: 0
        self._stop_tokens = set(stop_tokens)
        self._adapters = list(adapters)
        self._places, self._max_sequences, self.queue_limit = places, max_sequences, queue_limit
        self._max_model_len, self.step_seconds = max_model_len, step_seconds
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._cancelled: set[str] = set()
        self._lock = threading.Condition()
        self._new_tokens = self._prompt_tokens = 0
        self._stopped = self._draining = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        with self._lock:
            if self._stopped or self._draining:
                raise EngineStoppedError
            if request.adapter is not None and request.adapter not in self._adapters:
                raise UnknownAdapterError(request.adapter)
            if len(request.prompt) + request.sampling.max_tokens > self._max_model_len:
                raise TooLongError("too long")
            if len(self._waiting) >= self.queue_limit:
                raise QueueFullError
            assert request.id not in {row.request.id for row in (*self._waiting, *self._running)}
            self.requests.append(request)
            self._waiting.append(_Row(request, on_event, deque(self.script(request))))
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self._cancelled.add(request_id)
            self._lock.notify()

    def load_adapter(self, name: str, weights: Any) -> None:
        if name in self._adapters:
            raise NameTakenError(f"{name} is taken")
        if len(self._adapters) >= self._places:
            raise NoPlaceError("all places are taken")
        self._adapters.append(name)

    def unload_adapter(self, name: str) -> None:
        if name not in self._adapters:
            raise UnknownAdapterError(name)
        self._adapters.remove(name)

    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def stats(self) -> EngineStats:
        return EngineStats(
            queued=len(self._waiting),
            running=len(self._running),
            pages_total=100,
            pages_free=100 - len(self._running),
            cached_pages=0,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=0,
            new_tokens=self._new_tokens,
            preemptions=0,
            compiled_programs=3,
            max_model_len=self._max_model_len,
        )

    def reset(self, script: Callable[[Request], Sequence[int]]) -> None:
        """As it was at first, with another script."""
        self.script, self.fails, self._adapters = script, None, ["tuned"]
        self.cached = lambda request: 0
        self.step_seconds = 0.0
        self.requests.clear()

    @property
    def takes_requests(self) -> bool:
        return not (self._stopped or self._draining)

    def drain(self, timeout: float | None = None) -> bool:
        self._draining = True
        return self.is_empty(timeout or 60)

    def is_empty(self, seconds: float) -> bool:
        """Whether all requests end within this time."""
        end = time.monotonic() + seconds
        while self._waiting or self._running:
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        while True:
            self.going.wait()
            with self._lock:
                while not (self._waiting or self._running or self._stopped):
                    self._lock.wait()
                if self._stopped:
                    for row in (*self._waiting, *self._running):
                        row.on_event(Failed("the engine has stopped"))
                    return
                self._drop_cancelled()
                while self._waiting and len(self._running) < self._max_sequences:
                    self._running.append(self._waiting.popleft())
                    self._prompt_tokens += len(self._running[-1].request.prompt)
                rows = list(self._running)
            ended = [row for row in rows if self._step(row)]
            with self._lock:
                self._running = [row for row in self._running if row not in ended]
            if self.step_seconds:
                time.sleep(self.step_seconds)

    def _drop_cancelled(self) -> None:
        for rows in (self._waiting, self._running):
            for row in [row for row in rows if row.request.id in self._cancelled]:
                rows.remove(row)
                row.on_event(Cancelled())
        self._cancelled.clear()

    def _step(self, row: "_Row") -> bool:
        """One token; whether it was the last."""
        sampling = row.request.sampling
        if self.fails is not None:
            row.on_event(Failed(self.fails))
            return True
        if row.given == 0 and sampling.prompt_logprobs is not None:
            entries = [PromptToken(LOGPROB, self._top(token, sampling.prompt_logprobs)) for token in row.request.prompt]
            row.on_event(PromptLogprobs((None, *entries[1:])))
        if sampling.max_tokens == 0:
            row.on_event(row.finished("length", None, self.cached(row.request)))
            return True
        token = row.script.popleft() if row.script else min(self._stop_tokens, default=0)
        ends = set(sampling.stop_tokens) | (set() if sampling.ignore_eos else self._stop_tokens)
        if token in ends:
            row.on_event(row.finished("stop", token, self.cached(row.request)))
            return True
        row.given += 1
        self._new_tokens += 1
        given = (LOGPROB, self._top(token, sampling.logprobs)) if sampling.logprobs is not None else (None, ())
        row.on_event(Token(token, *given, cached_tokens=self.cached(row.request)))
        if row.given == sampling.max_tokens:
            row.on_event(row.finished("length", None, self.cached(row.request)))
            return True
        return False

    def _top(self, token: int, count: int) -> tuple[tuple[int, float], ...]:
        others = [other for other in range(10, 11 + count) if other != token]
        return tuple((each, LOGPROB - i) for i, each in enumerate([token, *others][:count]))


class _Row:
    """A request and what is left of its script."""

    def __init__(self, request: Request, on_event: Callable[[Event], None], script: deque[int]) -> None:
        self.request = request
        self.on_event = on_event
        self.script = script
        self.given = 0

    def finished(self, reason: Any, stop_token: int | None, cached: int) -> Finished:
        return Finished(
            reason=reason,
            stop_token=stop_token,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=cached,
            new_tokens=self.given,
        )
