"""Names of pages by their content, by which sequences that begin alike find each other's."""

import hashlib
from array import array
from collections.abc import Sequence


class PageNames:
    """The names of one sequence's whole pages; they stay as it grows.

    Each is a digest of the one before and the page's tokens, so that it stands for all tokens up to the page's end.
    Keyed digests of 16 bytes: nobody can choose a prompt that finds the pages of another.
    """

    def __init__(self, identity: bytes, page_size: int) -> None:
        """identity: of what computes keys and values beside the model; at most 64 bytes."""
        self._last = identity
        self._page_size = page_size
        self._names: list[bytes] = []

    def between(self, first: int, end: int, tokens: Sequence[int]) -> list[bytes]:
        """The names of pages from `first` to before `end`, all of whose tokens are given, from the text's begin on."""
        size = self._page_size
        for page in range(len(self._names), end):
            content = array("q", tokens[page * size : (page + 1) * size]).tobytes()
            self._last = hashlib.blake2b(content, key=self._last, digest_size=16).digest()
            self._names.append(self._last)
        return self._names[first:end]
