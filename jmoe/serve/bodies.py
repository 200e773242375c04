"""Reading a request's body, within its limits of size and time."""

import asyncio

from pydantic import ValidationError
from starlette.requests import Request

from jmoe.serve.errors import ApiError
from jmoe.serve.protocol.common import LONG_BYTES, Body
from jmoe.serve.service import Service
from jmoe.serve.settings import Settings

CLOSE = {"Connection": "close"}
"""Where what is left of a body isn't read: its connection is of no more use."""


async def read_body[B: Body](http: Request, form: type[B], settings: Settings, service: Service) -> B:
    """The body as one of the protocol's forms.

    Raises:
      ApiError: 400, it is too large or not of this form; 408, it did not come in time; 503, the bodies that are being
        read are too large together.
    """
    content = bytearray()
    try:
        try:
            async with asyncio.timeout(settings.timeouts.body):
                await _receive(http, settings, service, content)
        except TimeoutError:
            seconds = settings.timeouts.body
            raise ApiError(408, f"the body must come within {seconds:g} seconds", headers=CLOSE) from None
        if len(content) > LONG_BYTES:
            return await service.large_bodies.read(form, content)
        try:
            return form.read(content)
        except ValidationError as error:
            raise ApiError.of_validation(error) from None
    finally:
        service.body_bytes -= len(content)


async def _receive(http: Request, settings: Settings, service: Service, content: bytearray) -> None:
    """Appends what comes; the service counts it."""
    limits = settings.limits
    said = http.headers.get("content-length", "")
    too_large = said.isascii() and said.isdigit() and int(said) > limits.body_bytes
    if not too_large:
        async for part in http.stream():
            content += part
            service.body_bytes += len(part)
            if len(content) > limits.body_bytes:
                too_large = True
                break
            if service.body_bytes > limits.bodies_bytes:
                raise ApiError.unavailable("too many large bodies are being read; try again later", CLOSE)
    if too_large:
        raise ApiError(400, f"the body must be at most {limits.body_bytes} bytes", code="body_too_large", headers=CLOSE)
