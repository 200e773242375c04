"""What jmoe asks of jax-triton and Triton: versions, and what of them it builds on."""

import importlib.metadata
import re
import tomllib
import types
from pathlib import Path

import pytest

from jmoe.ops.launch import installed
from jmoe.ops.launch.installed import TOO_NEW, adapt, check_built_on, check_installed, import_jax_triton, wanted

ROOT = Path(__file__).parent.parent.parent
VERSION = importlib.metadata.version("jax-triton")


def test_extras_end_where_the_door_does() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = {
        (name, text) for texts in extras.values() for text in texts if (name := re.split("[>=<]", text)[0]) in TOO_NEW
    }
    assert {name for name, _ in found} == set(TOO_NEW)
    # Written alike in the messages and in pyproject.toml, blanks aside.
    assert {text for _, text in found} == {wanted(name).replace(" ", "") for name in TOO_NEW}


@pytest.mark.parametrize(
    ("package", "found"), [("jax-triton", "0.5.0"), ("triton", "3.10.0"), ("triton", "4.0.0+git1")]
)
def test_versions_that_were_not_tried_are_refused(monkeypatch: pytest.MonkeyPatch, package: str, found: str) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found if name == package else real(name))
    message = f"the Triton backend needs {wanted(package)}, got {found}: pip install"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}"):
        check_installed()


def test_the_jax_triton_that_is_here_has_what_jmoe_builds_on() -> None:
    check_built_on(import_jax_triton())


def copy_of(module: types.ModuleType) -> types.ModuleType:
    """jax_triton with a triton_lib of its own, to take things out of."""
    copy, library = types.ModuleType(module.__name__), types.ModuleType("triton_lib")
    vars(library).update(vars(module.triton_lib))
    vars(copy).update(vars(module), triton_lib=library)
    return copy


def test_what_an_unexpected_jax_triton_lacks_is_named_with_the_versions_that_have_it() -> None:
    changed = copy_of(import_jax_triton())
    del changed.triton_lib.compile_ttir_to_ptx_inplace
    message = (
        f"jax-triton {VERSION} has no triton_lib.compile_ttir_to_ptx_inplace, which jmoe builds on; it works with "
        "jax-triton >= 0.4.1, < 0.5: pip install"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}"):
        adapt(changed)


def test_a_parameter_that_was_renamed_is_named() -> None:
    changed = copy_of(import_jax_triton())

    def triton_call(*args: object, kernel: object, out_shape: object, **kwargs: object) -> None: ...

    vars(changed)["triton_call"] = triton_call
    with pytest.raises(ImportError, match=r"has a triton_call without .*out_type, which jmoe builds on"):
        check_built_on(changed)


def test_the_doctor_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from jmoe.ops.launch import local_gpu

    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr(installed, "BUILT_ON", {"triton_lib.renamed": ()})
    adapt.cache_clear()
    try:
        assert "has no triton_lib.renamed, which jmoe builds on" in str(local_gpu.why_no_triton())
    finally:
        adapt.cache_clear()
