"""GET /: a page that asks two models the same, side by side."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""Nothing from elsewhere, and no script that stands in text."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def html(http: Request) -> Response:
    """The page."""
    return _file("page.html", "text/html")


async def script(http: Request) -> Response:
    """Its script."""
    return _file("page.js", "text/javascript")


async def style(http: Request) -> Response:
    """Its style."""
    return _file("page.css", "text/css")


def _file(name: str, kind: str) -> Response:
    return Response((files(__name__) / name).read_bytes(), media_type=kind, headers=HEADERS)
