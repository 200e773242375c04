"""Compiles Gluon kernels as Gluon under jax-triton, which knows one pipeline for all kernels."""

import functools
from types import ModuleType
from typing import Any


class GluonBackend:
    """Triton's CUDA backend for a Gluon module: its layouts are final, so that none of Triton's layout passes runs.

    jax-triton 0.4.1 sends Gluon modules through these passes too. On the packed kernels they put scales and tokens
    through shared memory, with up to 20 barriers in the loop where there are none.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def make_ttir(self, module: Any, metadata: dict[str, Any], options: Any, capability: int) -> Any:
        return module

    def make_ttgir(self, module: Any, metadata: dict[str, Any], options: Any, capability: int) -> Any:
        return self._backend.gluon_to_ttgir(module, metadata, options, capability)


def compile_gluon_as_gluon(triton_lib: ModuleType) -> None:
    """Makes jax_triton.triton_lib compile Gluon modules by their own pipeline; others, and a second call, unchanged."""
    compile_module = triton_lib.compile_ttir_to_ptx_inplace
    if getattr(compile_module, "knows_gluon", False):
        return

    @functools.wraps(compile_module)
    def compile_either(module: Any, backend: Any, options: Any, capability: int) -> Any:
        # Only Gluon modules have their number of warps before Triton's passes give it to them.
        is_gluon = module.get_int_attr("ttg.num-warps") is not None
        return compile_module(module, GluonBackend(backend) if is_gluon else backend, options, capability)

    compile_either.knows_gluon = True  # type: ignore[attr-defined]
    triton_lib.compile_ttir_to_ptx_inplace = compile_either  # type: ignore[attr-defined]
