"""The programs by themselves: uploads, and base rows that keep their bits beside adapters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.gpt_oss.weights import TARGETS
from jmoe.serve.engine import SamplingParams
from jmoe.serve.engine.adapter_places import AdapterPlaces, padded_layers
from jmoe.serve.engine.device_state import DeviceState
from jmoe.serve.engine.pages import Geometry
from jmoe.serve.engine.programs import Weights, decode_step, prefill_chunk
from jmoe.serve.engine.row_options import WIDTH, pack_options
from jmoe.serve.engine.runner import Runner, most_of, sizes_up_to
from jmoe.serve.engine.uploads import ChunkLayout, step_upload
from tests.serve.engine.engines import tiny, tiny_adapter

GEOMETRY = Geometry(page_size=64, window=8, full_pages=5, windowed_pages=5, full_columns=2, windowed_columns=2)
LAYOUT = ChunkLayout(16, 2, 2, 2)


def test_a_chunks_upload_comes_apart_as_it_was_put_together() -> None:
    upload, parts = LAYOUT.empty(nobody=9)
    assert upload.size == LAYOUT.size
    parts["tokens"][:] = np.arange(16)
    parts["windowed"][1, 1] = 77
    parts["options"][0] = pack_options(SamplingParams(max_tokens=1, temperature=0.5), 3, 1)
    apart = jax.jit(LAYOUT.split)(upload)
    assert {name: part.shape for name, part in apart.items()} == LAYOUT.shapes
    assert apart["tokens"].tolist() == list(range(16))
    assert apart["windowed"].tolist() == [[0, 0], [0, 77]]
    assert apart["rows"].tolist() == apart["sampled"].tolist() == [9, 9]
    assert np.array_equal(apart["options"], parts["options"])
    assert apart["options"].shape[1] == WIDTH


def test_a_steps_upload_ends_with_rows_of_nobody() -> None:
    assert step_upload([(3, 70, 1, 2)], 2, nobody=4).tolist() == [[3, 70, 1, 2], [4, -1, 0, 0]]


def test_sizes_and_drawings() -> None:
    assert [sizes_up_to(rows) for rows in (1, 2, 3, 16)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8, 16)]
    assert most_of([]) == "greedy"
    assert most_of(["greedy", "truncated", "random"]) == "truncated"


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def run(request: Any) -> Any:
    """A chunk of two pieces and then two steps, their rows by these places: -1 for none; None: without adapters."""
    model = tiny(request.param)
    weights = Weights.of(model)
    room = model.config, TARGETS, 2, 3
    places = AdapterPlaces.empty(*room, model.dtype)
    for index, layer in enumerate(padded_layers(tiny_adapter(model), model.config, TARGETS, 3, model.dtype)):
        places = places.put(layer, jnp.int32(index), jnp.int32(1), model.config, model.dtype)
    chunk = jax.jit(functools.partial(prefill_chunk, weights, LAYOUT))
    step = jax.jit(functools.partial(decode_step, weights))

    def run(own: list[int] | None) -> list[np.ndarray]:
        state = DeviceState.empty(model.config, GEOMETRY, 2, model.dtype)
        upload, part = LAYOUT.empty(nobody=2)
        part["tokens"][:] = np.arange(40, 56)
        part["offsets"][1:] = 6, 13
        part["rows"][:] = part["sampled"][:] = 0, 1
        part["full"][:, 0], part["windowed"][:, 0] = (1, 2), (2, 3)
        for index, place in enumerate(own or [-1, -1]):
            part["options"][index] = pack_options(SamplingParams(max_tokens=1), 0, place)
        given = None if own is None else places
        logits, hidden, _, pages, options = chunk(weights.leaves, given, state.pages, state.options, upload)
        found = [np.asarray(logits), np.asarray(hidden[:6])]
        for position in (6, 7):
            rows = [(0, position, 1, 2), (1, position + 1, 2, 3)]
            logits, pages = step(
                weights.leaves, given, pages, jnp.array([5, 9, 0], jnp.int32), options, step_upload(rows, 2, nobody=2)
            )
            found.append(np.asarray(logits))
        return found

    return run


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def test_base_rows_beside_adapters_keep_the_bits_they_have_among_themselves(run: Any) -> None:
    beside, among_base = run([-1, 1]), run([-1, -1])
    for mixed, base in zip(beside, among_base, strict=True):
        own = mixed if len(mixed) > 2 else mixed[:1]  # hidden is the first piece's alone
        assert np.isfinite(mixed.astype(np.float32)).all()
        assert np.array_equal(bits(own), bits(base[: len(own)]))
    assert not np.array_equal(beside[0][1], among_base[0][1])
    assert not np.array_equal(beside[2][1], among_base[2][1])


@pytest.mark.slow
def test_base_rows_have_the_bits_of_programs_without_adapters(run: Any) -> None:
    for base, plain in zip(run([-1, -1]), run(None), strict=True):
        assert np.array_equal(bits(base), bits(plain))


def test_an_empty_place_is_the_model_alone(run: Any) -> None:
    for changed, plain in zip(run([0, 0]), run([-1, -1]), strict=True):
        np.testing.assert_allclose(changed.astype(np.float32), plain.astype(np.float32), atol=1e-5)


def test_pages_are_written_in_place(runner: Runner) -> None:
    cache = sum(entries.nbytes for entries in runner._state.pages.cache)
    for program in (runner.programs._decode[4], runner.programs._chunks[16]):
        memory = program.memory_analysis()  # type: ignore[attr-defined]
        assert memory.alias_size_in_bytes >= cache
        assert memory.temp_size_in_bytes < cache  # which a copy would be
