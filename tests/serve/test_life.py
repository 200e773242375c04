"""A server's life: before it is ready, while clients come and go, and its end."""

import asyncio
import dataclasses
import functools
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from jmoe.serve.load import load_service
from jmoe.serve.run import Server, listen, serve
from jmoe.serve.settings import Settings
from tests.serve.conftest import STOPS, WORDS
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving, wait_until

STREAM = {"prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True}


def test_it_is_not_healthy_before_it_is_ready(module_engine: FakeEngine) -> None:
    may_load = threading.Event()
    load = service_of(module_engine, TINY, stop_tokens=STOPS, vocab_size=512)

    def wait_and_load(loop: asyncio.AbstractEventLoop) -> Any:
        may_load.wait()
        return load(loop)

    with serving(wait_and_load, wait=False) as server, server.client() as client:
        for path in ("/health", "/v1/models", "/metrics"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        may_load.set()
        wait_until(lambda: client.get("/health").status_code == 200, "it is healthy")


def test_a_model_that_cannot_be_loaded_ends_it() -> None:
    def load(loop: asyncio.AbstractEventLoop) -> Any:
        raise ValueError("no such model")

    said: list[str] = []
    with pytest.raises(ValueError, match="no such model"):
        serve(Settings(port=0), load, said.append)
    assert said[0].startswith("listening on http://127.0.0.1:")


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1 port"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_leaves_nothing_behind(server: Serving, engine: FakeEngine, stream: bool) -> None:
    engine.script = lambda request: [7] * 200
    engine.going.clear()
    with pytest.raises(httpx.ReadTimeout), server.client() as client:
        client.post("/v1/completions", json={**STREAM, "stream": stream, "n": 3}, timeout=0.2)
    wait_until(lambda: not server.state.service.metrics.answers, "the server has noticed")
    assert not engine.stats().running + engine.stats().queued - 3  # the engine's next step ends them
    engine.going.set()
    assert engine.is_empty(5)
    with server.client() as client:
        assert 'jmoe_requests_total{ended="cancelled"}' in client.get("/metrics").text


def test_a_client_that_goes_in_the_middle_ends_its_request(server: Serving, engine: FakeEngine) -> None:
    engine.script = lambda request: [7] * 200
    engine.step_seconds = 0.01
    with server.client() as client, client.stream("POST", "/v1/completions", json=STREAM) as answer:
        next(answer.iter_lines())
    assert engine.is_empty(1)  # all steps would be 1.5 seconds


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_sent_more_ahead_and_goes_ends_its_request(
    server: Serving, engine: FakeEngine, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    engine.script = lambda request: [7] * 200
    engine.step_seconds = 0.01
    body = json.dumps({**STREAM, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head + body + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        wait_until(lambda: engine.stats().running, "it runs")
    assert engine.is_empty(1)  # all steps would be 1.5 seconds
    assert not [record for record in caplog.records if record.name.startswith("jmoe")]


def test_it_is_not_healthy_without_its_engine() -> None:
    engine = FakeEngine(lambda request: [7])
    engine.start()
    with serving(service_of(engine, TINY, stop_tokens=STOPS, vocab_size=512)) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        engine.stop()
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503


def test_counts_of_a_scrape(server: Serving, engine: FakeEngine) -> None:
    with server.client() as client:
        before = client.get("/metrics").text
        client.post("/v1/completions", json={"prompt": "x", "max_tokens": 5})
        text = client.get("/metrics").text
    for name in ("requests_waiting", "requests_running", "pages", "pages_free", "preemptions_total"):
        assert f"\njmoe_{name} " in text
    count = "jmoe_time_to_first_token_seconds_count"
    assert value_of(text, count) == value_of(before, count) + 1
    assert value_of(text, "jmoe_time_per_output_token_seconds_count") >= 1
    assert value_of(text, "jmoe_generation_tokens_total") == value_of(before, "jmoe_generation_tokens_total") + 5


def value_of(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


class Running:
    """jmoe.serve.run's server in a thread, where no signals come: they are called."""

    def __init__(self, engine: FakeEngine) -> None:
        from jmoe.serve.app import State

        self.state = State()
        self.said: list[str] = []
        load = service_of(engine, TINY, stop_tokens=STOPS, vocab_size=512)
        listening = listen("127.0.0.1", 0)
        self.server = Server(Settings(), self.state, load, self.said.append)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([listening])))
        self.thread.start()
        wait_until(lambda: self.state.service is not None, "it is ready")
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=30)

    def signal(self) -> None:
        self.server.handle_exit(15, None)


@pytest.fixture
def running(engine: FakeEngine) -> Any:
    found = Running(engine)
    yield found
    found.client.close()
    found.server.should_exit = found.server.force_exit = True
    found.thread.join(30)


def test_sigterm_answers_what_there_is_and_refuses_more(running: Running, engine: FakeEngine) -> None:
    engine.going.clear()
    answers: list[httpx.Response] = []
    ask = {"prompt": "x", "max_tokens": 100}
    asking = threading.Thread(target=lambda: answers.append(running.client.post("/v1/completions", json=ask)))
    asking.start()
    wait_until(lambda: engine.requests, "the request is there")
    running.signal()
    wait_until(lambda: running.state.draining, "it drains")
    with httpx.Client(base_url=running.client.base_url) as other:
        assert other.get("/health").status_code == 503
        refused = other.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    assert running.thread.is_alive()
    engine.going.set()
    asking.join(30)
    running.thread.join(30)
    assert not running.thread.is_alive()
    assert answers[0].json()["choices"][0]["text"] == WORDS
    assert running.server.status == 0


def test_a_second_sigterm_ends_it_at_once(running: Running, engine: FakeEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr("jmoe.serve.run.SAME_SECONDS", 0.1)
    engine.going.clear()
    with running.client.stream("POST", "/v1/completions", json=STREAM):
        running.signal()
        running.signal()  # the same wish: `timeout` sends two
        time.sleep(0.2)
        assert running.thread.is_alive()
        running.signal()
        running.thread.join(10)
        assert not running.thread.is_alive()
    assert running.server.status == 128 + 15
    engine.going.set()
    assert engine.is_empty(5)  # cancelled


def test_a_checkpoint_without_a_tokenizer_ends_it(tmp_path: Path) -> None:
    from tests.serve.real_engine import SERVED

    for file in TINY.glob("*.json"):
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in TINY.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    served = dataclasses.replace(SERVED, directory=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        serve(Settings(port=0), functools.partial(load_service, served), lambda line: None)
