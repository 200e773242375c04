"""Servers by the fake engine."""

from collections.abc import Iterator

import pytest

from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving

WORDS = "The License applies to each of you."
STOPS = (0, 5)


@pytest.fixture(scope="module")
def text_tokens() -> list[int]:
    """WORDS by the tiny tokenizer."""
    from jmoe.text import encode, load_tokenizer

    return encode(load_tokenizer(TINY), WORDS)


@pytest.fixture
def engine(text_tokens: list[int]) -> Iterator[FakeEngine]:
    """One that writes WORDS and ends."""
    fake = FakeEngine(lambda request: text_tokens, stop_tokens=STOPS, adapters=["tuned"])
    fake.start()
    yield fake
    fake.going.set()
    fake.stop()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Serving]:
    """A server by it."""
    with serving(service_of(engine, TINY, stop_tokens=STOPS, vocab_size=512)) as running:
        yield running
