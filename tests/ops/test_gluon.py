"""Gluon kernels under jax-triton."""

import types
from typing import Any

import pytest

from jmoe.ops.gluon import compile_gluon_as_gluon


class Module:
    """A module as Triton's front end (None) or Gluon's (4) leaves it."""

    def __init__(self, warps: int | None) -> None:
        self.warps = warps

    def get_int_attr(self, name: str) -> int | None:
        assert name == "ttg.num-warps"
        return self.warps


class Backend:
    """Says which passes it ran."""

    def make_ttir(self, module: Module, *_: Any) -> list[str]:
        return ["ttir"]

    def make_ttgir(self, module: list[str], *_: Any) -> list[str]:
        return [*module, "ttgir"]

    def gluon_to_ttgir(self, module: Module, *_: Any) -> list[str]:
        return ["gluon"]

    def make_llir(self, module: list[str], *_: Any) -> list[str]:
        return [*module, "llir"]


def passes(module: Module, backend: Any, options: Any, capability: int) -> list[str]:
    """As jax_triton.triton_lib.compile_ttir_to_ptx_inplace."""
    ttgir = backend.make_ttgir(backend.make_ttir(module, {}, options, capability), {}, options, capability)
    return backend.make_llir(ttgir, {}, options, capability)


@pytest.mark.parametrize(("warps", "expected"), [(None, ["ttir", "ttgir", "llir"]), (4, ["gluon", "llir"])])
def test_only_gluon_modules_skip_tritons_layout_passes(warps: int | None, expected: list[str]) -> None:
    library = types.ModuleType("library")
    library.compile_ttir_to_ptx_inplace = passes  # type: ignore[attr-defined]
    compile_gluon_as_gluon(library)
    once = library.compile_ttir_to_ptx_inplace
    compile_gluon_as_gluon(library)
    assert library.compile_ttir_to_ptx_inplace is once
    assert once(Module(warps), Backend(), None, 90) == expected
