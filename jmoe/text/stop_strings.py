"""Text as it comes, up to the first of some strings."""

from collections.abc import Sequence


class StopStrings:
    """Gives out text piece by piece, but nothing of the string that ends it; the same however the text is cut.

    The string whose end comes first ends the text; of several that end together, the one that begins first. Text that
    may be the beginning of one is held back until more has come.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """No text yet; empty strings end nothing."""
        self._strings = [string for string in strings if string]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What these characters add to the text; nothing once `found` is the string that has ended it."""
        if not self._strings:
            return text
        given = ""
        for character in text:
            if self.found is not None:
                break
            given += self._add(character)
        return given

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _add(self, character: str) -> str:
        self._held += character
        ending = [string for string in self._strings if self._held.endswith(string)]
        if ending:
            self.found = max(ending, key=len)
            given, self._held = self._held.removesuffix(self.found), ""
            return given
        keep = max((_overlap(self._held, string) for string in self._strings), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given


def _overlap(text: str, string: str) -> int:
    """Characters at the end of the text that the string may begin with, the whole string left out."""
    return next((size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0)
