"""When, where and of what a figure was taken, and the file that says so.

python -m jmoe.bench.record prints it as JSON.
"""

import datetime
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import jax

from jmoe.checkpoint.config_file import read_json
from jmoe.files import replace

PACKAGES = ("jax", "jax-triton", "triton", "torch", "triton_kernels", "vllm")


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


def start(certificate: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """Results: a certificate and no rows, or those of `out` if it exists.

    Raises:
      ValueError: `out` holds no JSON object, or figures of another certificate, but for its date.
    """
    results = {**certificate, "rows": []}
    if out is None or not out.exists():
        return results
    earlier = read_json(out)
    for key, value in certificate.items():
        if key != "date" and earlier.get(key) != value:
            raise ValueError(
                f"{out} holds figures of {key} {earlier.get(key)}, this run is of {value}: "
                "remove the file or name another"
            )
    return {**results, "rows": earlier["rows"]}


def write(file: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON that diffs well; a run that is killed leaves the old file or the new one.

    Raises:
      OSError: it cannot be written; the error names it.
    """
    replace(file, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    print(json.dumps(birth_certificate()))
