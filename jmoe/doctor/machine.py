"""What is installed and what is here: facts alone, for `jmoe doctor` to print."""

import dataclasses
import importlib.metadata
import platform
from pathlib import Path

import jax

from jmoe.gpt_oss import flash_attention
from jmoe.ops.launch.installed import INSTALL
from jmoe.ops.launch.local_gpu import tiles_here, why_no_triton

PACKAGES = (
    "jmoe", "jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton", "flax", "transformers", "tokenizers",
    "safetensors", "torch", "dew-flash-attn-cu13",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that JAX sees; the bytes that JAX may take of its memory, None where JAX does not say."""

    name: str
    memory: int | None


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is here.

    versions: by package, None for one that is not installed.
    no_triton: why the Triton backend cannot run, None if it can.
    tiles: whose launch parameters it uses, None without it, or if they are invalid.
    no_flash: why attention to whole prompts cannot be FlashAttention's, None if it can.
    missing: what is not there and how to mend it.
    """

    versions: dict[str, str | None]
    devices: tuple[Device, ...]
    gpu: bool
    no_triton: str | None
    tiles: str | None
    no_flash: str | None
    missing: tuple[str, ...]


def examine_machine() -> Machine:
    """The facts of this machine."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    gpu = jax.default_backend() == "gpu"
    no_triton, no_flash = why_no_triton(), flash_attention.available()
    missing = []
    if gpu and no_triton is not None:
        missing.append(f"{no_triton} (until then jmoe's layers raise an error on this GPU)")
    if not gpu and Path("/dev/nvidia0").exists():
        missing.append(f"there is an NVIDIA GPU, /dev/nvidia0, that JAX does not see: {INSTALL}")
    if "9.0" in flash_attention.capabilities() and no_flash is not None:
        missing.append(f"FlashAttention, for prompts and fine-tuning: {no_flash}")
    if versions["transformers"] is None:
        missing.append('text and chat templates need transformers: pip install "jmoe[model]"')
    devices = tuple(
        Device(f"{device.platform}: {device.device_kind}", (device.memory_stats() or {}).get("bytes_limit"))
        for device in jax.local_devices()
    )
    tiles = None
    if no_triton is None:
        try:
            tiles = tiles_here()
        except ValueError as error:
            missing.append(f"launch parameters (until then jmoe's layers raise an error on this GPU): {error}")
    return Machine(versions, devices, gpu, no_triton, tiles, no_flash, tuple(missing))


def version(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
