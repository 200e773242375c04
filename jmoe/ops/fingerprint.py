"""What a program is made of that does not stand in it, as numbers that do."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import numpy as np

SOURCES = ("ops", "triton_src")
"""Folders of jmoe that decide what a layer's program is."""


def fingerprint(*content: str) -> np.ndarray:
    """uint32 [8]: a hash of the content, of jmoe's sources and of the versions of Triton and jax-triton.

    JAX's persistent cache knows a program by its text. What custom_partitioning will put in its place is not in it, but
    for a constant operand that is this.
    """
    text = "\n".join((_of_sources(), *content))
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)


@functools.cache
def _of_sources() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    for package in ("jax", "jax-triton", "triton"):
        try:
            digest.update(importlib.metadata.version(package).encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(b"none")
    return digest.hexdigest()
