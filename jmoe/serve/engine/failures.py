"""Steps that fail: which of them are logged, and when the engine gives up."""

import logging
import re
from collections import Counter
from collections.abc import Sequence

from jmoe.errors import first_line
from jmoe.serve.engine.scheduler import Chunk, Step

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 3
"""Failures of one program without a success of it between them; the last of them is the engine's end."""

NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+")


class GaveUpError(Exception):
    """The device computes nothing useful any more."""


class Failures:
    """Counts failures in a row of each program, as prompts may be computed while every step of some size fails."""

    def __init__(self) -> None:
        """None yet."""
        self._in_a_row: Counter[str] = Counter()
        self._logged: set[tuple[str, str]] = set()

    def succeeded(self, plan: Step | Chunk) -> None:
        """A plan's results were read."""
        if self._in_a_row:
            self._in_a_row.pop(program(plan), None)

    def failed(self, plans: Sequence[Step | Chunk], error: Exception) -> None:
        """An error came of one of these plans. It is logged with its traceback if it is the first of its kind.

        Raises:
          GaveUpError: it is the last of MOST_IN_A_ROW.
        """
        kind = type(error).__name__, NUMBERS.sub("#", first_line(error))
        names = list(dict.fromkeys(map(program, plans))) or ["planning"]
        if kind not in self._logged:
            self._logged.add(kind)
            log.error(
                "a step has failed (%s); more errors of this kind are not logged", ", ".join(names), exc_info=error
            )
        self._in_a_row.update(names)
        name, count = self._in_a_row.most_common(1)[0]
        if count >= MOST_IN_A_ROW:
            raise GaveUpError(f"{name} failed {count} times in a row, the last time by {first_line(error)}") from error


def program(plan: Step | Chunk) -> str:
    """What computes a plan, in words."""
    return f"a step of {plan.size} rows" if isinstance(plan, Step) else f"a chunk of {plan.size} tokens of prompts"


def said(error: BaseException) -> str:
    """An error in a line."""
    return first_line(error) if isinstance(error, Exception) else type(error).__name__
