"""Many requests of all kinds with few pages: each ends once, and nothing is held in the end."""

import random
import threading
from typing import Any

import pytest

from jmoe import gpt_oss
from jmoe.serve.engine import Cancelled, Engine, Failed, Finished, UnknownAdapterError
from jmoe.serve.engine.runner import Runner
from tests.serve.engine.engines import ADAPTERS, NEW, PROMPTS, Answer, ask, name_of, running

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"temperature": 1.2, "top_k": 7, "min_p": 0.05, "ignore_eos": False},
    {"logprobs": 3},
    {"prompt_logprobs": 2, "max_tokens": 0},
    {"presence_penalty": 0.7, "frequency_penalty": 0.2, "temperature": 0.7},
    {"logit_bias": {5: 4.0, 9: -100.0}, "stop_tokens": (5, 6)},
]


def submit_some(engine: Engine, seed: int, count: int, answers: list[tuple[Answer, int | None]]) -> None:
    """Requests of all kinds, some cancelled sooner or later; with each answer the number of its prompt where its text
    is known."""
    generator = random.Random(seed)
    for _ in range(count):
        number, kind = generator.randrange(len(PROMPTS)), generator.choice(KINDS)
        if generator.random() < 0.3:
            answer = ask(engine, PROMPTS[number], name_of(ADAPTERS[number]), max_tokens=generator.randint(1, NEW))
            answers.append((answer, number))
        else:
            # Many of them come to need a second page once they run, and others are put back for it.
            length = generator.choice([generator.randint(1, 140), generator.randint(40, 63)])
            prompt = [generator.randrange(126) for _ in range(length)]
            adapter = generator.choice([None, "tiny", "other"])
            options = {"max_tokens": generator.randint(1, 50)} | kind
            try:
                answers.append((ask(engine, prompt, adapter, **options), None))
            except UnknownAdapterError:
                continue
        if generator.random() < 0.3:
            gone = generator.choice(answers)[0].id
            threading.Timer(generator.random() * 0.2, engine.cancel, (gone,)).start()


@pytest.mark.parametrize(("threads", "count"), [(2, 30), pytest.param(4, 150, marks=pytest.mark.slow)])
def test_each_request_ends_once(
    runner: Runner,
    model: gpt_oss.GptOss,
    adapter: gpt_oss.LoraWeights,
    texts: list[list[int]],
    threads: int,
    count: int,
) -> None:
    answers: list[list[tuple[Answer, int | None]]] = [[] for _ in range(threads)]
    with running(runner, model, pages=5) as engine:
        engine.load_adapter("tiny", adapter)
        clients = [
            threading.Thread(target=submit_some, args=(engine, seed, count, own)) for seed, own in enumerate(answers)
        ]
        for client in clients:
            client.start()
        for _ in range(3):
            engine.load_adapter("other", adapter)
            engine.unload_adapter("other")
            assert wait_for_place(engine)
        for client in clients:
            client.join()
        everyone = [each for own in answers for each in own]
        ends = [answer.end for answer, _ in everyone]
        assert not [end for end in ends if isinstance(end, Failed)]
        assert {type(end) for end in ends} == {Finished, Cancelled}
        for answer, number in everyone:
            if number is not None and isinstance(answer.end, Finished):
                assert answer.tokens == texts[number][: len(answer.tokens)], (number, answer.end)


def wait_for_place(engine: Engine) -> bool:
    """Until a place for an adapter is free."""
    with engine._changed:
        return engine._changed.wait_for(lambda: engine._adapters.free, timeout=120)
