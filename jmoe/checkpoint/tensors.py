"""Tensors of safetensors files: their headers, and their values in the dtypes that jmoe computes with."""

import json
import math
from pathlib import Path
from typing import NamedTuple, Self

import ml_dtypes
import numpy as np
from safetensors import safe_open

# safetensors asks numpy for a dtype called "bfloat16", which exists once ml_dtypes is imported.
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

READ_AS = {"F32": "BF16", "F16": "BF16", "F8_E8M0": "U8"}
"""Dtypes that are read as another: dense weights are rounded to bfloat16, scales are the bytes that they are."""

CHUNK = 1 << 24
"""Elements that are converted to bfloat16 at once."""


class Spec(NamedTuple):
    """A tensor's header: the dtype as safetensors spells it (BF16, U8, F32, ...) and the shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    @property
    def swapped(self) -> Self:
        """With the last two axes the other way round."""
        return self._replace(shape=(*self.shape[:-2], *self.shape[:-3:-1]))


def tensor_spec(shard: safe_open, name: str) -> Spec:
    """The header of one tensor of an open safetensors file."""
    header = shard.get_slice(name)
    return Spec(header.get_dtype(), tuple(header.get_shape()))


def read_tensor(file: Path, shard: safe_open, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a tensor of an open safetensors file: float32 and float16 as bfloat16, E8M0 scales as their bytes."""
    spec = tensor_spec(shard, name)
    if spec.dtype == "F8_E8M0":
        return read_bytes(file, name)[rows]
    if spec.dtype not in READ_AS:
        return shard.get_tensor(name) if rows == slice(None) else shard.get_slice(name)[rows]
    table = shard.get_slice(name)
    first, end, _ = rows.indices(spec.shape[0])
    result = np.empty((end - first, *spec.shape[1:]), BFLOAT16)
    step = max(1, CHUNK // max(1, math.prod(spec.shape[1:])))
    for start in range(first, end, step):
        stop = min(start + step, end)
        result[start - first : stop - first] = as_bfloat16(table[start:stop])
    return result


def as_bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to nearest even; beyond bfloat16's range it is infinite."""
    with np.errstate(all="ignore"):
        return array.astype(BFLOAT16)


def read_bytes(file: Path, name: str) -> np.ndarray:
    """A tensor of one byte an element as uint8: safetensors has no numpy dtype for some of those, E8M0 among them.

    The file is [length of the header, header, data]: https://github.com/huggingface/safetensors#format.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))[name]
        first, end = header["data_offsets"]
        stream.seek(8 + length + first)
        return np.frombuffer(stream.read(end - first), np.uint8).reshape(header["shape"])
