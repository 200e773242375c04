"""A connection of HTTP whose requests' heads are bounded in size and time, and which speaks nothing else."""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_BYTES = 64 * 2**10
"""Of a request's line and headers, and of what stands between requests."""

HEAD_SECONDS = 10.0

MOST_WAITING = 16
"""Requests that a client may send ahead on a connection; its going is not noticed while more of them wait."""


class Connection(HttpToolsProtocol):
    """uvicorn's, closed if the head of a request is too long or does not come in time.

    A client that offers another protocol (Java's offers HTTP/2 with each request) is answered by this one, as RFC 9110
    allows in section 7.8; uvicorn's would leave out the request's body.

    Attributes:
      head_seconds: from a connection's begin, or from the first byte of a later request, until its headers are there.
    """

    head_seconds = HEAD_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for the first request."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._open: list[RequestResponseCycle] = []
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more, and tells all requests that it has, of which uvicorn's tells the last."""
        self._have_head()
        super().connection_lost(exc)
        for cycle in self._open:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Counts what belongs to a head."""
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_head()
        if self._head_timer is not None:
            self._head_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self._head_timer is not None and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_offer() + data[upgrade.args[0] :]

    def _without_offer(self) -> bytes:
        """The head that was read, for another parser: this one takes what follows for the other protocol's."""
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        head += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        return b"\r\n".join([*head, b"", b""])

    def _offers_another_protocol(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def on_headers_complete(self) -> None:
        """A request's head is there."""
        if self._offers_another_protocol():
            return
        self._have_head()
        super().on_headers_complete()
        self._open = [cycle for cycle in self._open if not cycle.response_complete] + [self.cycle]
        if 1 < len(self._open) <= MOST_WAITING:
            self.flow.resume_reading()  # which uvicorn's pauses until this one's turn

    def on_message_complete(self) -> None:
        """A request's body is there."""
        if not self._offers_another_protocol():
            super().on_message_complete()

    def _wait_for_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _have_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def connection_class(head_seconds: float) -> Any:
    """Connection with this time for a head."""
    return type("Connection", (Connection,), {"head_seconds": head_seconds})
