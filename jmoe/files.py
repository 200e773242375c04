"""Files written whole or not at all, and errors that name them."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file


@contextlib.contextmanager
def naming(file: str | os.PathLike[str]) -> Iterator[None]:
    """Gives errors of writing and reading the file's name, which those that come from an open file lack.

    Raises:
      OSError: of the kind that it was, with the name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(file)) from error


def replace(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all: what was there stays until all of the new one is on disk.

    Raises:
      OSError: it cannot be written; the error names it.
    """
    fresh = file.with_name(file.name + ".new")
    with naming(file):
        try:
            fresh.write_bytes(content)
            fresh.replace(file)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise


def copy(source: Path, file: Path) -> None:
    """Copies a file's content.

    Raises:
      OSError: it cannot be read or written; the error names it.
    """
    with naming(file):
        shutil.copyfile(source, file)


def write_tensors(file: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a safetensors file whole or not at all.

    Raises:
      OSError: it cannot be written; the error names it.
    """
    fresh = file.with_name(file.name + ".new")
    fresh.touch()
    mode = fresh.stat().st_mode  # what any new file may be done with; safetensors' are for their owner alone
    try:
        with naming(file):
            save_file(dict(arrays), fresh, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{file} could not be written: {error}") from None
    fresh.chmod(mode)
    fresh.replace(file)
