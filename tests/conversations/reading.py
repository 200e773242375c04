"""Rows alone, of files and of lines."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from jmoe.conversations.rows import Row, parse
from jmoe.conversations.sources import open_source


def parse_row(content: bytes | Mapping[str, Any]) -> Row:
    return parse(content).row


def read_rows(source: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of a source; errors name the row's place."""
    for record in open_source(source).records:
        try:
            row = parse(record.content).row
        except ValueError as error:
            raise ValueError(f"{record.place}: {error}") from error
        yield row
