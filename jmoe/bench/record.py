"""When, where and of what a figure was taken."""

import datetime
import importlib.metadata
import subprocess
from pathlib import Path

import jax

PACKAGES = ("jax", "jax-triton", "triton", "torch")


def birth_certificate() -> dict[str, object]:
    """Date, commit of the checkout (None outside one), device and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "versions": {package: version(package) for package in PACKAGES},
    }


def commit() -> str | None:
    """The checkout's commit, or None where the package does not lie in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
