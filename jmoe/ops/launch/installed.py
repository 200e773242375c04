"""Whether Triton and jax-triton are there and as jmoe knows them, and their import."""

import functools
import importlib.metadata
import inspect
import operator
import os
from types import ModuleType
from typing import Any

from jmoe.ops.gluon import compile_gluon_as_gluon
from jmoe.ops.launch.dead_code import accept_live_inputs
from jmoe.ops.launch.kernel_cache import FIELDS, keep_kernels_on_disk

OLDEST = {"jax-triton": (0, 4, 1), "triton": (3, 8)}
"""jax-triton 0.3.1 launches cannot be captured into CUDA graphs. Triton 3.7 has no gluon.aggregate and no
async_copy.async_load, and with both put in their places it does not compile all tiles of the packed kernels."""

TOO_NEW = {"jax-triton": (0, 5), "triton": (3, 10)}
"""The first versions that jmoe has not been tried with: it builds on more of both than they promise to keep."""

INSTALL = 'pip install "jmoe[cuda13]"'

BUILT_ON = {
    "triton_call": (
        "kernel", "out_type", "grid", "name", "num_warps", "num_stages", "backend_options", "compute_capability",
        "cost_estimate",
    ),
    "triton_lib.triton_kernel_call_p": (),
    "triton_lib.triton_kernel_call_lib": (),
    "triton_lib.compile_ttir_to_ptx_inplace": ("ttir", "cuda_backend", "cuda_options", "compute_capability"),
    "triton_lib.TritonFunction._compile_kernel": ("self", "spec", "gpu_target", "backend", "backend_options"),
    "triton_lib.KernelSpecialization": ("signature", "attrs", "constants"),
    "triton_lib.CompilationResult": (*FIELDS, "ttgir", "llir"),
    "triton_lib._JAX_TRITON_DUMP_DIR": (),
}  # fmt: skip
"""What jmoe calls or replaces of jax_triton, and the parameters that it must have."""


def check_installed() -> None:
    """Raises ImportError unless Triton and jax-triton are there, in versions that jmoe knows."""
    for package in OLDEST:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                f"the Triton backend needs {wanted(package)}, which is not installed: {INSTALL}"
            ) from None
        if not OLDEST[package] <= release(version) < TOO_NEW[package]:
            raise ImportError(f"the Triton backend needs {wanted(package)}, got {version}: {INSTALL}")


def wanted(package: str) -> str:
    """The versions of a package that jmoe knows, as in "triton >= 3.8, < 3.10"."""
    oldest, too_new = (".".join(map(str, bound[package])) for bound in (OLDEST, TOO_NEW))
    return f"{package} >= {oldest}, < {too_new}"


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (3, 8, 0) of "3.8.0+git1a2b"."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def import_jax_triton() -> Any:
    """jax_triton as jmoe needs it, and without what its import does: it deletes TRITON_CACHE_DIR.

    Raises:
      ImportError: it is not there, or lacks what jmoe builds on.
    """
    kept = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton
    import jax_triton.triton_lib

    if kept is not None:
        os.environ["TRITON_CACHE_DIR"] = kept
    adapt(jax_triton)
    return jax_triton


@functools.cache
def adapt(jax_triton: ModuleType) -> None:
    """Has jax-triton compile Gluon as Gluon, keep jmoe's kernels on disk, and lower bare calls on JAX 0.12.

    Raises:
      ImportError: it lacks what jmoe builds on.
    """
    check_built_on(jax_triton)
    compile_gluon_as_gluon(jax_triton.triton_lib)
    keep_kernels_on_disk(jax_triton.triton_lib)
    accept_live_inputs(jax_triton.triton_lib)


def check_built_on(jax_triton: ModuleType) -> None:
    """Raises ImportError unless jax_triton has all that jmoe calls or replaces of it, as jmoe knows it."""
    for name, parameters in BUILT_ON.items():
        try:
            found = operator.attrgetter(name)(jax_triton)
        except AttributeError:
            raise ImportError(unexpected(f"has no {name}")) from None
        if parameters and (lacking := set(parameters) - set(inspect.signature(found).parameters)):
            raise ImportError(unexpected(f"has a {name} without {', '.join(sorted(lacking))}"))


def unexpected(fault: str) -> str:
    """What is wrong with the jax-triton that is installed."""
    version = importlib.metadata.version("jax-triton")
    return f"jax-triton {version} {fault}, which jmoe builds on; it works with {wanted('jax-triton')}: {INSTALL}"
