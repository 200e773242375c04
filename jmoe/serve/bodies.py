"""Reading a request's body, within its limits of size and time."""

import asyncio

from pydantic import ValidationError
from starlette.requests import Request

from jmoe.serve.errors import ApiError
from jmoe.serve.protocol.common import Body
from jmoe.serve.settings import Settings


async def read_body[B: Body](http: Request, form: type[B], settings: Settings) -> B:
    """The body as one of the protocol's forms.

    Raises:
      ApiError: 400, it is too large or not of this form; 408, it did not come in time.
    """
    try:
        async with asyncio.timeout(settings.timeouts.body):
            content = await _content(http, settings.limits.body_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the body must come within {settings.timeouts.body:g} seconds", headers={"Connection": "close"}
        ) from None
    try:
        return form.read(content)
    except ValidationError as error:
        raise ApiError.of_validation(error) from None


async def _content(http: Request, most: int) -> bytes:
    said = http.headers.get("content-length", "")
    parts = bytearray()
    if not (said.isascii() and said.isdigit() and int(said) > most):
        async for part in http.stream():
            parts += part
            if len(parts) > most:
                break
        else:
            return bytes(parts)
    # What is left of the body isn't read: the connection is of no more use.
    raise ApiError(
        400, f"the body must be at most {most} bytes", code="body_too_large", headers={"Connection": "close"}
    )
