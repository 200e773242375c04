"""From the engine's events to an answer of HTTP: one body, or a stream with a chunk a token."""

import abc
import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, Protocol

from pydantic_core import to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jmoe.serve.engine import (
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    QueueFullError,
    Request,
    TooLongError,
    UnknownAdapterError,
)
from jmoe.serve.errors import ApiError
from jmoe.serve.running import Running
from jmoe.serve.service import Service

DONE = b"data: [DONE]\n\n"


class Choice(Protocol):
    """One of a request's answers."""

    finish_reason: Any
    new_tokens: int
    cached_tokens: int


class Answer(abc.ABC):
    """What a request of HTTP is answered with, as it comes to be.

    Attributes:
      requests: what the engine is asked for, one for each choice.
      n: choices of each prompt, which stand side by side.
      kinds: what `object` says of a whole answer, and of a chunk.
    """

    kinds: tuple[str, str]

    def __init__(self, prefix: str, model: str, prompt_tokens: int, n: int, include_usage: bool) -> None:
        """n choices for each prompt, which are of so many tokens together."""
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.n = n
        self.include_usage = include_usage
        self.requests: list[Request] = []

    @property
    @abc.abstractmethod
    def choices(self) -> Sequence[Choice]:
        """The answers, one for each request."""

    @abc.abstractmethod
    def add(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Adds an event to a choice; returns the pieces of it that are new, as chunks have them."""

    @abc.abstractmethod
    def whole(self, index: int) -> dict[str, Any]:
        """The choice, all of it."""

    def body(self) -> dict[str, Any]:
        """The answer in JSON."""
        choices = [self.whole(i) for i in range(len(self.choices))]
        return {**self._head(self.kinds[0]), "choices": choices, "usage": self.usage()}

    def chunk(self, pieces: list[dict[str, Any]]) -> bytes:
        """A chunk of the stream."""
        return event_bytes({**self._head(self.kinds[1]), "choices": pieces})

    def last_chunks(self) -> bytes:
        """What a stream ends with: usage in a chunk whose choices are empty, where clients look for it."""
        if not self.include_usage:
            return DONE
        return event_bytes({**self._head(self.kinds[1]), "choices": [], "usage": self.usage()}) + DONE

    def usage(self) -> dict[str, Any]:
        """The numbers of tokens so far."""
        new = sum(choice.new_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens()},
        }

    def _cached_tokens(self) -> int:
        """Of the prompts' tokens, those computed before: choices of a prompt share what the first of them computes."""
        each = [choice.cached_tokens for choice in self.choices]
        return sum(min(each[i : i + self.n]) for i in range(0, len(each), self.n))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event_bytes(content: Any) -> bytes:
    """An event of a stream."""
    return b"data: " + to_json(content) + b"\n\n"


async def answer_http(http: HttpRequest, service: Service, answer: Answer, *, stream: bool) -> Response:
    """Has the engine answer.

    Raises:
      ApiError: the engine refuses the requests, or fails.
    """
    running = service.running()
    if stream:
        submit(running, answer)
        return EventStream(running, answer)
    async with running:
        submit(running, answer)
        await while_there(http.receive, gather(running, answer))
    return Response(to_json(answer.body()), media_type="application/json")


def submit(running: Running, answer: Answer) -> None:
    """Gives the engine the answer's requests.

    Raises:
      ApiError: it refuses them.
    """
    try:
        running.submit(answer.requests)
    except QueueFullError:
        raise ApiError.queue_full() from None
    except UnknownAdapterError:  # dropped since the request was read
        raise ApiError.unknown_model(answer.model) from None
    except EngineStoppedError:
        raise ApiError.unavailable("the server is stopping") from None
    except TooLongError as error:
        raise ApiError.invalid(None, str(error), "context_length_exceeded") from None
    except ValueError as error:
        raise ApiError.invalid(None, str(error)) from None


async def gather(running: Running, answer: Answer) -> None:
    """Takes all events.

    Raises:
      ApiError: the engine failed.
    """
    async for index, event in running.events():
        if isinstance(event, Failed):
            raise ApiError.failed(event.message)
        take(running, answer, index, event)


def take(running: Running, answer: Answer, index: int, event: Event) -> list[dict[str, Any]]:
    """Adds an event, and ends a request that has come to a string that ends it."""
    pieces = answer.add(index, event)
    if answer.choices[index].finish_reason is not None and not isinstance(event, Finished):
        running.end(index)
    return pieces


class EventStream(Response):
    """A stream of events of an answer whose requests the engine has already."""

    def __init__(self, running: Running, answer: Answer) -> None:
        """Takes the requests over: they end with the response, however it ends."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._running = running
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream, until its end or until nobody listens."""
        async with self._running:
            with contextlib.suppress(GoneError):
                await while_there(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for content in self._chunks():
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        async for index, event in self._running.events():
            if isinstance(event, Failed):
                yield event_bytes(ApiError.failed(event.message).body()) + DONE
                return
            for piece in take(self._running, self._answer, index, event):
                yield self._answer.chunk([piece])
        yield self._answer.last_chunks()


class GoneError(Exception):
    """The client has closed its connection."""


async def while_there[T](receive: Callable[[], Awaitable[Message]], work: Coroutine[Any, Any, T]) -> T:
    """The work's result; the work is cancelled as soon as the client goes.

    Raises:
      GoneError: it has gone.
    """

    async def gone() -> Literal["gone"]:
        while (await receive())["type"] != "http.disconnect":
            pass
        return "gone"

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
