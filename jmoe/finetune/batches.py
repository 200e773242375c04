"""Batches without end, each a function of its step, and what is held back for validation."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from jmoe.finetune.packing import Packed


class Batch(NamedTuple):
    """B rows of jmoe.finetune.packing.Packed."""

    tokens: Int32[np.ndarray, "B length"]
    targets: Int32[np.ndarray, "B length"]
    weights: Float32[np.ndarray, "B length"]
    segment_ids: Int32[np.ndarray, "B length"]


def digest(*rows: Packed | Batch) -> str:
    """A text that other tokens, targets, weights or segments would not give."""
    state = hashlib.sha256()
    for arrays in rows:
        for array in arrays:
            state.update(f"{array.dtype}{array.shape}".encode())
            state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


class Batches:
    """The rows over and over, in another order each epoch.

    The stream is the epochs' orders one after the other, cut into batches: where an epoch ends within a batch, the next
    begins there, so that all batches have the same shape. A batch depends on the rows, batch_size, seed and step alone;
    to resume is to ask for the next step.
    """

    def __init__(self, packed: Packed, batch_size: int, seed: int) -> None:
        """Keeps the rows, without a copy.

        Args:
          batch_size: rows a batch; may be more than there are.
          seed: of the orders, at least 0.

        Raises:
          ValueError: there are no rows, or a number is out of range.
        """
        if not len(packed.tokens):
            raise ValueError("Batches needs at least one row, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        _check_seed(seed)
        self.packed = packed
        self.batch_size = batch_size
        self.seed = seed

    @property
    def rows(self) -> int:
        """Rows an epoch."""
        return len(self.packed.tokens)

    @property
    def steps_per_epoch(self) -> int:
        """The fewest steps that see every row: rows / batch_size, rounded up."""
        return -(-self.rows // self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, of the first row of a step's batch."""
        _check_step(step)
        return step * self.batch_size // self.rows

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0; its arrays are the caller's own.

        Raises:
          ValueError: the step is negative.
        """
        _check_step(step)
        first = step * self.batch_size
        places = (divmod(place, self.rows) for place in range(first, first + self.batch_size))
        rows = [_order(self.seed, epoch, self.rows)[place] for epoch, place in places]
        return Batch(*(array[rows] for array in self.packed))


def split[T](examples: Sequence[T], fraction: float, seed: int) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """(train, validation), each in the order of `examples`; which are held back depends on the seed and their number.

    Args:
      fraction: of the examples that are for validation, in [0, 1); above 0, one at least.
      seed: at least 0.

    Raises:
      ValueError: a number is out of range, or no example would be left to train on.
    """
    _check_seed(seed)
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    count = max(1, round(fraction * len(examples))) if fraction else 0
    if count >= len(examples):
        raise ValueError(f"{len(examples)} examples are too few to hold back {count} and train on the rest")
    held = set(_order(seed, 0, len(examples))[:count].tolist())
    train = tuple(example for i, example in enumerate(examples) if i not in held)
    return train, tuple(examples[i] for i in sorted(held))


@lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def _order(seed: int, epoch: int, rows: int) -> Int64[np.ndarray, " rows"]:
    """A permutation of the rows."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
    order.flags.writeable = False
    return order


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
