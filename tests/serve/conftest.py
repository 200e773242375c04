"""Servers by the fake engine."""

from collections.abc import Iterator

import pytest

from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving

WORDS = "The License applies to each of you."
STOPS = (0, 5)


@pytest.fixture(scope="session")
def text_tokens() -> list[int]:
    """WORDS by the tiny tokenizer."""
    from jmoe.text import encode, load_tokenizer

    return encode(load_tokenizer(TINY), WORDS)


@pytest.fixture(scope="module")
def module_engine() -> Iterator[FakeEngine]:
    fake = FakeEngine(lambda request: [], stop_tokens=STOPS)
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def server(module_engine: FakeEngine) -> Iterator[Serving]:
    """A server by `engine`, for all tests of a file."""
    with serving(service_of(module_engine, TINY, stop_tokens=STOPS, vocab_size=512)) as running:
        yield running


@pytest.fixture
def engine(module_engine: FakeEngine, text_tokens: list[int]) -> Iterator[FakeEngine]:
    """One that writes WORDS and ends; nothing of a test may be left in it."""
    module_engine.reset(lambda request: text_tokens)
    yield module_engine
    module_engine.going.set()
    assert module_engine.is_empty(5)


@pytest.fixture(autouse=True)
def _fresh_engine(request: pytest.FixtureRequest) -> None:
    if "server" in request.fixturenames:
        request.getfixturevalue("engine")
