"""What an error says, for a line of print."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
