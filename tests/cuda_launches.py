"""The Triton launches in a program that was lowered for CUDA."""

import re
import zlib
from collections.abc import Iterator
from typing import Any

import jax


def launches(lowered: jax.stages.Lowered) -> list[bytes]:
    """What jax-triton put into the program for each launch, in order; the kernel's PTX lies in it as text."""
    calls = [each for each in operations(lowered.compiler_ir().operation) if each.name == "stablehlo.custom_call"]
    configurations = [call.attributes["mhlo.backend_config"] for call in calls]
    return [zlib.decompress(configuration["opaque"].value_bytes) for configuration in configurations]


def kernel_names(lowered: jax.stages.Lowered) -> list[str]:
    """The name that each launch's PTX has for its kernel, which profilers show."""
    return [
        name.decode()
        for launch in launches(lowered)
        for name in re.findall(rb"^\.visible \.entry (\w+)\(", launch, re.M)
    ]


def operations(operation: Any) -> Iterator[Any]:
    """What an operation of MLIR holds, at any depth."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from operations(inner.operation)
