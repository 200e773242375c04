"""What is refused, by OpenAI's status codes and bodies."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from jmoe.serve.settings import Limits, Settings
from tests.serve.conftest import STOPS
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"prompt": "x"}


@pytest.fixture(scope="module")
def small() -> Iterator[Serving]:
    """A server whose limits are small."""
    engine = FakeEngine(lambda request: [7] * 300, stop_tokens=STOPS, max_model_len=50)
    engine.start()
    limits = Limits(body_bytes=5000, choices=4, logit_bias=2, stops=2, stop_characters=10)
    settings = Settings(limits=limits)
    with serving(service_of(engine, TINY, stop_tokens=STOPS, vocab_size=512), settings) as server:
        yield server
    engine.stop()


def refused(server: Serving, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    """(status, error) of a request that must be refused."""
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    with server.client() as client:
        answer = client.post(path, content=content)
    assert answer.status_code >= 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return answer.status_code, error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt"),
        (TEXT | {"n": 5}, "n"),
        (TEXT | {"n": 0}, "n"),
        (TEXT | {"max_tokens": -1}, "max_tokens"),
        (TEXT | {"max_tokens": 0}, "max_tokens"),
        (TEXT | {"max_tokens": "5"}, "max_tokens"),
        (TEXT | {"max_tokens": 1.5}, "max_tokens"),
        (TEXT | {"temperature": -0.1}, "temperature"),
        (TEXT | {"max_tokens": int("9" * 4300)}, "max_tokens"),
        (TEXT | {"temperature": 1e39}, "temperature"),
        (TEXT | {"temperature": "hot"}, "temperature"),
        (TEXT | {"top_p": 0}, "top_p"),
        (TEXT | {"top_k": -2}, "top_k"),
        (TEXT | {"min_p": 2}, "min_p"),
        (TEXT | {"repetition_penalty": 1e39}, "repetition_penalty"),
        (TEXT | {"repetition_penalty": 1e-39}, "repetition_penalty"),
        (TEXT | {"repetition_penalty": 0}, "repetition_penalty"),
        (TEXT | {"presence_penalty": 3}, "presence_penalty"),
        (TEXT | {"logit_bias": {"a": 1}}, "logit_bias"),
        (TEXT | {"logit_bias": {"512": 1}}, "logit_bias"),
        (TEXT | {"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
        (TEXT | {"logit_bias": {"1": 101}}, "logit_bias.1"),
        (TEXT | {"stop": ["a", "b", "c"]}, "stop"),
        (TEXT | {"stop": "a" * 11}, "stop"),
        (TEXT | {"stop": 5}, "stop"),
        (TEXT | {"stop_token_ids": [512]}, "stop_token_ids"),
        (TEXT | {"logprobs": 21}, "logprobs"),
        (TEXT | {"suffix": "end"}, "suffix"),
        (TEXT | {"best_of": 3}, "best_of"),
        (TEXT | {"stream_options": {"include_usage": True}}, "stream_options"),
        (TEXT | {"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ],
)
def test_a_field_that_is_wrong_is_named(small: Serving, body: dict[str, Any], param: str) -> None:
    status, error = refused(small, "/v1/completions", body)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param or error["param"].startswith(f"{param}.")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "stranger", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [*CHAT["messages"], {"role": "assistant", "content": "Well"}]}, "messages"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools"),
        (CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}, "messages"),  # the tiny template has none
        (CHAT | {"tool_choice": "required"}, "tool_choice"),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT | {"reasoning_effort": "endless"}, "reasoning_effort"),
        (CHAT | {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT | {"max_completion_tokens": int("9" * 4300)}, "max_completion_tokens"),
        (CHAT | {"n": 5}, "n"),
    ],
)
def test_a_field_of_a_chat_that_is_wrong_is_named(small: Serving, body: dict[str, Any], param: str) -> None:
    status, error = refused(small, "/v1/chat/completions", body)
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    "body", [{"logit_bias": {"9" * 4000: 1}}, {"logit_bias": {"x" * 4000: "much"}}, {"n": 9**4000}]
)
def test_an_error_is_short_whatever_it_is_about(small: Serving, body: dict[str, Any]) -> None:
    status, error = refused(small, "/v1/completions", TEXT | body)
    assert status == 400
    assert len(json.dumps(error)) < 1000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"prompt": "x", "temperature": NaN}'])
def test_what_is_not_a_json_object_is_an_error(small: Serving, content: bytes) -> None:
    assert refused(small, "/v1/completions", content)[0] == 400


def test_json_nested_deeply_is_an_error(small: Serving) -> None:
    assert refused(small, "/v1/completions", '{"prompt": ' + "[" * 2000 + "]" * 2000 + "}")[0] == 400
    nested = '{"messages": [{"role": "user", "content": ' + "[" * 2000 + "]" * 2000 + "}]}"
    assert refused(small, "/v1/chat/completions", nested)[0] == 400


def test_an_unknown_model_is_not_found(small: Serving) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT), ("/tokenize", TEXT)):
        status, error = refused(small, path, body | {"model": "no-such"})
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [7] * 40, "max_tokens": 11}),
        ("/v1/completions", {"prompt": [7] * 60}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 50}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b " * 60}]}),
    ],
)
def test_what_does_not_fit_is_too_long(small: Serving, path: str, body: dict[str, Any]) -> None:
    status, error = refused(small, path, body)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "50 tokens" in error["message"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(small: Serving) -> None:
    status, error = refused(small, "/v1/completions", {"prompt": "x" * 6000})
    assert (status, error["code"]) == (400, "body_too_large")
    with small.client() as client:
        answer = client.post("/v1/completions", content=iter([b"x" * 1000] * 10))  # without Content-Length
    assert answer.json()["error"]["code"] == "body_too_large"


def test_unknown_paths_and_methods_are_errors_too(small: Serving) -> None:
    with small.client() as client:
        unknown, method = client.get("/v1/nothing"), client.get("/v1/completions")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in method.headers["allow"]


def test_there_is_no_tokenizer_info(small: Serving) -> None:
    with small.client() as client:
        assert client.get("/tokenizer_info").status_code == 404


def test_a_full_queue_says_when_to_come_again(text_tokens: list[int]) -> None:
    engine = FakeEngine(lambda request: text_tokens, stop_tokens=STOPS, max_sequences=1, queue_limit=2)
    engine.going.clear()
    engine.start()
    with serving(service_of(engine, TINY, stop_tokens=STOPS, vocab_size=512)) as server, server.client() as client:
        full = client.post("/v1/completions", json={"prompt": ["a", "b", "c", "d"]})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(full.headers["retry-after"]) >= 1
        engine.going.set()
        assert engine.is_empty(5)  # what of them had been taken is cancelled, and there is room again
        assert client.post("/v1/completions", json={"prompt": ["a", "b"]}).status_code == 200
        assert engine.is_empty(5)
    engine.stop()
