"""A checkpoint and its adapters to a service."""

import asyncio
import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from jmoe import gpt_oss
from jmoe.adapters.settings import LoraBLayout
from jmoe.gpt_oss.adapter import load_adapter
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layout import mesh_and_layout
from jmoe.gpt_oss.load import Quantize
from jmoe.gpt_oss.weights import LoraWeights
from jmoe.serve.engine import Engine, EngineSettings
from jmoe.serve.engine.placement import check_layout
from jmoe.serve.metrics import Metrics
from jmoe.serve.service import ModelFacts, Service
from jmoe.text import load_tokenizer

LEAST_RANK = 16
"""Of adapters that come later, if nothing else is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What to serve.

    Attributes:
      directory: of the checkpoint.
      root: what it was called by who started the server.
      names: what requests call it.
      adapters: PEFT directories by the names that requests call them by.
      engine: how large the engine is.
      max_lora_rank: the largest rank of an adapter; None: as the adapters are that are there, or LEAST_RANK if more.
      lora_b_layout, quantize: as in jmoe.gpt_oss.load.
      dtype: as in jmoe.gpt_oss.load.
      mesh: axes that the devices are split in, as model=2; None: one device.
    """

    directory: Path
    root: str
    names: tuple[str, ...]
    adapters: Mapping[str, Path]
    engine: EngineSettings
    max_lora_rank: int | None = None
    lora_b_layout: LoraBLayout | None = None
    quantize: Quantize | None = None
    dtype: DTypeLike = jnp.bfloat16
    mesh: str | None = None


def load_service(served: Served, loop: asyncio.AbstractEventLoop) -> Service:
    """Loads the model, and starts its engine with the adapters.

    Raises:
      FileNotFoundError, ValueError: as jmoe.gpt_oss.load, jmoe.gpt_oss.load_adapter and the engine do.
    """
    config = Config.load(served.directory)
    mesh, layout = mesh_and_layout(served.mesh, config)
    if mesh is not None and layout is not None:
        check_layout(mesh, layout)

    def read_adapter(path: str) -> LoraWeights:
        return load_adapter(path, config, lora_b_layout=served.lora_b_layout)

    with ThreadPoolExecutor(1) as beside:  # seconds, in which the weights can be read
        tokenizers = beside.submit(lambda: [load_tokenizer(served.directory) for _ in range(2)])
        adapters = {name: read_adapter(str(path)) for name, path in served.adapters.items()}
        rank = served.max_lora_rank or max([LEAST_RANK, *map(rank_of, adapters.values())])
        model = gpt_oss.load(served.directory, mesh=mesh, layout=layout, dtype=served.dtype, quantize=served.quantize)
        tokenizer, prompt_tokenizer = tokenizers.result()
    engine = Engine(model, dataclasses.replace(served.engine, max_lora_rank=rank))
    engine.start()
    for name, weights in adapters.items():
        engine.load_adapter(name, weights)
    facts = ModelFacts(
        names=served.names,
        root=served.root,
        vocab_size=config.vocab_size,
        stop_tokens=config.stop_tokens,
        max_model_len=engine.stats().max_model_len,
    )
    metrics = Metrics()
    metrics.watch(engine.stats)
    return Service(
        engine, facts, tokenizer, prompt_tokenizer, metrics, loop, read_adapter if served.engine.max_loras else None
    )


def rank_of(weights: LoraWeights) -> int:
    """The largest rank of an adapter."""
    return max(factor.shape[-2] for factor in weights.a.values())
