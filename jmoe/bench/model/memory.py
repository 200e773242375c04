"""Memory that a process has taken."""

from pathlib import Path

import jax

GIB = 2**30


def peak_gib() -> float | None:
    """The most that JAX has held on its device so far; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB or None


def in_use_gib() -> float | None:
    """What JAX holds on its device now; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0) / GIB or None


def anonymous_gib() -> float:
    """Host memory of this process that is not a file's, on Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / GIB
    raise RuntimeError("/proc/self/status has no RssAnon")
