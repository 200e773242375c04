"""Errors while an adapter is put on the device: they fail its load alone."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from jmoe import gpt_oss
from jmoe.serve.engine import Engine, EngineStoppedError, Failed, LoadFailedError, UnknownAdapterError
from jmoe.serve.engine.pages import Pages
from jmoe.serve.engine.runner import Runner
from tests.serve.engine.engines import NEW, PROMPTS, SETTINGS, ask

FAULT = "RESOURCE_EXHAUSTED: out of memory"


def fail(monkeypatch: pytest.MonkeyPatch, engine: Engine, numbers: set[int], *, takes_places: bool) -> None:
    """Has calls of put_adapter by these numbers fail, with the places given up to it or before."""
    programs = engine._runner.programs
    plain, calls = programs.put_adapter, []

    def failing(places: Any, *arguments: Any) -> Any:
        calls.append(places)
        if len(calls) not in numbers:
            return plain(places, *arguments)
        if takes_places:
            for leaf in jax.tree.leaves(places):
                leaf.delete()
        raise JaxRuntimeError(FAULT)

    monkeypatch.setattr(programs, "put_adapter", failing)


@pytest.mark.parametrize("takes_places", [False, True])
def test_an_adapter_that_the_device_does_not_take_fails_alone(
    engine: Engine,
    adapter: gpt_oss.LoraWeights,
    texts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    takes_places: bool,
) -> None:
    engine.load_adapter("tiny", adapter)
    running = [ask(engine, PROMPTS[number], name, max_tokens=NEW) for number, name in ((0, None), (1, "tiny"))]
    fail(monkeypatch, engine, {2}, takes_places=takes_places)
    with pytest.raises(LoadFailedError, match="the adapter is not loaded: RESOURCE_EXHAUSTED: out of memory"):
        engine.load_adapter("other", adapter)
    assert engine.adapters() == ("tiny",)
    with pytest.raises(UnknownAdapterError):
        ask(engine, [1], "other")
    assert [answer.tokens for answer in running] == texts[:2]
    # The places hold what they held, and take another.
    engine.load_adapter("other", adapter)
    assert [ask(engine, PROMPTS[1], name).tokens for name in ("tiny", "other")] == [texts[1][:12]] * 2


def test_adapters_that_a_failed_step_has_lost_are_put_on_the_device_again(
    engine: Engine, adapter: gpt_oss.LoraWeights, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load_adapter("tiny", adapter)
    engine.load_adapter("leaving", adapter)
    decode = engine._runner.programs.decode

    def failing(state: Any, places: Any, step: Any) -> Any:
        monkeypatch.setattr(engine._runner.programs, "decode", decode)
        for leaf in jax.tree.leaves(places):
            leaf.delete()
        raise JaxRuntimeError(FAULT)

    waiting = [ask(engine, PROMPTS[1], "leaving", max_tokens=NEW) for _ in range(8)]
    engine.unload_adapter("leaving")
    monkeypatch.setattr(engine._runner.programs, "decode", failing)
    ends = [answer.end for answer in waiting]
    assert any(isinstance(end, Failed) for end in ends)
    for answer in waiting:
        assert isinstance(answer.end, Failed) or answer.tokens == texts[1]
    assert ask(engine, PROMPTS[1], "tiny").tokens == texts[1][:12]


def test_an_adapter_whose_first_layers_were_lost_is_not_loaded(
    engine: Engine, adapter: gpt_oss.LoraWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = jax.tree.map(np.asarray, adapter)
    with engine._changed:
        coming = engine._adapters.reserve("coming", host)
    fail(monkeypatch, engine, {1}, takes_places=True)
    with pytest.raises(LoadFailedError):
        engine.load_adapter("tiny", adapter)
    with engine._changed, pytest.raises(RuntimeError, match="an error has taken"):
        engine._adapters.loaded(coming)
    with engine._changed:
        engine._adapters.failed(coming)
    assert len(engine._adapters.free) == 2


def test_an_engine_that_cannot_restore_its_adapters_gives_up(
    runner: Runner, model: gpt_oss.GptOss, adapter: gpt_oss.LoraWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.reset()
    engine = Engine(model, dataclasses.replace(SETTINGS))
    engine._begin(runner, Pages(runner.geometry, caching=False))
    try:
        engine.load_adapter("tiny", adapter)
        fail(monkeypatch, engine, {1, 2}, takes_places=True)
        with pytest.raises(LoadFailedError, match="the adapters cannot be put on the device again"):
            engine.load_adapter("other", adapter)
        assert engine.drain(timeout=60)
        with pytest.raises(EngineStoppedError):
            ask(engine, [1])
    finally:
        engine.stop()
        monkeypatch.undo()
        runner.restore_adapters([])
