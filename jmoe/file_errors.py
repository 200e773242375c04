"""Errors of the operating system that say which file they are about."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Within it an OSError that names no file, as one for want of space while writing, is raised with this one's name.

    Raises:
      OSError: of the same class and number, with `file` as its filename.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error
