"""Options of the command that name files and directories."""

from pathlib import Path

import typer


def path(value: str) -> Path:
    """A path that is not empty: an empty one, as of a shell variable that is not set, is the current directory.

    For `typer.Option(parser=path)`.

    Raises:
      typer.BadParameter: it is empty.
    """
    if not value.strip():
        raise typer.BadParameter("a path must not be empty")
    return Path(value)
