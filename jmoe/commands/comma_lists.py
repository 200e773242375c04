"""Options that take several values with commas between."""

import typer


def words(listed: str) -> list[str]:
    """What commas separate."""
    return [word.strip() for word in listed.split(",") if word.strip()]


def numbers(option: str, listed: str, *, least: int) -> tuple[int, ...]:
    """The integers of an option, increasing.

    Raises:
      typer.BadParameter: one of them is not an integer, or below the least.
    """
    for word in words(listed):
        if not (word.isascii() and word.isdigit() and int(word) >= least):
            raise typer.BadParameter(f"{option} takes integers from {least} on, with commas between, got {word!r}")
    return tuple(sorted({int(word) for word in words(listed)}))
