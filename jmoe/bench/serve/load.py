"""The requests that a server is measured by."""

import dataclasses
from collections.abc import Sequence

import numpy as np

SHORTEST, LONGEST = 4, 1024
"""Tokens of prompts and answers of lognormal lengths."""

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked.

    Attributes:
      url: of the server.
      models: names that requests ask for in turn; none: the server's first.
      requests: that are measured.
      warm_ups: more before them, that are not.
      concurrency: requests at once.
      input_len, output_len: tokens of each prompt and answer; the mean, where lengths are lognormal.
      sigma: 0 gives all the same lengths, else they are lognormal with this deviation of their logarithm.
      seed: of lengths and prompts.
    """

    url: str = "http://127.0.0.1:8000"
    models: tuple[str, ...] = ()
    requests: int = 256
    warm_ups: int = 16
    concurrency: int = 16
    input_len: int = 215
    output_len: int = 199
    sigma: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where there is nothing to measure."""
        for name, least in (("requests", 1), ("warm_ups", 0), ("concurrency", 1), ("input_len", 1), ("output_len", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.sigma < 0:
            raise ValueError(f"sigma must be 0 or more, got {self.sigma}")


@dataclasses.dataclass(frozen=True)
class Work:
    """One request: its prompt's tokens, the tokens of its answer, the model that it asks for."""

    prompt: list[int]
    output_len: int
    model: str


def words(count: int, seed: int) -> str:
    """So many made-up words, whose tokens prompts are made of."""
    draw = np.random.default_rng(seed)
    return " ".join("".join(draw.choice(SYLLABLES, draw.integers(1, 4))) for _ in range(count))


def lengths(draw: np.random.Generator, count: int, mean: int, sigma: float) -> list[int]:
    """Lengths of this mean: all the same, or lognormal ones within SHORTEST and LONGEST, as chats have."""
    if sigma == 0:
        return [mean] * count
    normal = draw.standard_normal(count)
    low, high = 0.0, 9.0
    for _ in range(60):  # the middle for which the mean of what is cut at both ends is the one that is asked for
        middle = (low + high) / 2
        found = np.clip(np.exp(middle + sigma * normal), SHORTEST, LONGEST).round()
        low, high = (middle, high) if found.mean() < mean else (low, middle)
    return found.astype(int).tolist()


def works(load: Load, tokens: Sequence[int], models: Sequence[str], count: int, seed: int) -> list[Work]:
    """Requests whose prompts are drawn from these tokens, so that no two begin alike for long."""
    draw = np.random.default_rng(seed)
    inputs = lengths(draw, count, load.input_len, load.sigma)
    outputs = lengths(draw, count, load.output_len, load.sigma)
    return [
        Work(draw.choice(tokens, size).tolist(), new, models[i % len(models)])
        for i, (size, new) in enumerate(zip(inputs, outputs, strict=True))
    ]
