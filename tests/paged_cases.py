"""Attention to pages with exact answers: all that a sequence must not see is NaN."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Sizes(NamedTuple):
    """Of the heads, and of a page."""

    heads: int = 4
    key_heads: int = 2
    dim: int = 8
    page: int = 16


class Case(NamedTuple):
    """Operands of both operations by name, and what must come of them; float32.

    wanted: [rows, N, D], in float64.
    written: the cache with the new keys and values, elsewhere as given.
    """

    operands: dict[str, np.ndarray]
    wanted: np.ndarray
    written: np.ndarray


LAYER, SINKS_LAYER = 1, 2


def as_bfloat16(array: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values, as float32."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def decode_case(
    seed: int, positions: Sequence[int], window: int | None, columns: int, sizes: Sizes, *, narrow: bool = False
) -> Case:
    """Sequences whose latest tokens stand at these positions; -1: a row without a sequence.

    narrow: values, keys and products of the rotation are those of bfloat16.
    """
    builder = Builder(seed, len(positions), positions, window, columns, sizes, narrow)
    for row, position in enumerate(positions):
        if position >= 0:
            builder.sequence(row, row, row + 1, position)
    return builder.case(position=np.array(positions, np.int32))


def prefill_case(
    seed: int,
    lengths: Sequence[int],
    first: Sequence[int],
    tokens: int,
    window: int | None,
    columns: int,
    sizes: Sizes,
    *,
    narrow: bool = False,
) -> Case:
    """Sequences of so many tokens in the chunk, from these positions on; the chunk has so many tokens in all.

    narrow: as in decode_case.
    """
    last = [position + length - 1 for position, length in zip(first, lengths, strict=True)]
    builder = Builder(seed, tokens, last, window, columns, sizes, narrow)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    for sequence in range(len(lengths)):
        builder.sequence(sequence, offsets[sequence], offsets[sequence + 1], first[sequence])
    return builder.case(offsets=offsets, first_positions=np.array(first, np.int32))


class Builder:
    """A case in the making: heads, cache and tables that are NaN, or nobody's, but for the sequences put there."""

    def __init__(
        self,
        seed: int,
        rows: int,
        last: Sequence[int],
        window: int | None,
        columns: int,
        sizes: Sizes,
        narrow: bool,
    ) -> None:
        """last: the last position of each sequence."""
        self.generator = np.random.default_rng(seed)
        self.window, self.sizes = window, sizes
        self.round = as_bfloat16 if narrow else lambda array: array.astype(np.float32)
        heads, key_heads, dim, page = sizes
        wanted = sum(min(position // page + 1, columns) for position in last)
        # Some pages are nobody's, and page 0.
        count = 2 + wanted + wanted // 4
        self.free = iter(self.generator.permutation(np.arange(1, count)))
        self.pages = np.zeros((len(last), columns), np.int32)
        self.heads = np.full((rows, heads + 2 * key_heads, dim), np.nan, np.float32)
        angles = 6 * self.generator.random((rows, dim // 2))
        self.cosine, self.sine = (1.3 * turn(angles) for turn in (np.cos, np.sin))
        self.sinks = np.full((3, heads), np.nan, np.float32)
        self.sinks[SINKS_LAYER] = self.round(3 * self.generator.normal(size=heads))
        self.cache = np.full((2, count, key_heads, page, 2 * dim), np.nan, np.float32)
        self.new = self.cache.copy()
        self.wanted = np.zeros((rows, heads, dim))

    def normal(self, *shape: int) -> np.ndarray:
        return self.round(self.generator.normal(size=shape))

    def sequence(self, number: int, begin: int, end: int, first: int) -> None:
        """A sequence whose rows `begin` to `end` stand at positions from `first` on."""
        heads, key_heads, dim, _ = self.sizes
        self.heads[begin:end] = self.normal(end - begin, *self.heads.shape[1:])
        held = np.arange(0 if self.window is None else max(0, first - self.window + 1), first)
        before = self.normal(2, first, key_heads, dim)
        self.put(self.cache, number, held, before[0, held], before[1, held])
        q, k, v = np.split(self.heads[begin:end], (heads, heads + key_heads), axis=1)
        q, k = (self.rotated(part, begin, end) for part in (q, k))
        self.put(self.new, number, first + np.arange(end - begin), k, v)
        keys, values = np.concatenate([before[0], k]), np.concatenate([before[1], v])
        self.wanted[begin:end] = exact(q, keys, values, first, self.sinks[SINKS_LAYER], self.window)

    def put(self, cache: np.ndarray, number: int, positions: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """A sequence's keys and values [n, M, D] into its pages, which its table then has."""
        page = self.sizes.page
        columns = positions // page % self.pages.shape[1]
        for column in np.unique(columns):
            self.pages[number, column] = self.pages[number, column] or next(self.free)
        both = np.concatenate([keys, values], axis=-1)
        cache[LAYER, self.pages[number, columns], :, positions % page] = both

    def rotated(self, x: np.ndarray, begin: int, end: int) -> np.ndarray:
        """x [n, heads, D] with its halves turned against each other, by factors rounded as it is, rounded once."""
        first, second = np.split(x, 2, axis=-1)
        cosine, sine = (self.round(factor[begin:end])[:, None] for factor in (self.cosine, self.sine))
        return self.round(np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1))

    def case(self, **rows: np.ndarray) -> Case:
        operands = {
            "heads": self.heads,
            "cosine": self.cosine.astype(np.float32),
            "sine": self.sine.astype(np.float32),
            "cache": self.cache,
            "layer": np.array(LAYER, np.int32),
            **rows,
            "pages": self.pages,
            "sinks": self.sinks,
            "sinks_layer": np.array(SINKS_LAYER, np.int32),
        }
        return Case(operands, self.wanted, np.where(np.isnan(self.new), self.cache, self.new))


def exact(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, first: int, sinks: np.ndarray, window: int | None
) -> np.ndarray:
    """Of queries [n, N, D] at positions from `first` on, to keys and values [first + n, M, D], in float64."""
    group = q.shape[1] // keys.shape[1]
    k, v = (np.repeat(part.astype(np.float64), group, axis=1) for part in (keys, values))
    scores = np.einsum("qnd,snd->nqs", q.astype(np.float64), k, optimize=True) / math.sqrt(q.shape[-1])
    query, key = first + np.arange(len(q))[:, None], np.arange(len(keys))
    seen = (key <= query) & (key > query - (window or len(keys) + 1))
    scores = np.where(seen, scores, -np.inf)
    sink = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (*scores.shape[:2], 1))
    both = np.concatenate([scores, sink], axis=-1)
    weights = np.exp(both - both.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True))[..., :-1]
    return np.einsum("nqs,snd->qnd", weights, v, optimize=True)
