"""Gluon kernels under jax-triton: the code that Triton's own compiler makes of them."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from jmoe.ops.gluon import compile_gluon_as_gluon
from jmoe.ops.launch.dead_code import accept_live_inputs
from jmoe.ops.launch.installed import import_jax_triton
from tests.cuda_launches import launches

N = 1024


@gluon.jit
def gluon_kernel(x_ptr, y_ptr, N: gl.constexpr):
    """One element a thread at a time, which Triton's own passes would change to four."""
    index = gl.arange(0, N, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y_ptr + index, gl.load(x_ptr + index) + 1)


@triton.jit
def triton_kernel(x_ptr, y_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(y_ptr + index, tl.load(x_ptr + index) + 1)


@pytest.fixture(autouse=True)
def _compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No kernel is found on disk, and PTX has no line numbers, which are of this file and which jmoe may leave out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")


def unpatched_jax_triton() -> ModuleType:
    """A jax_triton.triton_lib of its own, whatever was done to the process's."""
    spec = importlib.util.find_spec("jax_triton.triton_lib")
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    accept_live_inputs(library)  # which is another matter
    return library


def patched_jax_triton() -> ModuleType:
    """The same after jmoe's change."""
    library = unpatched_jax_triton()
    compile_gluon_as_gluon(library)
    return library


def ptx_by_triton(kernel: Any) -> bytes:
    """What Triton's own compiler makes of the kernel for compute capability 9.0."""
    source = GluonASTSource if kernel is gluon_kernel else ASTSource
    aligned = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "N": "constexpr"}
    compiled = triton.compile(source(kernel, signature, {"N": N}, aligned), target=GPUTarget("cuda", 90, 32))
    return str(compiled.asm["ptx"]).encode()


def launch_lowered(library: Any, kernel: Any) -> bytes:
    """The launch in a program lowered for CUDA, its PTX among it."""
    kernel._jT_kernel_cache = {}
    of_x = jax.ShapeDtypeStruct((N,), jnp.float32)
    call = lambda x: library.triton_call(  # noqa: E731
        x, kernel=kernel, out_type=of_x, grid=(1,), name="add", num_warps=4, compute_capability=90, N=N
    )
    (launch,) = launches(jax.jit(call).trace(of_x).lower(lowering_platforms=("cuda",)))
    return launch


def test_a_gluon_kernel_is_what_triton_itself_compiles() -> None:
    wanted = ptx_by_triton(gluon_kernel)
    assert wanted in launch_lowered(patched_jax_triton(), gluon_kernel)
    assert wanted in launch_lowered(import_jax_triton(), gluon_kernel)  # as jmoe launches


def test_without_the_patch_it_is_not() -> None:
    """Once this fails, jax-triton knows Gluon and needs no patch."""
    assert ptx_by_triton(gluon_kernel) not in launch_lowered(unpatched_jax_triton(), gluon_kernel)


def test_a_triton_kernel_is_compiled_as_before() -> None:
    wanted = ptx_by_triton(triton_kernel)
    assert wanted in launch_lowered(unpatched_jax_triton(), triton_kernel)
    assert wanted in launch_lowered(patched_jax_triton(), triton_kernel)


def test_a_second_call_changes_nothing() -> None:
    library = patched_jax_triton()
    once = library.compile_ttir_to_ptx_inplace
    compile_gluon_as_gluon(library)
    assert library.compile_ttir_to_ptx_inplace is once
