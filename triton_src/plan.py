"""A launch as a value: what to run, on which buffers, at which size. Both frameworks launch the same plans."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that a launch writes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "bfloat16", "float32" or "int32"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch.

    operands: kernel parameter -> name of the buffer it reads, or None for an optional operand that is absent.
    scalars: kernel parameter -> 32-bit integer known when the launch is planned but kept out of the binary.
    outputs: kernel parameter -> buffer it writes; every element that a later launch makes use of is written.
    updates: those of the operands' parameters whose buffers the launch also writes, in place.
    constexprs: kernel parameter -> value compiled into the kernel.
    max_registers: a thread's registers, for more programs on a multiprocessor; None leaves it to the compiler.
    flops, bytes_accessed: estimates for profilers and schedulers.
    """

    kernel: Any
    grid: tuple[int, ...]
    operands: Mapping[str, str | None]
    outputs: Mapping[str, Buffer]
    constexprs: Mapping[str, Any]
    scalars: Mapping[str, int] = dataclasses.field(default_factory=dict)
    updates: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    flops: int = 0
    bytes_accessed: int = 0

    @property
    def name(self) -> str:
        """The kernel's name without its suffix."""
        return self.kernel.fn.__name__.removesuffix("_kernel")

    def check_names(self) -> None:
        """Raises TypeError unless the plan names each kernel parameter exactly once.

        jax-triton takes a misspelt operand for a metaparameter without a word.
        """
        given = [*self.operands, *self.scalars, *self.outputs, *self.constexprs]
        wanted = list(self.kernel.arg_names)
        if sorted(given) != sorted(wanted):
            missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
            raise TypeError(f"plan of {self.name}: missing {missing}, unknown {unknown}")


def cdiv(a: int, b: int) -> int:
    """The smallest integer that is at least a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()
