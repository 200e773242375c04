"""Tokens to text as they come."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer writes for bytes that are not a character, as the first bytes of one are none yet."""


class TextStream:
    """The text of a byte-level tokenizer's tokens, piece by piece; the pieces joined are the text of all of them."""

    def __init__(self, tokenizer: Any, *, show_special: bool = False) -> None:
        """A stream without tokens yet.

        Args:
          tokenizer: as jmoe.text.load_tokenizer returns it.
          show_special: whether special tokens are part of the text.
        """
        self._tokenizer = tokenizer
        self._show_special = show_special
        self._pending: list[int] = []
        self._given = 0

    def push(self, tokens: Sequence[int]) -> str:
        """What these tokens add to the text; a character whose bytes are not all there waits for the rest."""
        self._pending.extend(tokens)
        text = self._text()
        complete = text.rstrip(REPLACEMENT)
        piece = complete[self._given :]
        if complete == text:
            self._pending, self._given = [], 0
        else:
            self._given = len(complete)
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come: a replacement character for a character cut short."""
        piece = self._text()[self._given :]
        self._pending, self._given = [], 0
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(
            self._pending, skip_special_tokens=not self._show_special, clean_up_tokenization_spaces=False
        )
