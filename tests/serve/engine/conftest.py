"""The tiny model, its adapter and the engine's programs, compiled once."""

from collections.abc import Iterator

import pytest

from jmoe import gpt_oss
from jmoe.serve.engine import Engine
from jmoe.serve.engine.runner import Runner
from tests.serve.engine.engines import ADAPTERS, NEW, PROMPTS, SETTINGS, running, tiny, tiny_adapter


@pytest.fixture(scope="session")
def model() -> gpt_oss.GptOss:
    return tiny()


@pytest.fixture(scope="session")
def adapter(model: gpt_oss.GptOss) -> gpt_oss.LoraWeights:
    return tiny_adapter(model)


@pytest.fixture(scope="session")
def runner(model: gpt_oss.GptOss) -> Runner:
    return Runner(model, SETTINGS)


@pytest.fixture
def engine(runner: Runner, model: gpt_oss.GptOss) -> Iterator[Engine]:
    with running(runner, model) as engine:
        yield engine


@pytest.fixture(scope="session")
def texts(model: gpt_oss.GptOss, adapter: gpt_oss.LoraWeights) -> list[list[int]]:
    """generate's, of PROMPTS with ADAPTERS."""
    adapted = model.with_adapters(adapter)
    return gpt_oss.generate(
        adapted, PROMPTS, max_new_tokens=NEW, stop_tokens=[], adapter_ids=ADAPTERS, chunk=NEW
    ).tokens.tolist()
