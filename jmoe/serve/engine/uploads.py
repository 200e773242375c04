"""What the host tells the device for a step, as one array of integers."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int32

from jmoe.serve.engine import row_options

STEP_WIDTH = 4
"""Integers of a row in a step: its place, the token's position or -1, its page of full layers and of windowed ones."""


@dataclasses.dataclass(frozen=True)
class ChunkLayout:
    """Where the parts of a chunk's upload lie.

    Attributes:
      tokens: of the chunk.
      pieces: sequences at most.
      full_columns, windowed_columns: of a sequence's tables.
    """

    tokens: int
    pieces: int
    full_columns: int
    windowed_columns: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parts in their order.

        tokens; offsets and first: see paged_prefill_attention; rows: the sequences' places; sampled: likewise, of those
        whose next token is wanted; full, windowed: their pages; options: see row_options.
        """
        return {
            "tokens": (self.tokens,),
            "offsets": (self.pieces + 1,),
            "first": (self.pieces,),
            "rows": (self.pieces,),
            "sampled": (self.pieces,),
            "full": (self.pieces, self.full_columns),
            "windowed": (self.pieces, self.windowed_columns),
            "options": (self.pieces, row_options.WIDTH),
        }

    @property
    def size(self) -> int:
        """Integers in all."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def split[T: (Array, np.ndarray)](self, upload: T) -> dict[str, T]:
        """The parts of an upload; of NumPy's arrays views, which may be written."""
        parts, before = {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            parts[name] = upload[before : before + size].reshape(shape)
            before += size
        return parts

    def empty(self, nobody: int) -> tuple[Int32[np.ndarray, " N"], dict[str, np.ndarray]]:
        """(an upload of no sequences, its parts); nobody: the row that is no sequence's."""
        upload = np.zeros(self.size, np.int32)
        parts = self.split(upload)
        parts["rows"][:] = parts["sampled"][:] = nobody
        return upload, parts


def step_upload(rows: Sequence[tuple[int, int, int, int]], size: int, nobody: int) -> Int32[np.ndarray, "B 4"]:
    """The rows of a step and, up to its size, rows without a sequence."""
    upload = np.empty((size, STEP_WIDTH), np.int32)
    upload[: len(rows)] = rows
    upload[len(rows) :] = (nobody, -1, 0, 0)
    return upload
