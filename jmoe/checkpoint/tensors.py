"""Tensors of safetensors files: their headers, and their values in the dtypes that jmoe computes with."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
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


def tensor_spec(shard: "safe_open", name: str) -> Spec:
    """The header of one tensor of an open safetensors file."""
    header = shard.get_slice(name)
    return Spec(header.get_dtype(), tuple(header.get_shape()))


def read_tensor(file: Path, shard: "safe_open", name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Slices of a tensor of an open safetensors file: float32 and float16 as bfloat16, E8M0 scales as their bytes.

    index: of the first axes; what is outside it is not read.
    """
    spec = tensor_spec(shard, name)
    if spec.dtype == "F8_E8M0":
        return read_bytes(file, name, index[0] if index else slice(None))[(slice(None), *index[1:])]
    if spec.dtype not in READ_AS:
        return shard.get_slice(name)[index] if index else shard.get_tensor(name)
    table = shard.get_slice(name)
    rows, *others = index or (slice(None),)
    first, end, _ = rows.indices(spec.shape[0])
    shape = [len(range(*part.indices(size))) for part, size in zip(others, spec.shape[1:], strict=False)]
    result = np.empty((end - first, *shape, *spec.shape[1 + len(shape) :]), BFLOAT16)
    step = max(1, CHUNK // max(1, math.prod(result.shape[1:])))
    for start in range(first, end, step):
        stop = min(start + step, end)
        result[start - first : stop - first] = as_bfloat16(table[(slice(start, stop), *others)])
    return result


def as_bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to nearest even; beyond bfloat16's range it is infinite."""
    with np.errstate(all="ignore"):
        return array.astype(BFLOAT16)


def read_bytes(file: Path, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a tensor of one byte an element as uint8: safetensors has no numpy dtype for some, E8M0 among them.

    The file is [length of the header, header, data]: https://github.com/huggingface/safetensors#format.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))[name]
        count, *shape = header["shape"]
        first, end, _ = rows.indices(count)
        width = math.prod(shape)
        stream.seek(8 + length + header["data_offsets"][0] + first * width)
        return np.frombuffer(stream.read((end - first) * width), np.uint8).reshape(end - first, *shape)
