"""How much of a GPU's memory JAX may take, and sizes of memory in words."""

import os

FRACTION = "0.95"
"""gpt-oss-120b needs more than JAX's own default of 0.75 of 80 GB."""

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def allow_whole_gpu() -> None:
    """Lets JAX take nearly all of a GPU that this process has to itself; what the user has set stands.

    To be called before JAX first sees the GPU.
    """
    if not any(name in os.environ for name in NAMES):
        os.environ[NAMES[0]] = FRACTION


def byte_size(size: int) -> str:
    """Bytes for people: GiB, or of little MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
