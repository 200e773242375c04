"""Spares XLA's compiler, which is most of the tests' time: they compile many programs and run each for milliseconds."""

import gc
import os
from pathlib import Path

UNOPTIMISED = "--xla_backend_optimization_level=0"
DIRECTORY = Path(__file__).parent.parent / "build" / "tests"

MOST_MAPPINGS = 20_000
"""Of memory, after which programs are forgotten: each is mapped, and Linux lets a process have 65,530 mappings."""


def spare_the_compiler() -> None:
    """Has programs compiled unoptimised, and each once, here and in the processes that tests start.

    What a GPU runs is left as it is. Each of pytest-xdist's processes has a directory of its own, as JAX may read what
    another process is still writing. It stays: the next `make test` compiles what has changed.
    """
    if list(Path("/dev").glob("nvidia*")):
        return
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    os.environ |= {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {UNOPTIMISED}".strip(),
        "JAX_COMPILATION_CACHE_DIR": str(DIRECTORY / worker),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def optimised() -> dict[str, str]:
    """The environment for a process whose programs run for longer than they are compiled."""
    return os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(UNOPTIMISED, "").strip()}


def forget_if_many() -> None:
    """Lets go of all compiled programs where they are so many that the process would soon not get memory for more."""
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") < MOST_MAPPINGS:
        return
    import jax

    jax.clear_caches()
    gc.collect()
