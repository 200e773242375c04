"""Options that name files or directories, for a typer.Option's `parser`, with metavar="<path>".

pathlib takes an empty path for the current directory, and commands get one from a shell variable that is not set.
"""

from pathlib import Path

import typer


def input_path(value: str) -> Path:
    """A path to read from. Raises typer.BadParameter if it is empty."""
    return _not_empty(value, "read")


def output_path(value: str) -> Path:
    """A path to write to. Raises typer.BadParameter if it is empty."""
    return _not_empty(value, "write to")


def _not_empty(value: str, what_for: str) -> Path:
    if not value.strip():
        raise typer.BadParameter(f"must name a file or directory to {what_for}, got an empty path")
    return Path(value)
