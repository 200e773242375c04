"""The paths of the server, and what stands in front of them."""

import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from jmoe.serve import adapters, page
from jmoe.serve.answering import GoneError, answer_http
from jmoe.serve.bodies import read_body
from jmoe.serve.chat import chat_completion
from jmoe.serve.completions import completion
from jmoe.serve.errors import ApiError
from jmoe.serve.models import model_card, model_cards
from jmoe.serve.protocol.chat import ChatRequest
from jmoe.serve.protocol.completions import CompletionRequest
from jmoe.serve.protocol.others import DetokenizeRequest, LoadAdapterRequest, TokenizeRequest, UnloadAdapterRequest
from jmoe.serve.security import Keys, KnownPlaces, SlowReaders
from jmoe.serve.service import Service
from jmoe.serve.settings import Settings
from jmoe.serve.tokenization import detokenize, tokenize

CLIENT_CLOSED_REQUEST = 499
"""nginx's status of an answer that nobody waits for."""

logger = logging.getLogger("jmoe.serve")


class State:
    """Whether the server takes requests.

    Attributes:
      service: None until the engine is ready.
      draining: requests that are there are answered, and no others.
    """

    def __init__(self) -> None:
        self.service: Service | None = None
        self.draining = False

    def taking(self) -> Service:
        """The service.

        Raises:
          ApiError: 503, it is not ready, or takes no more requests.
        """
        if self.service is None:
            raise ApiError.unavailable("the model is being loaded")
        if self.draining:
            raise ApiError.unavailable("the server is stopping")
        if not self.service.engine.takes_requests:
            raise ApiError.unavailable("the engine has failed: the server's standard error says why")
        return self.service


def create_app(settings: Settings, state: State) -> ASGIApp:
    """The server's application."""
    paths = Paths(settings, state)
    front = [
        Middleware(SlowReaders, settings.timeouts.send),
        Middleware(KnownPlaces, settings),
        Middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        ),
        Middleware(Keys, settings),
    ]
    if not settings.allowed_origins:
        del front[2]
    routes = [
        Route("/", page.html),
        Route("/page.js", page.script),
        Route("/page.css", page.style),
        Route("/health", paths.health),
        Route("/metrics", paths.metrics),
        Route("/v1/models", paths.models),
        Route("/v1/models/{name:path}", paths.model),
        Route("/v1/completions", paths.completions, methods=["POST"]),
        Route("/v1/chat/completions", paths.chat_completions, methods=["POST"]),
        Route("/tokenize", paths.tokenize, methods=["POST"]),
        Route("/detokenize", paths.detokenize, methods=["POST"]),
        Route("/v1/load_lora_adapter", paths.load_adapter, methods=["POST"]),
        Route("/v1/unload_lora_adapter", paths.unload_adapter, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        ApiError: _refused,
        HTTPException: _no_such_path,
        GoneError: _gone,
        ClientDisconnect: _gone,
        Exception: _mistaken,
    }
    return _Reported(Starlette(routes=routes, middleware=front, exception_handlers=handlers))


class Paths:
    """What each path does."""

    def __init__(self, settings: Settings, state: State) -> None:
        self._settings = settings
        self._state = state

    async def health(self, http: Request) -> Response:
        """200 if requests are taken."""
        self._state.taking()
        return JSONResponse({"status": "ok"})

    async def metrics(self, http: Request) -> Response:
        """Counts for Prometheus."""
        if self._state.service is None:
            raise ApiError.unavailable("the model is being loaded")
        return Response(self._state.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, http: Request) -> Response:
        """The base model and the adapters."""
        return JSONResponse({"object": "list", "data": model_cards(self._state.taking())})

    async def model(self, http: Request) -> Response:
        """One of them."""
        return JSONResponse(model_card(self._state.taking(), http.path_params["name"]))

    async def completions(self, http: Request) -> Response:
        """Texts that follow prompts."""
        service = self._state.taking()
        asked = await read_body(http, CompletionRequest, self._settings, service)
        answer = await completion(asked, service, self._settings.limits)
        self._state.taking()
        return await answer_http(http, service, answer, stream=bool(asked.stream))

    async def chat_completions(self, http: Request) -> Response:
        """Answers in a conversation."""
        service = self._state.taking()
        asked = await read_body(http, ChatRequest, self._settings, service)
        answer = await chat_completion(asked, service, self._settings.limits)
        self._state.taking()
        return await answer_http(http, service, answer, stream=bool(asked.stream))

    async def tokenize(self, http: Request) -> Response:
        """A text's tokens."""
        service = self._state.taking()
        found = await tokenize(await read_body(http, TokenizeRequest, self._settings, service), service)
        return Response(to_json(found), media_type="application/json")

    async def detokenize(self, http: Request) -> Response:
        """Tokens' text."""
        service = self._state.taking()
        found = await detokenize(await read_body(http, DetokenizeRequest, self._settings, service), service)
        return Response(to_json(found), media_type="application/json")

    async def load_adapter(self, http: Request) -> Response:
        """Loads an adapter."""
        service = self._state.taking()
        asked = await read_body(http, LoadAdapterRequest, self._settings, service)
        await adapters.load(asked, service, self._settings.adapter_directories)
        return JSONResponse(model_card(service, asked.lora_name))

    async def unload_adapter(self, http: Request) -> Response:
        """Drops an adapter."""
        service = self._state.taking()
        asked = await read_body(http, UnloadAdapterRequest, self._settings, service)
        await adapters.unload(asked, service, self._settings.adapter_directories)
        return JSONResponse({"id": asked.lora_name, "object": "model", "deleted": True})


async def _refused(http: Request, error: ApiError) -> Response:
    return error.response()


async def _no_such_path(http: Request, error: HTTPException) -> Response:
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    message = f"{http.method} {http.url.path}: {error.detail}"
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


async def _gone(http: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _mistaken(http: Request, error: Exception) -> Response:
    return ApiError.failed("the server made a mistake").response()


class _Reported:
    """Logs where an error of the server's own arose, and never what it says, which may hold parts of prompts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        except TimeoutError:  # of sending: uvicorn closes the connection of an answer that is not whole
            return
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__)[-4:])
            logger.error("%s in %s\n%s", type(error).__name__, scope.get("path"), frames)
