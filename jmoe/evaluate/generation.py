"""Text that ends at any of some strings."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jmoe.gpt_oss.generate import generate
from jmoe.gpt_oss.model import GptOss


class Finished(Exception):
    """Every text has ended; ends jmoe.gpt_oss.generate from its callback."""


class Texts:
    """The texts of a batch as they grow, each cut at the first of the strings that end it."""

    def __init__(self, tokenizer: Any, until: Sequence[str], count: int) -> None:
        self.tokenizer = tokenizer
        self.until = [string for string in until if string]
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.texts = [""] * count
        self.ended = [False] * count

    def add(self, tokens: np.ndarray, is_text: np.ndarray) -> None:
        """Adds a chunk of tokens [B, n]; is_text: which of them come before the sequence's stop token.

        Rows past the number of texts are ignored.

        Raises:
          Finished: all texts have ended.
        """
        for i, ended in enumerate(self.ended):
            if ended:
                continue
            self.tokens[i] += tokens[i][is_text[i]].tolist()
            whole = self.tokenizer.decode(self.tokens[i], skip_special_tokens=True)
            self.texts[i] = cut(whole, self.until)
            self.ended[i] = self.texts[i] != whole or not is_text[i].all()
        if all(self.ended):
            raise Finished


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first occurrence of any of the strings."""
    return text[: min((text.find(string) for string in until if string in text), default=len(text))]


def generate_texts(
    model: GptOss, tokenizer: Any, prompts: Sequence[Sequence[int]], until: Sequence[str], **options: Any
) -> list[str]:
    """The text that follows each prompt, without special tokens, up to the first of the strings in `until`.

    Steps end once every text has.

    Args:
      options: of jmoe.gpt_oss.generate.
    """
    texts = Texts(tokenizer, until, len(prompts))
    with contextlib.suppress(Finished):
        generate(model, prompts, callback=texts.add, **options)
    return texts.texts
