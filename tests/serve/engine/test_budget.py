"""The cache's pages by its memory."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jmoe.gpt_oss import Config
from jmoe.gpt_oss.paged import PAGE_SIZE, page_bytes
from jmoe.serve.engine.budget import DEFAULT_BYTES, cache_budget, model_len, plan_geometry, span
from jmoe.serve.engine.settings import EngineSettings

CONFIG = Config.gpt_oss_20b()
ONE = page_bytes(CONFIG, 2, jnp.bfloat16)


def settings(**given: object) -> EngineSettings:
    return EngineSettings(**{"cache_bytes": 2**34, "max_sequences": 16, **given})  # type: ignore[arg-type]


def test_pages_take_the_memory_that_there_is() -> None:
    own = settings()
    geometry = plan_geometry(CONFIG, jnp.bfloat16, own, cache_budget(own))
    taken = (geometry.full_pages + geometry.windowed_pages) * ONE
    assert 2**34 - 2 * ONE < taken <= 2**34
    assert geometry.full_pages > 3 * geometry.windowed_pages
    assert geometry.window == 128
    assert geometry.full_columns == 131072 // PAGE_SIZE
    assert model_len(CONFIG, own, geometry) == 131072


def test_without_prefix_caching_pages_are_those_that_rows_need() -> None:
    own = settings(prefix_caching=False, max_model_len=1000, chunk_sizes=(256,))
    geometry = plan_geometry(CONFIG, jnp.bfloat16, own, cache_budget(own))
    assert geometry.full_pages == 16 * 16 + 1
    # A window lies in up to 3 pages; one more is being filled, and a chunk's.
    assert geometry.windowed_columns == span(127 + 256) == 7
    assert geometry.windowed_pages == 16 * 4 + 7 + 1


def test_little_memory_is_a_shorter_longest_text_or_an_error() -> None:
    own = settings(cache_bytes=100 * ONE, chunk_sizes=(256,))
    geometry = plan_geometry(CONFIG, jnp.bfloat16, own, 100 * ONE)
    assert geometry.full_pages + geometry.windowed_pages == 100
    assert model_len(CONFIG, own, geometry) == (geometry.full_pages - 1) * PAGE_SIZE
    asked = dataclasses.replace(own, max_model_len=100 * PAGE_SIZE)
    with pytest.raises(ValueError, match=r"one sequence of 6400 tokens, which takes .* got .*GiB"):
        plan_geometry(CONFIG, jnp.bfloat16, asked, 100 * ONE)


def test_a_model_without_a_kind_of_layers_needs_no_pages_of_it() -> None:
    own = settings(max_model_len=1000)
    full = dataclasses.replace(CONFIG, layer_types=("full_attention",) * 24)
    geometry = plan_geometry(full, jnp.bfloat16, own, 2**34)
    assert (geometry.window, geometry.windowed_pages) == (None, 1)
    sliding = dataclasses.replace(CONFIG, layer_types=("sliding_attention",) * 24)
    geometry = plan_geometry(sliding, jnp.bfloat16, own, 2**34)
    assert geometry.full_pages == 16 * 16 + 1
    assert geometry.windowed_pages == 2**34 // page_bytes(sliding, 1, jnp.bfloat16)
    with pytest.raises(ValueError, match="one sequence of 1000 tokens"):
        plan_geometry(sliding, jnp.bfloat16, own, 2**20)


def test_a_device_that_does_not_say_what_it_has_gives_little() -> None:
    assert cache_budget(settings(cache_bytes=None)) == DEFAULT_BYTES


def test_a_part_of_the_devices_memory_is_a_round_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def budget(used: int) -> int:
        memory = {"bytes_limit": 80 * 2**30, "bytes_in_use": used}
        device = SimpleNamespace(memory_stats=lambda: memory)
        monkeypatch.setattr("jax.devices", lambda: [device])
        return cache_budget(settings(cache_bytes=None, cache_fraction=0.5))

    assert budget(15 * 2**30 + 5) == budget(15 * 2**30 + 2**20) == 25 * 2**30 - 2**28
    with pytest.raises(ValueError, match=r"cache_fraction 0.5 of 80.0 GiB leaves nothing beside the 40.0 GiB in use"):
        budget(40 * 2**30)


def test_what_the_allocator_holds_in_pieces_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB 14 are in use, and 40 taken from the device: a piece is what the device has left, or one of those."""
    memory = {"bytes_limit": 80 * 2**30, "bytes_in_use": 14 * 2**30, "pool_bytes": 40 * 2**30}
    memory["largest_free_block_bytes"] = 10 * 2**30
    monkeypatch.setattr("jax.devices", lambda: [SimpleNamespace(memory_stats=lambda: memory)])
    assert cache_budget(settings(cache_bytes=None, cache_fraction=0.9)) == 40 * 2**30
    memory["pool_bytes"] = 80 * 2**30
    assert cache_budget(settings(cache_bytes=None, cache_fraction=0.9)) == 10 * 2**30


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_fraction", 1.0),
        ("max_sequences", 129),
        ("lora_targets", ("head",)),
        ("chunk_sizes", ()),
        ("max_loras", -1),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be "):
        settings(**{field: value})
