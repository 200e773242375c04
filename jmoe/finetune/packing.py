"""Examples of different lengths to rows of one length, several to a row, so that few positions are padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer

from jmoe.finetune.examples import Example


class Packed(NamedTuple):
    """R rows of one length, whose position i predicts targets[i] from the tokens of its segment up to tokens[i].

    Fields:
      tokens: int32 [R, length], 0 in padding.
      targets: int32 [R, length], the token that follows in the same example; 0 in padding.
      weights: float32 [R, length], 1 where the target is trained, else 0.
      segment_ids: int32 [R, length]: 1, 2, ... for a row's examples; its padding, at the end, is one segment more.
    """

    tokens: Int32[np.ndarray, "R length"]
    targets: Int32[np.ndarray, "R length"]
    weights: Float32[np.ndarray, "R length"]
    segment_ids: Int32[np.ndarray, "R length"]


def pack(examples: Sequence[Example], length: int) -> Packed:
    """Rows of `length` positions that hold every example once, whole.

    An example of n tokens takes n - 1 positions: its last token is a target alone. The same examples always give the
    same rows.

    Raises:
      ValueError: there are no examples, or one has fewer than 2 tokens or more than length + 1.
    """
    sizes = np.array([len(example.tokens) - 1 for example in examples], np.int64)
    _check_sizes(sizes, length)
    rows = best_fit(sizes, length)
    packed = Packed(*(np.zeros((len(rows), length), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32)))
    for row, members in enumerate(rows):
        begin = 0
        for segment, member in enumerate(members, start=1):
            tokens, trained = examples[member]
            place = row, slice(begin, begin + len(tokens) - 1)
            packed.tokens[place] = tokens[:-1]
            packed.targets[place] = tokens[1:]
            packed.weights[place] = trained[1:]
            packed.segment_ids[place] = segment
            begin += len(tokens) - 1
        packed.segment_ids[row, begin:] = len(members) + 1
    return packed


def best_fit(sizes: Sequence[int] | Integer[np.ndarray, " n"], capacity: int) -> list[list[int]]:
    """Which sizes share a bin: the largest first, each into the bin that it fills most, or else into a new one.

    Args:
      sizes: each in [1, capacity].

    Returns:
      Each bin's members, as indices of `sizes`.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # that some bin has left, ascending
    bins_with: dict[int, list[int]] = {}
    for index in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = int(sizes[index])
        found = bisect_left(spaces, size)
        if found < len(spaces):
            space = spaces[found]
            chosen = bins_with[space].pop()
            if not bins_with[space]:
                del bins_with[space], spaces[found]
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if left := space - size:
            if left not in bins_with:
                insort(spaces, left)
                bins_with[left] = []
            bins_with[left].append(chosen)
    return bins


def _check_sizes(sizes: np.ndarray, length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not sizes.size:
        raise ValueError("pack needs at least one example, got none")
    wrong = np.flatnonzero((sizes < 1) | (sizes > length))
    if wrong.size:
        raise ValueError(
            f"examples must have 2 to {length + 1} tokens to fit rows of {length} positions, got {sizes[wrong[0]] + 1} "
            f"in examples[{wrong[0]}] ({wrong.size} of {sizes.size} do not)"
        )
