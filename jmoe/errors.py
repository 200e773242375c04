"""What an error says: its line of print, and values in its message."""

import reprlib
from collections.abc import Mapping
from typing import Any


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class BoundedRepr(reprlib.Repr):
    """reprlib's, which is bounded where a YAML file's aliases make a value endless; a dict's keys keep their order."""

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        """A dict as Python writes it."""
        if level <= 0:
            return "{...}"
        pairs = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in list(x)[: self.maxdict]]
        return "{" + ", ".join(pairs + ["..."] * (len(x) > self.maxdict)) + "}"


def in_short(value: Any, most: int = 80) -> str:
    """The value as Python writes it, in at most so many characters."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a whole number of {value.bit_length()} bits"
    writer = BoundedRepr(maxstring=1000, maxother=1000, maxlist=30, maxdict=30, maxlevel=4)
    try:
        text = writer.repr(value)
    except ValueError:  # a number within it that Python refuses to write
        return f"a {type(value).__name__} with a number too long to write"
    return text if len(text) <= most else f"{text[: most - 3]}..."
