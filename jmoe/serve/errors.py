"""Errors as OpenAI's API writes them: a status, and a body {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationError
from starlette.responses import Response

from jmoe.errors import first_line, in_short

INVALID = "invalid_request_error"

TYPE_NAMES = ("str", "int", "float", "bool", "json_schema")
"""What pydantic adds to a field's place to say which type of several it tried."""

PARAM_CHARACTERS = 200
"""Of a field's name in an error, at most."""

RETRY_SECONDS = 1
"""What Retry-After says: a place in the queue is free once a running request ends."""


class ApiError(Exception):
    """What a request is answered with in place of a result."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """As OpenAI's error objects; `param` is the field of the request that is wrong."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The body's JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        return Response(
            json.dumps(self.body()).encode(), self.status, headers=self.headers, media_type="application/json"
        )

    @classmethod
    def invalid(cls, param: str | None, message: str, code: str | None = None) -> Self:
        """A field's value that cannot be taken: 400."""
        return cls(400, message, param=param, code=code)

    @classmethod
    def of_validation(cls, error: ValidationError) -> Self:
        """The first of what pydantic found: 400 with the field."""
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            return cls(400, f"the body must be JSON: {first['msg']}")
        place = [part for part in first["loc"] if isinstance(part, int) or _is_field(part)]
        param = ".".join(map(str, place))[:PARAM_CHARACTERS] or None  # a key of an object, which may be anything
        return cls(400, f"{param or 'the body'}: {first['msg']}", param=param)

    @classmethod
    def of_value(cls, param: str, error: Exception) -> Self:
        """A ValueError of what reads a field: 400."""
        return cls(400, first_line(error), param=param)

    @classmethod
    def unknown_model(cls, name: str) -> Self:
        """Neither the base model nor an adapter has this name: 404."""
        return cls(
            404, f"the model {in_short(name)} does not exist; /v1/models lists those that do", param="model",
            code="model_not_found",
        )  # fmt: skip

    @classmethod
    def too_long(cls, param: str, prompt: int, new: int, most: int) -> Self:
        """A prompt that leaves no room for what is asked for: 400."""
        asked = f"{prompt} tokens of prompt and {new} new ones" if new else f"{prompt} tokens of prompt"
        message = f"this model's context is {most} tokens: {asked} are {prompt + new}"
        return cls(400, message, param=param, code="context_length_exceeded")

    @classmethod
    def queue_full(cls) -> Self:
        """Too many requests wait already: 429."""
        return cls(
            429, "the queue is full; try again later", type="rate_limit_error", code="rate_limit_exceeded",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )  # fmt: skip

    @classmethod
    def unavailable(cls, why: str, headers: Mapping[str, str] | None = None) -> Self:
        """The server cannot take requests now: 503."""
        again = {"Retry-After": str(RETRY_SECONDS), **(headers or {})}
        return cls(503, why, type="server_error", code="unavailable", headers=again)

    @classmethod
    def failed(cls, message: str) -> Self:
        """Something went wrong that is not the request's fault: 500."""
        return cls(500, message, type="server_error", code="internal_error")


def _is_field(part: str) -> bool:
    return part not in TYPE_NAMES and "[" not in part and "-" not in part
