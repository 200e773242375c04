"""The kernels' inline PTX on numpy: the instructions that they use, as the PTX ISA defines them, a lane an element.

Memory is read and written as a program's first thread does: of scalars alone.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

MASK = np.uint64(0xFFFFFFFF)


def run_ptx(text: str, constraints: str, inputs: Sequence[Any]) -> list[np.ndarray]:
    """The outputs of a block: uint32 for each constraint "=r", and uint16 for each "=h".

    inputs: 32-bit integers of one shape, of which the last 32 elements' worth of axes are a warp's lanes; or an
    address, which has an `array` and is `at` one of its elements.
    """
    outputs = [constraint for constraint in constraints.split(",") if constraint.startswith("=")]
    addresses = {f"[${len(outputs) + i}]": value for i, value in enumerate(inputs) if hasattr(value, "at")}
    arrays = {f"${len(outputs) + i}": value for i, value in enumerate(inputs) if not hasattr(value, "at")}
    shape = next(iter(arrays.values())).shape if arrays else ()
    registers = {name: array.view(np.uint32).astype(np.uint64) for name, array in arrays.items()}
    registers["%tid.x"] = np.zeros(shape, np.uint64)
    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        words = statement.strip().removeprefix("@p ").split(None, 1)
        if not words or words[0] in (".reg", ".shared", "bar.sync"):
            continue
        assert not statement.strip().startswith("@p ") or registers["p"].all()
        into, *operands = (part.strip() for part in re.findall(r"{[^}]*}|[^,{\s]+", words[1]))
        if words[0] == "st.shared.b32":
            registers[into] = registers[operands[0]]
            continue
        if words[0].startswith("red."):
            fetch_and_add(addresses[into], np.uint64(operands[0]))
            continue
        values = [addresses[name] if name in addresses else value_of(name, registers, shape) for name in operands]
        result = INSTRUCTIONS[words[0]](*values) & MASK
        if into.startswith("{"):
            low, high = (name.strip() for name in into.strip("{}").split(","))
            registers[low], registers[high] = result & np.uint64(0xFFFF), result >> np.uint64(16)
        else:
            registers[into] = result
    kinds = [np.uint32 if constraint.endswith("r") else np.uint16 for constraint in outputs]
    return [registers[f"${i}"].astype(kind) for i, kind in enumerate(kinds)]


def value_of(operand: str, registers: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """A register's value, that of two halves {low, high}, or a number."""
    if operand.startswith("{"):
        low, high = (registers[name.strip()] for name in operand.strip("{}").split(","))
        return low | high << np.uint64(16)
    return registers[operand] if operand in registers else np.full(shape, int(operand, 0), np.uint64)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt without its sign mode: byte i of the result is the byte of (b, a) that nibble i of the selector numbers."""
    both = a | b << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        chosen = selector >> np.uint64(4 * i) & np.uint64(7)
        result |= (both >> chosen * np.uint64(8) & np.uint64(0xFF)) << np.uint64(8 * i)
    return result


def select_bits(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: the bits of the table by those of a, b and c."""
    result = np.zeros_like(a)
    for i in range(8):
        here = [value if i >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
        result |= np.where(table >> np.uint64(i) & np.uint64(1), here[0] & here[1] & here[2], np.uint64(0))
    return result


def multiply_halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.rn.bf16x2: both halves; a product of two bfloat16 is exact in float32, so that it is rounded once."""
    result = np.zeros_like(a)
    for place in (np.uint64(0), np.uint64(16)):
        x, y = (
            (value >> place).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32).astype(np.float64)
            for value in (a, b)
        )
        product = (x * y).astype(np.float32).astype(ml_dtypes.bfloat16)
        result |= product.view(np.uint16).astype(np.uint64) << place
    return result


def larger_halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max.u16x2."""
    low, high = (value & np.uint64(0xFFFF) for value in (a, b)), (value >> np.uint64(16) for value in (a, b))
    return np.maximum(*low) | np.maximum(*high) << np.uint64(16)


def shuffle(value: np.ndarray, source: np.ndarray, clamp: np.ndarray, members: np.ndarray) -> np.ndarray:
    """shfl.sync.idx: each lane takes the value of the lane numbered by `source` in its segment."""
    assert (members == MASK).all()
    lanes = np.arange(32)
    segment = clamp.reshape(-1, 32).astype(np.int64) >> 8 & 31
    wanted = (lanes & segment) | (source.reshape(-1, 32).astype(np.int64) & ~segment)
    assert (wanted <= ((lanes & segment) | (clamp.reshape(-1, 32).astype(np.int64) & 31 & ~segment))).all()
    return np.take_along_axis(value.reshape(-1, 32), wanted, axis=1).reshape(value.shape)


def fetch_and_add(address: Any, value: np.ndarray) -> np.ndarray:
    """atom.add of an int32: what was there before."""
    memory = address.array.reshape(-1)
    before = memory[address.at].astype(np.uint64)
    memory[address.at] += int(value)
    return before


def signed(value: np.ndarray) -> np.ndarray:
    """32 bits as a number with a sign."""
    return value.astype(np.uint32).view(np.int32)


INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "ld.shared.b32": lambda a: a,
    "setp.eq.u32": lambda a, b: (a == b).astype(np.uint64),
    "setp.ge.s32": lambda a, b: (signed(a) >= signed(b)).astype(np.uint64),
    "setp.lt.or.s32": lambda a, b, c: (signed(a) < signed(b)).astype(np.uint64) | c,
    "selp.b32": lambda a, b, c: np.where(c, a, b),
    "bar.red.and.pred": lambda barrier, p: p,  # of threads that have all seen the same
    "atom.relaxed.gpu.global.add.u32": fetch_and_add,
    "ld.relaxed.gpu.global.b32": lambda address: address.array.reshape(-1)[address.at].astype(np.uint64),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "max.u16x2": larger_halves,
    "shl.b32": lambda a, b: a << b,
    "shf.r.wrap.b32": lambda a, b, c: (a | b << np.uint64(32)) >> (c & np.uint64(31)),
    "prmt.b32": permute_bytes,
    "lop3.b32": select_bits,
    "mul.rn.bf16x2": multiply_halves,
    "shfl.sync.idx.b32": shuffle,
}
