"""Whether Triton and jax-triton are there, and their import."""

import importlib.metadata
import os
from typing import Any

from jmoe.ops.gluon import compile_gluon_as_gluon

OLDEST = {"jax-triton": (0, 4, 1), "triton": (3, 7)}
"""jax-triton 0.3.1 launches cannot be captured into CUDA graphs; 0.4.1 needs Triton 3.7."""

INSTALL = 'pip install "jmoe[cuda13]"'


def check_installed() -> None:
    """Raises ImportError unless Triton and jax-triton are there and recent enough."""
    for package, oldest in OLDEST.items():
        wanted = ".".join(map(str, oldest))
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                f"the Triton backend needs {package} >= {wanted}, which is not installed: {INSTALL}"
            ) from None
        if release(version) < oldest:
            raise ImportError(f"the Triton backend needs {package} >= {wanted}, got {version}: {INSTALL}")


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (3, 8, 0) of "3.8.0+git1a2b"."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def import_jax_triton() -> Any:
    """jax_triton, compiling Gluon as Gluon, and without what its import does: it deletes TRITON_CACHE_DIR."""
    kept = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton
    import jax_triton.triton_lib

    compile_gluon_as_gluon(jax_triton.triton_lib)

    if kept is not None:
        os.environ["TRITON_CACHE_DIR"] = kept
    return jax_triton
