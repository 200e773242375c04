"""Steps that fail on the device: who is told, what is logged, and when the engine gives up."""

import logging
from typing import Any

import pytest
from jax.errors import JaxRuntimeError

from jmoe import gpt_oss
from jmoe.serve.engine import EngineStoppedError, Failed, Finished
from jmoe.serve.engine.failures import MOST_IN_A_ROW, Failures, GaveUpError
from jmoe.serve.engine.pages import Pages
from jmoe.serve.engine.runner import Runner
from jmoe.serve.engine.scheduler import Chunk, Step
from tests.serve.engine.engines import NEW, PROMPTS, SETTINGS, Answer, Engine, ask, running

FAULT = "INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS at 0x7f%d"
STEP, CHUNK = Step((), 4), Chunk((), 16)


class Lost:
    """A result that an error has taken the place of, as whoever reads it finds out."""

    shape = (4, 1)

    def __init__(self, number: int) -> None:
        self.number = number

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise JaxRuntimeError(FAULT % self.number)


def fail(monkeypatch: pytest.MonkeyPatch, engine: Engine, where: str, numbers: set[int] | None, *, read: bool) -> None:
    """Has calls of a program by these numbers fail, all if None: as they are made, or as their result is read."""
    programs = engine._runner.programs
    plain, calls = getattr(programs, where), []

    def failing(*arguments: Any) -> Any:
        calls.append(where)
        if numbers is not None and len(calls) not in numbers:
            return plain(*arguments)
        if read:
            plain(*arguments)
            return Lost(len(calls))
        raise JaxRuntimeError(FAULT % len(calls))

    monkeypatch.setattr(programs, where, failing)


@pytest.mark.parametrize("read", [True, False])
def test_requests_of_a_step_that_fails_end_and_the_engine_goes_on(
    engine: Engine, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: Any, read: bool
) -> None:
    fail(monkeypatch, engine, "draw", {2, 3, 9, 10}, read=read)
    for _ in range(3):
        answers = [ask(engine, PROMPTS[0], max_tokens=20) for _ in range(2)]
        for end in [answer.end for answer in answers]:
            assert isinstance(end, Finished) or end.message.startswith("a step has failed: INTERNAL: CUDA_ERROR")
    assert ask(engine, PROMPTS[0]).tokens == texts[0][:12]
    assert engine.takes_requests
    assert [record.levelno for record in caplog.records] == [logging.ERROR]  # one, though addresses differ


@pytest.mark.parametrize("read", [True, False])
def test_an_engine_whose_steps_all_fail_gives_up_and_says_why(
    runner: Runner, model: gpt_oss.GptOss, monkeypatch: pytest.MonkeyPatch, caplog: Any, read: bool
) -> None:
    runner.reset()
    engine = Engine(model, SETTINGS)
    engine._begin(runner, Pages(runner.geometry, caching=False))
    # Prompts are computed; their first tokens are drawn by "draw" too, and so it is "decode" that cannot.
    fail(monkeypatch, engine, "decode", None, read=False)
    if read:
        monkeypatch.undo()
        fail(monkeypatch, engine, "draw", None, read=True)
    answers: list[Answer] = []

    def ask_on() -> None:
        while True:
            answers.append(ask(engine, PROMPTS[0], max_tokens=NEW))
            answers.append(ask(engine, PROMPTS[2], max_tokens=NEW))
            answers[-2].wait()

    with pytest.raises(EngineStoppedError, match="it is stopped"):
        ask_on()
    messages = {answer.end.message.partition(" at ")[0] for answer in answers if isinstance(answer.end, Failed)}
    assert "a step has failed: INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS" in messages
    assert all(isinstance(answer.end, Failed) for answer in answers)
    assert not engine.takes_requests
    assert engine.drain(timeout=60)
    first, last = caplog.records
    assert (first.levelno, last.levelno) == (logging.ERROR, logging.CRITICAL)
    assert "times in a row, the last time by INTERNAL: CUDA_ERROR" in last.getMessage()
    engine.stop()


def test_a_program_that_succeeds_between_failures_is_given_up_by_nobody() -> None:
    failures = Failures()
    for number in range(20):
        failures.failed([STEP], JaxRuntimeError(FAULT % number))
        failures.succeeded(STEP)


def test_successes_of_another_program_do_not_count() -> None:
    failures = Failures()
    for number in range(MOST_IN_A_ROW - 1):
        failures.failed([STEP, CHUNK], JaxRuntimeError(FAULT % number))
        failures.succeeded(CHUNK)
    with pytest.raises(GaveUpError, match=r"a step of 4 rows failed 3 times in a row, the last time by INTERNAL"):
        failures.failed([CHUNK, STEP], JaxRuntimeError(FAULT % 9))


def test_an_error_before_there_is_a_plan_counts_too(caplog: Any) -> None:
    failures = Failures()
    failures.failed([], ValueError())
    failures.failed([], RuntimeError("x"))
    with pytest.raises(GaveUpError, match="planning failed 3 times"):
        failures.failed([], RuntimeError("x"))
    assert len(caplog.records) == 2


def test_pages_of_failed_requests_are_free(runner: Runner, model: gpt_oss.GptOss, monkeypatch: Any) -> None:
    with running(runner, model) as engine:  # which looks in the end
        fail(monkeypatch, engine, "decode", {2}, read=False)
        answers = [ask(engine, prompt, max_tokens=9) for prompt in PROMPTS[:4]]
        assert any(isinstance(answer.end, Failed) for answer in answers)
        assert engine.drain(timeout=60)
        stats = engine.stats()
        assert (stats.running, stats.pages_free, stats.cached_pages <= stats.pages_free) == (0, stats.pages_total, True)
