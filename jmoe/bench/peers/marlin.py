"""Marlin as vLLM runs it for MXFP4 experts on Hopper: two grouped products on weights in its own layout.

Not installed by jmoe. Measured where vLLM is installed, or its compiled library is named. The bytes are random: their
order does not matter for the time, and the activation between the products and the sum after them are left out.
"""

import importlib
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jmoe.bench.peers.vllm_blocks import in_blocks

MODULES = ("vllm._moe_C", "vllm._moe_C_stable_libtorch")
"""Whose import registers the operation, in one release of vLLM or another."""

BLOCKS = (8, 16, 32, 48, 64)
"""Rows of a block; vLLM takes the first that an expert's average rows fill to less than nine tenths."""


def missing(library: Path | None = None) -> str | None:
    """Why the peer cannot run here, or None if it can; loads the operation from the library if one is named.

    Raises:
      OSError: the library cannot be read or loaded.
    """
    if not torch.cuda.is_available():
        return "no GPU"
    if library is not None and not registered():
        load(library)
    for module in MODULES:
        if not registered():
            try:
                importlib.import_module(module)
            except ImportError:
                continue
    return None if registered() else "not installed"


def registered() -> bool:
    """Whether torch knows the operation."""
    return hasattr(torch.ops._moe_C, "moe_wna16_marlin_gemm")


def load(library: Path) -> None:
    """Loads a library, one that ends in .xz by way of a temporary file."""
    if library.suffix != ".xz":
        torch.ops.load_library(str(library))
        return
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / library.stem
        unpacked.write_bytes(lzma.decompress(library.read_bytes()))
        torch.ops.load_library(str(unpacked))  # stays mapped after its file is gone


def float4_e2m1f() -> int:
    """vLLM's number for the type of the weights.

    From the lowest bit: 8 bits of how many bits the exponent has, 8 of the mantissa's, 1 whether signed, 32 of bias, 1
    whether there are no infinities, 8 of how NaNs are written (0: there are none).
    """
    exponent, mantissa, signed, bias, finite_only, nans = 2, 1, 1, 0, 1, 0
    return exponent | mantissa << 8 | signed << 16 | bias << 17 | finite_only << 49 | nans << 50


def padded(hidden: int, intermediate: int) -> tuple[int, int]:
    """The sizes vLLM pads a layer to: hidden to a multiple of 256, intermediate to one of 128."""
    return -(-hidden // 256) * 256, -(-intermediate // 128) * 128


def prepare(experts: int, hidden: int, intermediate: int) -> Callable[[torch.Tensor, torch.Tensor], Callable[[], None]]:
    """Makes weights and returns: (experts [T, k], weights [T, k]) -> a call of gate_up and down on random rows."""
    k, n = padded(hidden, intermediate)
    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    workspace = torch.zeros(4 * processors, dtype=torch.int32, device=device)

    def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.randint(-(2**31), 2**31 - 1, (experts, columns // 16, 2 * rows), device=device, dtype=torch.int32)
        scales = torch.randint(118, 124, (experts, columns // 32, rows), device=device, dtype=torch.uint8)
        return words, scales.view(torch.float8_e8m0fnu)

    gate_up, down = weight(2 * n, k), weight(k, n)

    def on(chosen: torch.Tensor, weights: torch.Tensor) -> Callable[[], None]:
        tokens, top_k = chosen.shape
        pairs = tokens * top_k
        block = next((b for b in BLOCKS if pairs / experts / b < 0.9), BLOCKS[-1])
        blocks = in_blocks(chosen, experts, block)
        floats: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        x, activations = torch.randn(tokens, k, **floats), torch.randn(pairs, n, **floats)
        z, out = torch.empty(pairs, 2 * n, **floats), torch.empty(pairs, k, **floats)

        def product(
            rows: torch.Tensor, out: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], *, down: bool
        ) -> None:
            words, scales = weight
            torch.ops._moe_C.moe_wna16_marlin_gemm(
                rows, out, words, None, scales, None, None, None, workspace, *blocks, weights,
                block, 1 if down else top_k, down, float4_e2m1f(), rows.shape[0], out.shape[1], rows.shape[1],
                False, True, False, -1, -1, -1,
            )  # fmt: skip

        def call() -> None:
            product(x, z, gate_up, down=False)
            product(activations, out, down, down=True)

        return call

    return on
