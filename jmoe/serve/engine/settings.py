"""How large the engine is, and how busy."""

import dataclasses

from jmoe.gpt_oss.weights import TARGETS

CHUNK_SIZES = (64, 256, 512, 1024, 2048, 4096)
"""Tokens of the prefill programs."""

MOST_SEQUENCES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What is fixed when the engine starts.

    Attributes:
      cache_bytes: memory of keys and values, all layers together; None: by cache_fraction.
      cache_fraction: the part of the device's memory that weights, adapters, keys and values take together.
      max_sequences: how many run at once, at most 128.
      prefill_tokens: of prompts, computed at most between two steps of sequences that run.
      max_model_len: tokens of a prompt and its new ones; None: as many as the model is made for and the memory holds.
      max_loras: places for adapters; 0: programs without adapters.
      max_lora_rank: the ranks that a place holds.
      lora_targets: what places have room for adapters on, of jmoe.gpt_oss.weights.TARGETS.
      prefix_caching: prompts that begin alike share what was computed.
      queue_limit: requests that may wait.
      chunk_sizes: tokens of a chunk of prompts, a program each.

    Raises:
      ValueError: a value is out of range.
    """

    cache_bytes: int | None = None
    cache_fraction: float = 0.9
    max_sequences: int = 64
    prefill_tokens: int = 1024
    max_model_len: int | None = None
    max_loras: int = 0
    max_lora_rank: int = 16
    lora_targets: tuple[str, ...] = TARGETS
    prefix_caching: bool = True
    queue_limit: int = 1024
    chunk_sizes: tuple[int, ...] = CHUNK_SIZES

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, good, wanted in (
            ("cache_bytes", self.cache_bytes is None or self.cache_bytes > 0, "positive"),
            ("cache_fraction", 0 < self.cache_fraction < 1, "between 0 and 1"),
            ("max_sequences", 1 <= self.max_sequences <= MOST_SEQUENCES, f"from 1 to {MOST_SEQUENCES}"),
            ("prefill_tokens", self.prefill_tokens >= 1, "1 or more"),
            ("max_model_len", self.max_model_len is None or self.max_model_len >= 2, "2 or more"),
            ("max_loras", self.max_loras >= 0, "0 or more"),
            ("max_lora_rank", self.max_lora_rank >= 1, "1 or more"),
            ("lora_targets", self.lora_targets and set(self.lora_targets) <= set(TARGETS), f"some of {TARGETS}"),
            ("queue_limit", self.queue_limit >= 1, "1 or more"),
            ("chunk_sizes", self.chunk_sizes and min(self.chunk_sizes, default=0) >= 1, "positive"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """The engine at one moment, and what it has done since its start.

    Attributes:
      queued: requests that wait, those put back among them.
      running: requests that hold memory.
      pages_total: pages of the cache of full layers.
      pages_free: of these, those that a new sequence may take.
      cached_pages: of the free ones, those whose content a prompt may still share.
      prompt_tokens: of prompts, computed; what was put back is counted again.
      cached_tokens: of prompts, shared.
      new_tokens: given out.
      preemptions: sequences put back for lack of pages.
      compiled_programs: compiled or read from the cache by start.
      max_model_len: tokens of a prompt and its new ones.
    """

    queued: int = 0
    running: int = 0
    pages_total: int = 0
    pages_free: int = 0
    cached_pages: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    compiled_programs: int = 0
    max_model_len: int = 0
