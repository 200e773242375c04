"""JAX's persistent cache: commands turn it on, and importing jmoe does not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jmoe.compilation_cache import keep_compiled_programs

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
WITHOUT_ADDRESSES = "jax_remove_custom_partitioning_ptr_from_cache_key"


@pytest.fixture(autouse=True)
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's options as they are, again after the test."""
    before = {name: getattr(jax.config, name) for name in (*OPTIONS, WITHOUT_ADDRESSES)}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_commands_keep_every_program_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jmoe" / "programs")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert getattr(jax.config, WITHOUT_ADDRESSES)


def test_what_the_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.config.update("jax_compilation_cache_dir", "/mine")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    keep_compiled_programs()
    assert [getattr(jax.config, name) for name in OPTIONS] == ["/mine", 3.0]


def test_where_nobody_may_write_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None


def test_importing_jmoe_sets_none_of_jaxs_options() -> None:
    program = """
import jax
before = {name: value for name, value in jax.config.values.items()}
import jmoe, jmoe.nn, jmoe.gpt_oss, jmoe.finetune
jmoe.moe, jmoe.pack
assert jax.config.values == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
