"""Compiled kernels on disk, without the lines of their sources, for jax-triton, whose own cache ends with the process.

A JAX program holds its kernels' PTX, so that JAX's persistent cache knows the program again only if the PTX is the same
to the byte. Triton writes the sources' paths and line numbers into it, and jax-triton adds Triton's IR, which has them
too: both are left out here.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from jmoe.ops import gluon

PIPELINE = hashlib.sha256(Path(gluon.__file__).read_bytes()).hexdigest()
"""Of what jmoe changes in how jax-triton compiles: a part of every key, as is the form of the files, version 1."""

FIELDS = ("binary", "name", "shared_mem_bytes", "global_scratch_size", "global_scratch_align", "tensordesc_meta")
"""Of jax-triton's CompilationResult: what a launch needs of it."""

_compiling = threading.RLock()
"""Held while Triton's switch for line numbers, one for all threads, is turned."""


def user_cache_directory() -> Path:
    """Where jmoe keeps what it measured and compiled for this user."""
    from jmoe.triton_src.user_cache import user_cache

    return user_cache()


def kernel_directory() -> Path:
    """Where compiled kernels lie: jmoe's folder in TRITON_CACHE_DIR, or else in the user's cache."""
    triton = os.environ.get("TRITON_CACHE_DIR")
    return Path(triton, "jmoe") if triton else user_cache_directory() / "kernels"


def keep_kernels_on_disk(triton_lib: ModuleType) -> None:
    """Has jax_triton.triton_lib read jmoe's kernels from disk and write them there; others as before.

    TRITON_ALWAYS_COMPILE compiles every kernel anew, as it does under Triton's own launcher.
    """
    compile_kernel = triton_lib.TritonFunction._compile_kernel
    if getattr(compile_kernel, "keeps_on_disk", False):
        return

    @functools.wraps(compile_kernel)
    def read_or_compile(self: Any, spec: Any, gpu_target: Any, backend: Any, backend_options: Any) -> Any:
        if not self.fn.__module__.startswith("jmoe."):
            return compile_kernel(self, spec, gpu_target, backend, backend_options)
        options = backend.parse_options(backend_options)
        key = key_of(self.fn, spec, backend, options)
        result = None if key is None or compiles_always(triton_lib) else read(key)
        if result is None:
            with _compiling, _without_lines():
                _, _, _, compiled = compile_kernel(self, spec, gpu_target, backend, backend_options)
            result = {field: getattr(compiled, field) for field in FIELDS}
            if key is not None:
                write(key, result)
        else:
            compiled = triton_lib.CompilationResult(**result, ttgir="", llir="")
        scratch = [] if (size := result["global_scratch_size"]) is None else [size, result["global_scratch_align"]]
        kernel = triton_lib.triton_kernel_call_lib.TritonKernel(
            result["name"],
            backend_options["num_warps"],
            backend_options["num_ctas"],
            result["shared_mem_bytes"],
            result["binary"],
            "",  # Triton's IR, which nobody reads
            gpu_target.arch,
            *scratch,
        )
        return kernel, "", options, compiled

    read_or_compile.keeps_on_disk = True  # type: ignore[attr-defined]
    triton_lib.TritonFunction._compile_kernel = read_or_compile


def compiles_always(triton_lib: ModuleType) -> bool:
    """Whether the user wants kernels compiled that are on disk: to compile them, or to see what is between."""
    import triton

    return triton.knobs.compilation.always_compile or triton_lib._JAX_TRITON_DUMP_DIR is not None


def key_of(kernel: Any, spec: Any, backend: Any, options: Any) -> str | None:
    """A hash of all that the compiled kernel depends on; None if something does not say what it is.

    The kernel's part is Triton's own: its source and that of all it calls, and beside it the global values that they
    use, of which Triton's has some. It has the line where each function begins, so that after an edit above a kernel
    Triton runs once more, to the same PTX.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars

    versions = [importlib.metadata.version(package) for package in ("triton", "jax-triton")]
    source = kernel.cache_key  # before the values, which it finds
    values = sorted((name, repr(value)) for (name, _), (value, _) in kernel.used_global_vals.items())
    arguments = repr((values, spec.signature, sorted(spec.attrs.items()), sorted(spec.constants.items())))
    if " at 0x" in arguments:  # an object's address, which says nothing of it
        return None
    environment = sorted(get_cache_invalidating_env_vars().items())
    parts = [PIPELINE, *versions, source, arguments, backend.hash(), options.hash(), repr(environment)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read(key: str) -> dict[str, Any] | None:
    """A compiled kernel's FIELDS; None if it is not there, or not whole."""
    try:
        result = json.loads(zlib.decompress((kernel_directory() / key).read_bytes()))
    except (OSError, ValueError, zlib.error):
        return None
    return result if isinstance(result, dict) and set(result) == set(FIELDS) else None


def write(key: str, result: dict[str, Any]) -> None:
    """Writes a compiled kernel whole or not at all, whoever writes it at the same time; not where nobody may write."""
    content = zlib.compress(json.dumps(result).encode())
    directory = kernel_directory()
    fresh = directory / f".{key}.{os.getpid()}.{threading.get_ident()}"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_bytes(content)
            fresh.replace(directory / key)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _without_lines() -> Iterator[None]:
    """Has Triton write no lines of sources into what it compiles meanwhile; a user's TRITON_DISABLE_LINE_INFO wins."""
    import triton

    with triton.knobs.compilation.scope():
        if "TRITON_DISABLE_LINE_INFO" not in os.environ:
            triton.knobs.compilation.disable_line_info = True
        yield
