"""What goes wrong with files, said with their names."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def naming(file: str | os.PathLike[str]) -> Iterator[None]:
    """Gives errors of writing and reading the file's name, which those that come from an open file lack.

    Raises:
      OSError: of the kind that it was, with the name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(file)) from error
