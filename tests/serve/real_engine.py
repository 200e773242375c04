"""Servers by jmoe's own engine on the tiny checkpoint and its adapter."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jmoe.serve.engine import EngineSettings
from jmoe.serve.load import Served, load_service
from jmoe.serve.service import Service
from jmoe.serve.settings import Settings
from tests.serve.serving import TINY, Serving, serving

SMALL = EngineSettings(
    cache_bytes=3 * 2**18,
    max_sequences=4,
    prefill_tokens=64,
    max_model_len=512,
    max_loras=2,
    chunk_sizes=(64,),
    queue_limit=256,
)
"""Few programs, which take most of the time, and 11 pages, of which the longest sequence takes 8."""

SERVED = Served(
    directory=TINY,
    root=str(TINY),
    names=("tiny",),
    adapters={"tuned": TINY / "adapter"},
    engine=SMALL,
)


@contextlib.contextmanager
def real_server(settings: Settings | None = None, dtype: DTypeLike = jnp.float32, **engine: Any) -> Iterator[Serving]:
    """A server that is ready, its engine's settings SMALL's but for these; in the end all its pages must be free."""
    served = dataclasses.replace(SERVED, engine=dataclasses.replace(SMALL, **engine), dtype=dtype)
    services: list[Service] = []

    def load(loop: asyncio.AbstractEventLoop) -> Service:
        services.append(load_service(served, loop))
        return services[0]

    try:
        with serving(load, settings, seconds=300) as server:
            yield server
        stats = services[0].engine.stats()
        assert (stats.queued, stats.running, stats.pages_free) == (0, 0, stats.pages_total)
    finally:
        for service in services:
            service.engine.stop()
