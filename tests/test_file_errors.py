"""Errors of the operating system say which file they are about."""

import errno
from pathlib import Path

import pytest

from jmoe.file_errors import naming


def test_a_full_disk_is_said_with_the_files_name() -> None:
    full = pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: 'dir/adapter'$")
    with full, naming(Path("dir/adapter")), Path("/dev/full").open("w") as file:
        file.write("more")


def test_an_error_that_names_a_file_or_has_no_number_stays() -> None:
    with pytest.raises(FileNotFoundError, match="'gone'"), naming(Path("other")):
        Path("gone").read_bytes()
    said = OSError("could not be written")
    with pytest.raises(OSError, match="could not be written") as caught, naming(Path("other")):
        raise said
    assert caught.value is said


def test_the_class_follows_the_number() -> None:
    with pytest.raises(PermissionError, match="'file'"), naming(Path("file")):
        raise OSError(errno.EACCES, "Permission denied")
