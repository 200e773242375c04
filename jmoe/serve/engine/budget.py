"""How many pages of each kind the memory holds."""

from collections.abc import Mapping

import jax
from jax.typing import DTypeLike

from jmoe.device_memory import byte_size
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.model import shortest_period
from jmoe.gpt_oss.paged import PAGE_SIZE, page_bytes
from jmoe.serve.engine.pages import Geometry
from jmoe.serve.engine.settings import EngineSettings

DEFAULT_BYTES = 2**28
"""Where the device does not say how much memory it has, as a CPU does not."""

ROUND = 2**28
"""Of what a device has left, which differs a little each time: programs are compiled for a number of pages, and those
for the same number are found in JAX's cache."""

WINDOWED_SHARE = 4
"""With prefix caching one windowed page for so many full ones: prompts may go on from so much of what is kept."""

LONGEST = 2**17
"""Tokens of a text where neither settings nor the model bound it."""


def cache_budget(settings: EngineSettings) -> int:
    """Bytes for keys and values, once weights and adapters are on the device.

    Raises:
      ValueError: less than nothing is left.
    """
    if settings.cache_bytes is not None:
        return settings.cache_bytes
    memory = jax.devices()[0].memory_stats()
    if memory is None or "bytes_limit" not in memory:
        return DEFAULT_BYTES
    whole, used = memory["bytes_limit"], memory["bytes_in_use"]
    left = min(int(settings.cache_fraction * whole) - used, unbroken(memory)) // ROUND * ROUND
    if left <= 0:
        raise ValueError(
            f"cache_fraction {settings.cache_fraction} of {byte_size(whole)} leaves nothing beside the "
            f"{byte_size(used)} in use"
        )
    return left


def unbroken(memory: Mapping[str, int]) -> int:
    """Bytes that an array may have: JAX's allocator keeps what it took while weights were loaded, in pieces, and takes
    a piece from the device where those that are free are too small.

    memory: a device's memory_stats, with bytes_limit.
    """
    largest = memory.get("largest_free_block_bytes", 0)
    if "pool_bytes" not in memory:
        return largest or memory["bytes_limit"]  # zero of an allocator that does not count
    return max(largest, memory["bytes_limit"] - memory["pool_bytes"])


def plan_geometry(config: Config, dtype: DTypeLike, settings: EngineSettings, budget: int) -> Geometry:
    """Pages that take no more than the budget, in bytes.

    Windowed layers get what all rows and a chunk need beside each other, and with prefix caching more, but at most half
    of the memory where it is short.

    Raises:
      ValueError: they do not hold one sequence of max_model_len.
    """
    period = shortest_period(config.windows)
    windows = config.windows[:period]
    one = page_bytes(config, period, dtype)
    full_bytes = one * sum(window is None for window in windows)
    windowed_bytes = one * sum(window is not None for window in windows)
    window = next((window for window in windows if window is not None), None)
    longest = settings.max_model_len or config.max_position_embeddings or LONGEST
    columns = 1 if window is None else span(window - 1 + max(settings.chunk_sizes))
    least = 0 if window is None else span(window - 1 + min(max(settings.chunk_sizes), longest))
    windowed = 0
    if window is not None:
        windowed = columns + settings.max_sequences * (span(window) + 1)
        if settings.prefix_caching:
            windowed = max(windowed, budget // (WINDOWED_SHARE * full_bytes + windowed_bytes))
        windowed = max(least, min(windowed, (budget // windowed_bytes - 1) // (2 if full_bytes else 1)))
    needed = -(-longest // PAGE_SIZE)
    # Page 0 of each kind holds nothing.
    left = budget - (windowed + 1) * windowed_bytes - full_bytes
    full = left // full_bytes if full_bytes else needed * settings.max_sequences
    if not settings.prefix_caching:
        full = min(full, needed * settings.max_sequences)
    if settings.max_model_len is None:
        needed = max(1, min(needed, full))
    if full < needed or left < 0:
        wanted = (needed + 1) * full_bytes + (least + 1) * windowed_bytes
        raise ValueError(
            f"the cache must hold one sequence of {longest if settings.max_model_len else PAGE_SIZE} tokens, which "
            f"takes {byte_size(wanted)}, got {byte_size(budget)}: give it more memory, or lower max_model_len"
        )
    return Geometry(
        page_size=PAGE_SIZE,
        window=window,
        full_pages=full + 1,
        windowed_pages=windowed + 1,
        full_columns=needed,
        windowed_columns=columns,
    )


def model_len(config: Config, settings: EngineSettings, geometry: Geometry) -> int:
    """Tokens of a prompt and its new ones at most."""
    longest = settings.max_model_len or config.max_position_embeddings or LONGEST
    return min(longest, geometry.full_columns * geometry.page_size)


def span(tokens: int) -> int:
    """Pages that so many consecutive tokens may lie in."""
    return -(-(tokens - 1) // PAGE_SIZE) + 1
