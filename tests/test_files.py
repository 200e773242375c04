"""A full disk: the error names the file, and what was there before stays."""

import contextlib
import errno
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jmoe import files, gpt_oss
from jmoe.bench import record

CASE = Path(__file__).parent / "data" / "tiny_case"


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: write() fails as on a full disk, with an error that names no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def replace(file: Path) -> None:
    files.replace(file, b"new" * 1000)


def write_figures(file: Path) -> None:
    record.write(file, {"rows": list(range(1000))})


def write_tensors(file: Path) -> None:
    files.write_tensors(file, {"a": np.zeros(1000)})


@pytest.mark.parametrize("write", [replace, write_figures, write_tensors])
def test_what_was_there_stays_and_the_error_names_the_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text("old")
    with room_for(1000), pytest.raises(OSError, match=re.escape(str(file))):
        write(file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    write(file)
    assert file.read_bytes() != b"old"


def test_a_merge_names_the_file_that_had_no_room(tmp_path: Path) -> None:
    # Compiled before, as JAX's cache on disk would have no room either.
    gpt_oss.merge(CASE / "model", CASE / "adapter", tmp_path / "whole", progress=False)
    with room_for(3000), pytest.raises(OSError, match=r"model-00000-of-00002\.safetensors"):
        gpt_oss.merge(CASE / "model", CASE / "adapter", tmp_path / "out", progress=False)
    assert not any((tmp_path / "out").iterdir())


def test_an_adapter_names_the_file_that_had_no_room(tmp_path: Path) -> None:
    lora = gpt_oss.load_adapter(CASE / "adapter", gpt_oss.Config.load(CASE / "model"))
    gpt_oss.save_adapter(tmp_path / "whole", lora)
    with room_for(3000), pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        gpt_oss.save_adapter(tmp_path / "out", lora)


def test_a_full_disk_is_said_with_the_files_name() -> None:
    full = pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: 'dir/adapter'$")
    with full, files.naming(Path("dir/adapter")), Path("/dev/full").open("w") as file:
        file.write("more")


def test_an_error_that_names_a_file_or_has_no_number_stays() -> None:
    with pytest.raises(FileNotFoundError, match="'gone'"), files.naming(Path("other")):
        Path("gone").read_bytes()
    said = OSError("could not be written")
    with pytest.raises(OSError, match="could not be written") as caught, files.naming(Path("other")):
        raise said
    assert caught.value is said


def test_the_class_follows_the_number() -> None:
    with pytest.raises(PermissionError, match="'file'"), files.naming(Path("file")):
        raise OSError(errno.EACCES, "Permission denied")
