"""Large bodies: they are read in a process of their own, and all together within a bound."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from jmoe.serve.errors import ApiError
from jmoe.serve.large_bodies import LargeBodies
from jmoe.serve.protocol.chat import ChatRequest
from jmoe.serve.protocol.common import LONG_BYTES
from jmoe.serve.protocol.completions import CompletionRequest
from jmoe.serve.settings import Limits, Settings
from tests.serve.conftest import STOPS
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving, wait_until

TOKENS = 2_000_000
TURNS = 20
"""Of the loop at least, a millisecond each, while these tokens are read; a thread of this process leaves it none."""


@pytest.fixture(scope="module")
def large() -> Iterator[LargeBodies]:
    bodies = LargeBodies()
    yield bodies
    bodies.close()


def padded(body: dict[str, Any]) -> bytes:
    """JSON that is large by its spaces."""
    return json.dumps(body).encode() + b" " * (LONG_BYTES + 1)


def read(large: LargeBodies, form: type[Any], content: bytes) -> Any:
    return asyncio.run(large.read(form, bytearray(content)))


def test_the_loop_goes_on_while_millions_of_tokens_are_read(
    large: LargeBodies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(content: bytes) -> Any:
        raise AssertionError("it is read in this process")

    monkeypatch.setattr(CompletionRequest, "model_validate_json", here)
    content = bytearray(b'{"prompt": [1' + b",1" * (TOKENS - 1) + b"]}")

    async def both() -> tuple[Any, int]:
        reading = asyncio.ensure_future(large.read(CompletionRequest, content))
        turns = 0
        while not reading.done():
            await asyncio.sleep(0.001)
            turns += 1
        return reading.result(), turns

    found, turns = asyncio.run(both())
    (prompt,) = found.prompts
    assert (len(prompt), prompt[-1]) == (TOKENS, 1)
    assert found.is_long
    assert turns > TURNS


def test_an_answer_that_is_left_half_read_is_not_the_next_ones(
    large: LargeBodies, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("jmoe.serve.large_bodies.pickle.load", lambda source: source.read(1) and 1 // 0)
        with pytest.raises(ZeroDivisionError):
            read(large, CompletionRequest, padded({"prompt": "another's"}))
    assert read(large, CompletionRequest, padded({"prompt": "mine"})).prompt == "mine"


def test_a_form_is_what_it_is_in_a_small_body(large: LargeBodies) -> None:
    body = {"prompt": [[7, 8], [9]], "stop": ["a"], "stop_token_ids": [3, 4], "logit_bias": {"5": 1}, "unknown": [1]}
    found, small = read(large, CompletionRequest, padded(body)), CompletionRequest.read(json.dumps(body).encode())
    assert [list(prompt) for prompt in found.prompts] == small.prompts
    assert list(found.stop_token_ids) == small.stop_token_ids
    assert found.model_dump(exclude={"prompt", "stop_token_ids"}) == small.model_dump(
        exclude={"prompt", "stop_token_ids"}
    )
    chat = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "x": [1, 2]}]}
    assert read(large, ChatRequest, padded(chat)).model_dump() == ChatRequest(**chat).model_dump()


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (padded({"prompt": "x", "temperature": "hot"}), "temperature"),
        (b'{"prompt": ' + b"[" * LONG_BYTES, None),
        (padded({"prompt": [1, 2, "x"]}), "prompt"),
        (padded({"prompt": ["x"] * 20_000}), "prompt"),
        (padded({"prompt": "x", "stop": ["x"] * 20_000}), "stop"),
    ],
)
def test_errors_are_those_of_a_small_body(large: LargeBodies, content: bytes, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        read(large, CompletionRequest, content)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_process_that_ends_is_an_error_and_then_another(large: LargeBodies) -> None:
    content = padded({"prompt": "x"})
    assert read(large, CompletionRequest, content).prompt == "x"
    assert large._process is not None
    os.kill(large._process.pid, signal.SIGKILL)
    large._process.wait()
    with pytest.raises(ApiError, match="try again") as caught:
        read(large, CompletionRequest, content)
    assert caught.value.status == 503
    assert read(large, CompletionRequest, content).prompt == "x"


def test_nothing_is_read_once_the_server_ends() -> None:
    bodies = LargeBodies()
    bodies._begin()
    process = bodies._process
    assert process is not None
    bodies.close()
    assert process.wait(20) != 0
    with pytest.raises(ApiError, match="stopping"):
        read(bodies, CompletionRequest, padded({"prompt": "x"}))


def test_large_requests_are_answered(server: Serving, engine: FakeEngine) -> None:
    with server.client() as client:
        answer = client.post("/v1/completions", content=padded({"prompt": [[7, 8], [9]], "echo": True, "logprobs": 1}))
        assert answer.status_code == 200
        assert [list(request.prompt) for request in engine.requests] == [[7, 8], [9]]
        text = client.post("/detokenize", content=padded({"tokens": [7, 8, 9]}))
        assert text.json() == client.post("/detokenize", json={"tokens": [7, 8, 9]}).json()
        assert client.post("/detokenize", content=padded({"tokens": [7, 512]})).status_code == 400
        assert client.post("/v1/completions", content=padded({"prompt": [7, 512]})).json()["error"]["param"] == "prompt"
    assert server.state.service is not None
    assert server.state.service.body_bytes == 0


def test_all_bodies_together_are_bounded() -> None:
    engine = FakeEngine(lambda request: [7], stop_tokens=STOPS)
    engine.start()
    settings = Settings(limits=Limits(bodies_bytes=3000))
    with serving(service_of(engine, TINY, stop_tokens=STOPS, vocab_size=512), settings) as server:
        service = server.state.service
        assert service is not None
        with (
            server.client() as client,
            socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as slow,
        ):
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000\r\n\r\n"
            slow.sendall(head + b" " * 2500)
            wait_until(lambda: service.body_bytes == 2500, "it is counted")
            body = json.dumps({"prompt": "x"}) + " " * 600
            full = client.post("/v1/completions", content=body)
            assert (full.status_code, full.json()["error"]["code"]) == (503, "unavailable")
            assert int(full.headers["retry-after"]) >= 1
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200  # as there is room for it
            slow.close()
            wait_until(lambda: service.body_bytes == 0, "it counts no more")
            assert client.post("/v1/completions", content=body).status_code == 200
    engine.stop()
