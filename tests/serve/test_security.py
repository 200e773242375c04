"""Who may ask, and how slowly."""

import base64
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jmoe.serve.security import given_key, is_one_of
from jmoe.serve.settings import Limits, Settings, Timeouts
from tests.serve.conftest import STOPS
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving, wait_until

KEY = "a key with spaces, of nobody"


@pytest.fixture(scope="module")
def locked(module_engine: FakeEngine) -> Iterator[Serving]:
    """A server with keys, that other names and pages may ask too."""
    settings = Settings(
        api_keys=("another", KEY),
        allowed_hosts=("known.example",),
        allowed_origins=("https://pages.example",),
    )
    with serving(service_of(module_engine, TINY, stop_tokens=STOPS, vocab_size=512), settings) as server:
        yield server


PATHS = ["/", "/page.js", "/metrics", "/v1/models", "/v1/nothing"]
POSTS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/load_lora_adapter"]


@pytest.mark.parametrize("path", PATHS + POSTS)
def test_all_but_health_asks_for_a_key(locked: Serving, path: str) -> None:
    with locked.client() as client:
        for wrong in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}):
            client.headers = wrong
            answer = client.request("POST" if path in POSTS else "GET", path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            scheme = "Basic" if path == "/" else "Bearer"
            assert answer.headers["www-authenticate"].startswith(scheme)
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [f"Bearer {KEY}", f"bearer {KEY}", "Bearer another", "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()],
)
def test_each_key_opens_as_token_or_password(locked: Serving, authorization: str) -> None:
    with locked.client() as client:
        client.headers = {"Authorization": authorization}
        assert client.get("/v1/models").status_code == 200


def test_keys_are_compared_whole() -> None:
    assert is_one_of(b"key", [b"other", b"key"])
    assert not is_one_of(b"", [b"key"])
    assert not is_one_of(b"ke", [b"key"])
    assert given_key("Basic ====") == b""
    assert given_key("Bearer \xfc") == b"\xfc"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("192.168.7.7", 200),
        ("known.example:80", 200),
        ("rebound.example", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example:8000", 403),
        ("user@127.0.0.1", 200),
        ("127.0.0.1@rebound.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_a_foreign_host_is_refused(locked: Serving, host: str, status: int) -> None:
    with locked.client() as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == status
        assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://pages.example", 200),
        ("https://other.example", 403),
        ("https://pages.example.other", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_a_foreign_origin_is_refused(locked: Serving, origin: str, status: int) -> None:
    with locked.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": origin})
    assert answer.status_code == status
    assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)


def test_the_servers_own_page_may_ask(locked: Serving) -> None:
    with locked.client() as client:
        assert client.get("/v1/models", headers={"Origin": locked.url}).status_code == 200


def test_a_browser_learns_what_pages_may_ask(locked: Serving) -> None:
    ask = {"Origin": "https://pages.example", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization, content-type"
    with locked.client() as client:
        client.headers = {}
        allowed = client.options("/v1/completions", headers=ask)
        foreign = client.options("/v1/completions", headers={**ask, "Origin": "https://other.example"})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://pages.example")
    assert foreign.status_code == 403


@pytest.fixture(scope="module")
def hasty(module_engine: FakeEngine) -> Iterator[Serving]:
    """A server that waits for nobody."""
    settings = Settings(timeouts=Timeouts(head=0.3, body=0.3, send=0.3, keep_alive=1), limits=Limits(body_bytes=2**26))
    with serving(service_of(module_engine, TINY, stop_tokens=STOPS, vocab_size=512), settings) as server:
        yield server


def connect(server: Serving) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    connection.settimeout(10)
    return connection


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(2**16):
        found += part
    return found


@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_head_that_does_not_come_is_not_waited_for(hasty: Serving, sent: bytes) -> None:
    with connect(hasty) as connection:
        connection.sendall(sent)
        begun = time.monotonic()
        assert read_all(connection) == b""
        assert 0.2 < time.monotonic() - begun < 5


def test_a_later_head_is_not_waited_for_either(hasty: Serving) -> None:
    with connect(hasty) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\nHo")
        assert read_all(connection) == b""


@pytest.mark.parametrize("split", [0, 30, 170])
def test_a_client_that_offers_http2_is_answered_by_http1(server: Serving, split: int) -> None:
    """As Java's client does."""
    body = b'{"prompt": "x"}'
    sent = (
        b"POST /tokenize HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: %d\r\nHost: localhost\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n\r\n%s" % (len(body), body)
    )
    with connect(server) as connection:
        for _ in range(2):
            connection.sendall(sent[:split])
            time.sleep(0.05)
            connection.sendall(sent[split:])
            answer = connection.recv(2**16)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b'"count":1' in answer
        connection.sendall(sent * 2 + b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200") <= 2
    assert b"HTTP/1.1 400" in answers


def test_a_head_that_does_not_end_is_refused(server: Serving) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2**17)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 400")


def test_a_body_that_does_not_come_is_not_waited_for(hasty: Serving) -> None:
    with connect(hasty) as connection:
        connection.sendall(b'POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{"pro')
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_who_does_not_read_the_answer_is_left(hasty: Serving, engine: FakeEngine) -> None:
    engine.script = lambda request: [7] * 10**6
    body = (
        b'{"prompt": '
        + b"["
        + b",".join([b"[7]"] * 60)
        + b'], "echo": true, "max_tokens": 199, "logprobs": 20, "stream": true}'
    )
    with connect(hasty) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        engine.queue_limit = 300
        connection.sendall(head.encode() + body)
        counts = hasty.state.service.metrics.text
        wait_until(lambda: b'jmoe_requests_total{ended="cancelled"}' in counts(), "the answer was given up")
        assert engine.is_empty(5)


def test_prompts_and_answers_are_not_logged(
    server: Serving, engine: FakeEngine, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "".join(reversed("TERCES"))  # which no line of this file has

    def mistake(request: Any) -> Any:
        raise RuntimeError(f"{secret} {request.prompt}")

    engine.script = mistake
    with caplog.at_level(0), server.client() as client:
        answer = client.post("/v1/completions", json={"prompt": secret})
        client.post("/v1/completions", json={"prompt": secret, "n": secret})
    assert answer.status_code == 500
    assert secret not in answer.text
    ours = [record for record in caplog.records if record.name.startswith(("jmoe", "uvicorn", "starlette"))]
    assert any("RuntimeError in /v1/completions" in record.getMessage() for record in ours)
    assert secret not in "".join(record.getMessage() + str(record.exc_text) for record in ours)
    assert secret not in "".join(capfd.readouterr())
