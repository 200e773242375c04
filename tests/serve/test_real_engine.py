"""The server by jmoe's own engine: what clients that nobody here wrote get, and what is left of many requests."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import openai
import pytest

from jmoe import gpt_oss
from jmoe.gpt_oss.generate import generate
from jmoe.serve.settings import Settings
from jmoe.text import encode, load_tokenizer
from tests.serve.real_engine import real_server
from tests.serve.serving import TINY, Serving
from tests.serve.stress import Stress

pytestmark = pytest.mark.slow

TEXT = "You may reproduce and distribute copies of the Work"
NEW = 24


@pytest.fixture(scope="module")
def real() -> Iterator[Serving]:
    with real_server(Settings(adapter_directories=(TINY,))) as server:
        yield server


@pytest.fixture(scope="module")
def client(real: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def greedy() -> dict[str, list[list[int]]]:
    """The tokens that generate gives after beginnings of TEXT, without and with the adapter."""
    tokens = encode(load_tokenizer(TINY), TEXT)
    prompts = [tokens[:end] for end in (3, len(tokens) // 2, len(tokens))]
    found = {}
    for name, adapter in (("tiny", None), ("tuned", TINY / "adapter")):
        model = gpt_oss.load(TINY, dtype=jnp.float32, adapter=adapter)
        generated = generate(model, prompts, max_new_tokens=NEW, stop_tokens=())
        found[name] = generated.tokens.tolist()
    return {"prompts": prompts, **found}


def test_greedy_text_is_generates_whatever_the_other_requests_are(
    real: Serving, client: openai.OpenAI, greedy: dict[str, list[list[int]]]
) -> None:
    tokenizer = load_tokenizer(TINY)
    found: dict[tuple[str, int], Any] = {}

    def ask(model: str, number: int) -> None:
        # Prompts, adapters, and others that draw beside them, in one batch.
        for _ in range(2):
            answer = client.completions.create(
                model=model,
                prompt=greedy["prompts"][number],
                max_tokens=NEW,
                temperature=0,
                extra_body={"ignore_eos": True, "skip_special_tokens": False},
            )
            found[model, number] = answer.choices[0].text
            client.completions.create(model=model, prompt=TEXT, max_tokens=3, temperature=1.5, n=2)

    threads = [threading.Thread(target=ask, args=(name, i)) for name in ("tiny", "tuned") for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {
        (name, i): tokenizer.decode(greedy[name][i], skip_special_tokens=False)
        for name in ("tiny", "tuned")
        for i in range(3)
    }
    assert greedy["tiny"] != greedy["tuned"]


def test_openais_client_streams(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tuned", "messages": [{"role": "user", "content": "Is 4 even?"}], "temperature": 0}
    whole = client.chat.completions.create(**ask, max_tokens=8)
    chunks = list(
        client.chat.completions.create(**ask, max_tokens=8, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [card.id for card in client.models.list()] == ["tiny", "tuned"]


def test_openais_client_reads_logprobs(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0, "seed": 1}
    legacy = client.completions.create(prompt=TEXT, logprobs=3, echo=True, **ask).choices[0].logprobs
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=3, **ask
    )
    assert legacy is not None
    prompt = len(encode(load_tokenizer(TINY), TEXT))
    assert len(legacy.token_logprobs or []) == prompt + 4
    new = (legacy.token_logprobs or [])[prompt:]
    assert new == [max(top.values()) for top in (legacy.top_logprobs or [])[prompt:]]
    assert chat.choices[0].logprobs is not None
    for entry in chat.choices[0].logprobs.content or []:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert entry.token == entry.top_logprobs[0].token
        assert len(entry.top_logprobs) == 3


def test_openais_client_understands_errors(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no-such", messages=messages)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=messages, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[7] * 600)
    assert long.value.code == "context_length_exceeded"


def test_a_seed_draws_the_same_again_and_samples_differ(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt=TEXT, max_tokens=12, temperature=1.0, seed=5, n=3, extra_body={"ignore_eos": True}
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert ask() == first
    assert len(set(first)) == 3


def test_an_adapter_comes_and_goes_while_requests_run(real: Serving, client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"prompt": TEXT, "max_tokens": 8, "temperature": 0}
    body = {"lora_name": "again", "lora_path": str(TINY / "adapter")}
    with (
        real.client() as http,
        client.completions.create(model="tuned", stream=True, prompt=TEXT, max_tokens=100) as other,
    ):
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        again = client.completions.create(model="again", **ask)
        assert http.post("/v1/load_lora_adapter", json={**body, "lora_name": "third"}).status_code == 409
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200
        assert list(other)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="again", **ask)
    expected, base = (client.completions.create(model=name, **ask) for name in ("tuned", "tiny"))
    assert again.choices[0].text == expected.choices[0].text != base.choices[0].text


def test_2000_requests_each_end_in_one_answer(real: Serving) -> None:
    asked = Stress(real.url, ["tiny", "tuned"], random.Random(0), 2000)
    asked.run()
    assert asked.wrong == []
    assert sum(asked.ended.values()) == 2000
    assert min(asked.ended[kind] for kind in ("whole", "streamed", "refused", "left")) >= 100
    with real.client() as client:
        assert client.get("/health").status_code == 200
    assert real.state.service is not None
    assert real.state.service.engine.stats().preemptions > 0
