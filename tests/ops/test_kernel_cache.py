"""Compiled kernels on disk, and programs whose text is the same wherever jmoe lies."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jmoe.ops.launch import kernel_cache
from jmoe.ops.launch.kernel_cache import FIELDS, kernel_directory, read, write

ROOT = Path(__file__).parent.parent.parent
KERNEL = dict.fromkeys(FIELDS) | {"binary": ".version 9.0\n" * 1000, "name": "kernel", "shared_mem_bytes": 16}

LOWER = """
import functools, hashlib, json
import jax, jax.numpy as jnp
from jmoe.ops.launch.installed import import_jax_triton
from jmoe.ops.launch.layer import route_and_sort
from jmoe.ops.target import Target

library = import_jax_triton().triton_lib
compile_module, compiled = library.compile_ttir_inplace, []
library.compile_ttir_inplace = lambda *given: compiled.append(compile_module(*given)) or compiled[-1]
call = jax.jit(functools.partial(route_and_sort, top_k=4, target=Target("sm_90")))
shapes = jax.ShapeDtypeStruct((16, 32), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)
program = call.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
assert program.count("@triton_kernel_call_ffi") == 1
print(json.dumps([len(compiled), hashlib.sha256(program.encode()).hexdigest()]))
"""


def lower(source: Path, cache: Path) -> Any:
    """Lowers a program in a process of its own: how many kernels Triton compiled, and a hash of the program."""
    run = subprocess.run(
        [sys.executable, "-c", LOWER],
        env=os.environ | {"PYTHONPATH": str(source), "TRITON_CACHE_DIR": str(cache)},
        cwd=cache.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_another_folder_reads_what_was_compiled_and_a_line_above_a_kernel_changes_no_program(tmp_path: Path) -> None:
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "jmoe", elsewhere / "jmoe", symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "triton_src", elsewhere / "triton_src", ignore=ignored)
    first = lower(ROOT, cache)
    assert first[0] == 1
    assert lower(elsewhere, cache) == [0, first[1]]
    (kernel,) = (cache / "jmoe").iterdir()
    kernel.write_bytes(kernel.read_bytes()[:-100])  # cut off: compiled again
    for file in (elsewhere / "triton_src" / "routing").glob("*.py"):
        file.write_text("# A line above.\n" + file.read_text())
    assert lower(elsewhere, cache) == first


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path / "jmoe"


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-20], lambda content: b"x" + content])
def test_what_is_not_whole_is_not_there(cache: Path, damage: Any) -> None:
    assert read("key") is None
    write("key", KERNEL)
    assert read("key") == KERNEL
    file = cache / "key"
    file.write_bytes(damage(file.read_bytes()))
    assert read("key") is None
    write("key", KERNEL)
    assert read("key") == KERNEL


def test_those_who_write_at_once_leave_one_whole_file(cache: Path) -> None:
    threads = [threading.Thread(target=write, args=("key", KERNEL)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.name for file in cache.iterdir()] == ["key"]
    assert read("key") == KERNEL


def test_where_nobody_may_write_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    write("key", KERNEL)
    assert read("key") is None


def test_without_tritons_folder_kernels_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kernel_directory() == Path("/somewhere/jmoe/kernels")


def test_a_value_that_does_not_say_what_it_is_has_no_key() -> None:
    class Anything:
        """Of no use as a name, as its text is where it lies."""

    spec = type("Spec", (), {"signature": {"x": "*bf16"}, "attrs": {}, "constants": {"LAYOUT": Anything()}})
    kernel = type("Kernel", (), {"cache_key": "source", "used_global_vals": {}})
    hashed = type("Hashed", (), {"hash": staticmethod(lambda: "options")})
    assert kernel_cache.key_of(kernel, spec, hashed, hashed) is None
    spec.constants = {"LAYOUT": 3}  # type: ignore[attr-defined]
    one = kernel_cache.key_of(kernel, spec, hashed, hashed)
    kernel.used_global_vals = {("STEP", 1): (64, {})}  # type: ignore[attr-defined]
    assert one != kernel_cache.key_of(kernel, spec, hashed, hashed) is not None
