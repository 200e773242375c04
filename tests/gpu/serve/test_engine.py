"""The engine at gpt-oss-20b's sizes on a GPU: memory in place, steps as fast as a scan's, texts that repeat."""

import dataclasses
import functools
import queue
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.gpt_oss import Config, GptOss, log_probs
from jmoe.gpt_oss.decode import decode, prefill
from jmoe.gpt_oss.random_model import random_lora, random_model
from jmoe.serve.engine import (
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

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

ROWS, ADAPTERS, RANK = 16, 8, 16


@pytest.fixture(scope="module")
def model() -> GptOss:
    return random_model(Config.gpt_oss_20b())


@pytest.fixture(scope="module")
def engine(model: GptOss) -> Iterator[Engine]:
    settings = EngineSettings(
        cache_bytes=8 * 2**30,
        max_sequences=ROWS,
        max_model_len=4096,
        max_loras=ADAPTERS,
        max_lora_rank=RANK,
        prefix_caching=False,
        chunk_sizes=(64, 256, 1024, 4096),
    )
    engine = Engine(model, settings)
    engine.start()
    for number in range(ADAPTERS):
        engine.load_adapter(f"adapter {number}", random_lora(jax.random.key(number), model.config, RANK, 1))
    yield engine
    engine.stop()


def run(engine: Engine, adapters: list[int | None], *, new: int, seed: int = 0) -> tuple[list[list[int]], float]:
    """(a text for each adapter, milliseconds of a step in which all of them decode)."""
    generator = np.random.default_rng(seed)
    events: queue.Queue[tuple[int, Event, float]] = queue.Queue()

    def receive(row: int, event: Event) -> None:
        events.put((row, event, time.perf_counter()))

    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    with engine._changed:  # so that all come at once, and share chunks the same way each time
        for row, number in enumerate(adapters):
            prompt = generator.integers(0, 199_000, 215).tolist()
            name = None if number is None else f"adapter {number}"
            request = Request(id=f"{time.time()} {row}", prompt=prompt, adapter=name, sampling=params)
            engine.submit(request, functools.partial(receive, row))
    texts: list[list[int]] = [[] for _ in adapters]
    times: list[float] = []
    ended = 0
    while ended < len(adapters):
        row, event, when = events.get(timeout=120)
        assert not isinstance(event, Failed), event
        ended += isinstance(event, Finished)
        if isinstance(event, Token):
            texts[row].append(event.token)
            if row == len(adapters) - 1:
                times.append(when)
    inner = times[10:-10]
    return texts, 1e3 * (inner[-1] - inner[0]) / (len(inner) - 1)


def test_the_cache_is_written_in_place(engine: Engine) -> None:
    programs, pages = engine._runner.programs, engine._runner._state.pages
    cache = sum(entries.nbytes for entries in pages.cache)
    for program in (programs._decode[ROWS], programs._chunks[1024]):
        memory = program.memory_analysis()  # type: ignore[attr-defined]
        assert memory.alias_size_in_bytes >= cache
        assert memory.temp_size_in_bytes < cache  # which a copy would be


def test_texts_are_the_same_again(engine: Engine) -> None:
    mixed = [None, *range(ADAPTERS), None, None, 3, 3, 5, 0, 7]
    first, _ = run(engine, mixed, new=64)
    again, _ = run(engine, mixed, new=64)
    assert first == again
    # Of the same number of rows, positions and chunks base rows are those without adapters beside them.
    base, _ = run(engine, [None] * ROWS, new=64)
    for row in (0, 9, 10):
        assert first[row] == base[row]
    assert first[1] != base[1]


def test_log_probabilities_are_the_models() -> None:
    """Of two layers: more of them, with random weights, make large differences of roundings."""
    whole = Config.gpt_oss_20b()
    model = random_model(dataclasses.replace(whole, num_hidden_layers=2, layer_types=whole.layer_types[:2]))
    settings = EngineSettings(cache_bytes=2**30, max_sequences=1, max_model_len=1024, chunk_sizes=(256, 1024))
    prompt = np.random.default_rng(1).integers(0, 199_000, 700).tolist()
    events: queue.Queue[Event] = queue.Queue()
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine = Engine(model, settings)
    engine.start()
    try:
        engine.submit(Request(id="echo", prompt=prompt, adapter=None, sampling=params), events.put)
        event = events.get(timeout=120)
    finally:
        engine.stop()
    assert isinstance(event, PromptLogprobs)
    found = np.array([entry.logprob for entry in event.entries if entry is not None])
    want = np.asarray(jax.jit(log_probs)(model, jnp.asarray([prompt])))[0]
    # Tokens whose expert changed by a rounding are some of all.
    assert np.median(np.abs(found - want)) < 0.02 * np.abs(want - want.mean()).mean()


def scanned(model: GptOss, steps: int = 64) -> float:
    """Milliseconds of a step of as many sequences in a scan, with one adapter for all."""
    adapted = model.with_adapters(random_lora(jax.random.key(0), model.config, RANK, 1))
    tokens = jax.random.randint(jax.random.key(1), (ROWS, 256), 0, model.config.vocab_size)  # as rows differ in experts
    start = jax.jit(functools.partial(prefill, capacity=512))
    logits, state = start(adapted, tokens, jnp.full(ROWS, 256, jnp.int32))

    @jax.jit
    def advance(model: GptOss, logits: jax.Array, state: object) -> object:
        def step(carry: tuple, _: None) -> tuple:
            logits, state = carry
            return decode(model, jnp.argmax(logits, axis=-1).astype(jnp.int32), state), None

        return jax.lax.scan(step, (logits, state), None, length=steps)[0]

    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(advance(adapted, logits, state))
        times.append(time.perf_counter() - began)
    return 1e3 * min(times[1:]) / steps


def test_a_step_costs_little_beside_one_in_a_scan(engine: Engine, model: GptOss) -> None:
    run(engine, [0] * ROWS, new=40)
    one = min(run(engine, [0] * ROWS, new=200)[1] for _ in range(3))
    mixed = min(run(engine, [row % ADAPTERS for row in range(ROWS)], new=200)[1] for _ in range(3))
    base = min(run(engine, [None] * ROWS, new=200)[1] for _ in range(3))
    inside = scanned(model)
    print(
        f"a step of {ROWS}: one adapter {one:.2f} ms, {ADAPTERS} mixed {mixed:.2f}, none {base:.2f}, scan {inside:.2f}"
    )
    assert one < inside + 0.25
    assert mixed < 1.12 * one
