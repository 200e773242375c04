"""Paths that commands read from."""

from pathlib import Path

import typer


def input_path(value: str) -> Path:
    """The file or directory that an option names: for a typer.Option's `parser`, with metavar="<path>".

    pathlib takes an empty path for the current directory, and commands get one from a shell variable that is not set.

    Raises:
      typer.BadParameter: the path is empty.
    """
    if not value.strip():
        raise typer.BadParameter("must name a file or directory to read, got an empty path")
    return Path(value)
