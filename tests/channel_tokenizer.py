"""The tiny checkpoint's tokenizer with gpt-oss's control tokens."""

from pathlib import Path
from typing import Any

from jmoe.text import load_tokenizer

TINY = Path(__file__).parents[1] / "examples" / "tiny_gpt_oss"


def channel_tokenizer() -> Any:
    """A tokenizer with the control tokens of channels; those that the tiny one lacks are past its vocabulary."""
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_tokens(["<|channel|>", "<|constrain|>", "<|call|>"], special_tokens=True)
    return tokenizer
