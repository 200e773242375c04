"""Paths that generate nothing: models, tokens, adapters, the page's files."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jmoe.serve.adapters import allowed_directory
from jmoe.serve.engine import LoadFailedError
from jmoe.serve.errors import ApiError
from jmoe.serve.settings import Settings
from jmoe.text import encode, load_tokenizer
from tests.serve.conftest import STOPS
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving


def test_models_are_the_base_and_the_adapters(server: Serving) -> None:
    with server.client() as client:
        cards = client.get("/v1/models").json()["data"]
        assert client.get("/v1/models/tuned").json() == cards[2]
        assert client.get("/v1/models/no-such").status_code == 404
    assert [card["id"] for card in cards] == ["base", "base-too", "tuned"]
    assert [card["parent"] for card in cards] == [None, None, "base"]
    assert cards[0]["root"] == str(TINY)
    assert all(card["max_model_len"] == 200 for card in cards)


def test_tokens_there_and_back(server: Serving) -> None:
    text = "You may <|end|> é"
    with server.client() as client:
        found = client.post("/tokenize", json={"model": "base", "prompt": text, "add_special_tokens": False}).json()
        assert found["tokens"] == encode(load_tokenizer(TINY), text)
        assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 200)
        back = client.post("/detokenize", json={"model": "tuned", "tokens": found["tokens"]})
        assert back.json() == {"prompt": text}
        assert client.post("/detokenize", json={"tokens": [512]}).status_code == 400
        assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_short_texts_do_not_wait_for_long_ones(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*given: Any) -> list[int]:
        if len(given[1]) > 1000:
            assert short_is_done.wait(30)
        return [7]

    short_is_done = threading.Event()
    monkeypatch.setattr("jmoe.serve.tokenization.encode", slow)
    with server.client() as client, ThreadPoolExecutor(1) as beside:
        long = beside.submit(client.post, "/tokenize", json={"prompt": "x" * 2**18})
        time.sleep(0.1)
        assert client.post("/tokenize", json={"prompt": "x"}, timeout=10).json()["count"] == 1
        short_is_done.set()
        assert long.result().status_code == 200


def test_tokens_of_a_conversation(server: Serving, engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": "Hi <|end|>"}]
    with server.client() as client:
        found = client.post("/tokenize", json={"messages": messages}).json()
        client.post("/v1/chat/completions", json={"messages": messages})
        assert client.post("/tokenize", json={}).status_code == 400
    assert found["tokens"] == list(engine.requests[-1].prompt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def loading(module_engine: FakeEngine, folder: Path) -> Iterator[Serving]:
    """A server that loads adapters from a folder."""
    load = service_of(
        module_engine, TINY, stop_tokens=STOPS, vocab_size=512, read_adapter=lambda path: Path(path, "x").read_text()
    )
    with serving(load, Settings(adapter_directories=(folder / "allowed",))) as server:
        yield server


def adapter(folder: Path, name: str) -> Path:
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "x").write_text("weights")
    return directory


def load_status(server: Serving, name: str, path: Any) -> int:
    with server.client() as client:
        return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}).status_code


def test_adapters_come_and_go(loading: Serving, engine: FakeEngine, folder: Path) -> None:
    directory = adapter(folder, "allowed/one")
    assert load_status(loading, "one", directory) == 200
    with loading.client() as client:
        assert client.post("/v1/completions", json={"prompt": "x", "model": "one"}).status_code == 200
        again = client.post("/v1/load_lora_adapter", json={"lora_name": "one", "lora_path": str(directory)})
        assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
        assert load_status(loading, "base", directory) == 400
        assert load_status(loading, "two", directory) == 409  # there are two places
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 200
        assert client.post("/v1/completions", json={"prompt": "x", "model": "one"}).status_code == 404
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 404
    assert load_status(loading, "two", directory) == 200


def test_adapters_that_cannot_be_read_are_errors(loading: Serving, folder: Path) -> None:
    empty = folder / "allowed" / "empty"
    empty.mkdir(parents=True)
    assert load_status(loading, "empty", empty) == 400


def test_an_adapter_that_the_device_does_not_take_is_an_error_of_the_server(
    loading: Serving, engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str, weights: Any) -> None:
        raise LoadFailedError("the adapter is not loaded: out of memory\nand more")

    monkeypatch.setattr(engine, "load_adapter", full)
    with loading.client() as client:
        body = {"lora_name": "one", "lora_path": str(adapter(folder, "allowed/one"))}
        answer = client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the adapter is not loaded: out of memory"


def test_adapters_elsewhere_are_refused(loading: Serving, engine: FakeEngine, folder: Path) -> None:
    outside = adapter(folder, "outside")
    inside = adapter(folder, "allowed/with_link")
    (folder / "allowed" / "link").symlink_to(outside)
    (inside / "more").symlink_to(outside / "x")
    for path in (
        outside,
        folder / "allowed" / ".." / "outside",
        folder / "allowed" / "link",
        inside,
        folder / "allowed" / "nothing",
        folder / "allowed_not",
        "/",
        "relative",
        "nul\0",
    ):
        assert load_status(loading, "bad", path) == 403, path
    assert engine.adapters() == ("tuned",)


def test_a_link_that_stays_inside_is_followed(folder: Path) -> None:
    directory = adapter(folder, "allowed/real")
    (folder / "allowed" / "inner").symlink_to(directory)
    (folder / "allowed_link").symlink_to(folder / "allowed")
    assert allowed_directory(str(folder / "allowed" / "inner"), [folder / "allowed_link"]) == directory
    with pytest.raises(ApiError, match="not a directory below"):
        allowed_directory(str(directory / "x"), [folder / "allowed"])


def test_adapters_are_not_loaded_unless_that_is_allowed(server: Serving, folder: Path) -> None:
    assert load_status(server, "one", adapter(folder, "allowed/one")) == 404
    with server.client() as client:
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "tuned"}).status_code == 404
        assert client.post("/v1/completions", json={"prompt": "x", "model": "tuned"}).status_code == 200


def test_the_page_has_no_scripts_from_elsewhere(server: Serving) -> None:
    with server.client() as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        for part, kind in (("page.js", "text/javascript"), ("page.css", "text/css")):
            assert part in page.text
            assert client.get(f"/{part}").headers["content-type"].startswith(kind)
        assert "//" not in page.text
        assert "innerHTML" not in client.get("/page.js").text
