"""A model that says what a test wants: jmoe.gpt_oss.generate without one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from jmoe.text import encode


class Call(NamedTuple):
    """What was asked of the model: the prompts, as texts with special tokens and as tokens, and the options."""

    prompts: list[str]
    tokens: list[list[int]]
    options: dict[str, Any]


def say(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, reply: Callable[[str], str], chunk: int = 5) -> list[Call]:
    """Lets the evaluation's models reply to a prompt's text with a text; returns the calls, which come later."""
    calls: list[Call] = []

    def generate(
        model: object,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int],
        callback: Callable[[np.ndarray, np.ndarray], np.ndarray],
        **options: Any,
    ) -> None:
        texts = [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
        calls.append(
            Call(
                texts,
                [list(prompt) for prompt in prompts],
                options | {"max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens},
            )
        )
        tokens = np.full((len(prompts), max_new_tokens), stop_tokens[0])
        for row, text in zip(tokens, texts, strict=True):
            own = encode(tokenizer, reply(text))[:max_new_tokens]
            row[: len(own)] = own
        is_text = np.cumsum(np.isin(tokens, stop_tokens), axis=1) == 0
        for start in range(0, max_new_tokens, chunk):
            if callback(tokens[:, start : start + chunk], is_text[:, start : start + chunk]).all():
                break

    monkeypatch.setattr("jmoe.evaluate.generation.generate", generate)
    return calls
