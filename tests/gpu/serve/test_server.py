"""The server in bfloat16 on a GPU: many requests at once with and without an adapter, all answered."""

import random
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from tests.serve.real_engine import real_server
from tests.serve.serving import Serving
from tests.serve.stress import Stress

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def real() -> Iterator[Serving]:
    with real_server(dtype=jnp.bfloat16, max_sequences=16) as server:
        yield server


def test_500_requests_each_end_in_one_answer(real: Serving) -> None:
    asked = Stress(real.url, ["tiny", "tuned"], random.Random(0), 500)
    asked.run()
    assert asked.wrong == []
    assert sum(asked.ended.values()) == 500


def test_a_request_alone_is_answered_the_same_again(real: Serving) -> None:
    def ask(model: str) -> Any:
        body = {"model": model, "prompt": [7, 8, 9] * 30, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        with real.client() as client:
            return client.post("/v1/completions", json={**body, "logprobs": 3}).json()["choices"][0]

    with real.client() as client:
        assert client.get("/health").status_code == 200
    first = {model: ask(model) for model in ("tiny", "tuned")}
    assert {model: ask(model) for model in first} == first
    assert first["tiny"]["text"] != first["tuned"]["text"]
