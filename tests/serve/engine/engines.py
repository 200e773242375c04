"""Engines on the tiny checkpoint that share their compiled programs, and what requests got from them."""

import contextlib
import dataclasses
import itertools
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jmoe import gpt_oss
from jmoe.serve.engine import (
    Cancelled,
    Engine,
    EngineSettings,
    Event,
    Failed,
    Finished,
    PromptLogprobs,
    Request,
    SamplingParams,
    Token,
)
from jmoe.serve.engine.pages import Pages
from jmoe.serve.engine.runner import Runner

CASE = Path(__file__).parents[2] / "data" / "tiny_case"
SETTINGS = EngineSettings(
    cache_bytes=2**20,
    max_sequences=4,
    prefill_tokens=32,
    max_model_len=192,
    max_loras=2,
    max_lora_rank=3,
    chunk_sizes=(16, 64),
)
NUMBERS = itertools.count()


@dataclasses.dataclass
class Answer:
    """A request's events as they come."""

    id: str
    events: queue.Queue[Event] = dataclasses.field(default_factory=queue.Queue)
    got: list[Event] = dataclasses.field(default_factory=list)

    def wait(self) -> "Answer":
        """Until the last event; nothing may follow it."""
        while not (self.got and isinstance(self.got[-1], Finished | Failed | Cancelled)):
            self.got.append(self.events.get(timeout=120))
        assert self.events.empty()
        return self

    @property
    def end(self) -> Any:
        return self.wait().got[-1]

    @property
    def tokens(self) -> list[int]:
        """Of a request that has finished."""
        assert isinstance(self.end, Finished), self.end
        tokens = [event.token for event in self.got if isinstance(event, Token)]
        assert self.end.new_tokens == len(tokens)
        return tokens

    @property
    def logprobs(self) -> list[Token]:
        self.wait()
        return [event for event in self.got if isinstance(event, Token)]

    @property
    def prompt(self) -> PromptLogprobs:
        (event,) = (event for event in self.wait().got if isinstance(event, PromptLogprobs))
        return event


def ask(engine: Engine, prompt: Sequence[int], adapter: str | None = None, **params: Any) -> Answer:
    """Submits a request: greedy unless it says otherwise."""
    answer = Answer(f"request {next(NUMBERS)}")
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True} | params
    request = Request(id=answer.id, prompt=prompt, adapter=adapter, sampling=SamplingParams(**options))
    engine.submit(request, answer.events.put)
    return answer


@contextlib.contextmanager
def running(
    runner: Runner, model: gpt_oss.GptOss, *, settings: EngineSettings = SETTINGS, pages: int | None = None
) -> Iterator[Engine]:
    """An engine of its own on programs that are shared; all that its requests held is free in the end.

    pages: of each kind; None: all that there are.
    """
    geometry = runner.geometry
    if pages is not None:
        geometry = dataclasses.replace(geometry, full_pages=pages + 1, windowed_pages=pages + 1)
    runner.reset()
    engine = Engine(model, settings)
    held = Pages(geometry, caching=settings.prefix_caching)
    engine._begin(runner, held)
    try:
        yield engine
        assert engine.drain(timeout=120)
        stats = engine.stats()
        assert (stats.queued, stats.running, stats.pages_free) == (0, 0, stats.pages_total)
        assert held.windowed.free == held.windowed.total
        assert all(adapter.users == 0 for adapter in engine._adapters._named.values())
        assert engine._scheduler._rows != []
        assert sorted(engine._scheduler._rows) == list(range(settings.max_sequences))
    finally:
        engine.stop()


def tiny(dtype: Any = jnp.float32) -> gpt_oss.GptOss:
    return gpt_oss.load(CASE / "model", dtype=dtype, progress=False)


def tiny_adapter(model: gpt_oss.GptOss) -> gpt_oss.LoraWeights:
    return gpt_oss.load_adapter(CASE / "adapter", model.config)


def prompts(count: int, seed: int = 0, longest: int = 150) -> list[list[int]]:
    """Random prompts, of which some begin alike."""
    generator = np.random.default_rng(seed)
    common = generator.integers(0, 126, longest).tolist()
    found = []
    for _ in range(count):
        shared = int(generator.choice([0, 0, 70, 130])) % longest
        rest = int(generator.integers(1, longest - shared))
        found.append(common[:shared] + generator.integers(0, 126, rest).tolist())
    return found


PROMPTS = [prompt[:45] if number % 5 > 2 else prompt for number, prompt in enumerate(prompts(10))]
ADAPTERS = [0 if number % 3 == 1 else -1 for number in range(10)]
"""Of the prompts' requests; generate's ids."""

NEW = 40


def name_of(adapter: int) -> str | None:
    """The name that the engine knows an id by."""
    return None if adapter < 0 else "tiny"
