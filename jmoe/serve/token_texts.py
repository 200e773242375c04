"""Single tokens as text and bytes, for log-probabilities."""

import functools
from typing import Any


class TokenTexts:
    """The texts of a byte-level tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """Of what jmoe.text.load_tokenizer returns."""
        self._tokenizer = tokenizer
        self._added = {token: text for text, token in tokenizer.get_added_vocab().items()}
        self._bytes = {letter: byte for byte, letter in _byte_letters().items()}
        self.bytes = functools.lru_cache(2**15)(self._of_token)
        self.text = functools.lru_cache(2**15)(self._text)

    def _of_token(self, token: int) -> bytes:
        """The token's bytes; of one that the tokenizer lacks, none."""
        if token in self._added:
            return self._added[token].encode()
        letters = self._tokenizer.convert_ids_to_tokens(token)
        if letters is None:
            return b""
        if all(letter in self._bytes for letter in letters):
            return bytes(self._bytes[letter] for letter in letters)
        return str(self._tokenizer.decode([token])).encode()

    def _text(self, token: int) -> str:
        """The token's text, another for each token: `bytes:\\xe2\\x80` if it is part of a character."""
        content = self.bytes(token)
        if not content:
            return f"token_id:{token}"
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _byte_letters() -> dict[int, str]:
    """The printable character that byte-level vocabularies write for each byte, as GPT-2's does."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
