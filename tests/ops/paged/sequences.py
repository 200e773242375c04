"""Sequences whose keys and values lie in pages, in any order."""

import math
from typing import NamedTuple

import numpy as np


class Paged(NamedTuple):
    """pages [B, P] as paged_decode_attention has them; count: how many there are, page 0 among them."""

    pages: np.ndarray
    count: int


def random_pages(generator: np.random.Generator, sequences: int, columns: int) -> Paged:
    """Every sequence with a page in each of its columns, and as many pages again that are nobody's."""
    count = 1 + 2 * sequences * columns
    pages = generator.permutation(np.arange(1, count))[: sequences * columns].astype(np.int32)
    return Paged(pages.reshape(sequences, columns), count)


def put(
    cache: np.ndarray, layer: int, pages: np.ndarray, positions: np.ndarray, keys: np.ndarray, values: np.ndarray
) -> None:
    """One sequence's tokens into its pages [P]: keys and values [n, M, D] at positions [n]."""
    size = cache.shape[3]
    cache[layer, pages[positions // size % len(pages)], :, positions % size] = np.concatenate([keys, values], axis=-1)


def rotated(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """x [n, heads, D] with its halves turned against each other."""
    first, second = np.split(x, 2, axis=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def exact(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, first: int, sinks: np.ndarray, window: int | None
) -> np.ndarray:
    """Of queries [n, N, D] at positions from `first` on, to keys and values [first + n, M, D], in float64."""
    group = q.shape[1] // keys.shape[1]
    k, v = (np.repeat(part.astype(np.float64), group, axis=1) for part in (keys, values))
    scores = np.einsum("qnd,snd->nqs", q.astype(np.float64), k) / math.sqrt(q.shape[-1])
    query, key = first + np.arange(len(q))[:, None], np.arange(len(keys))
    seen = (key <= query) & (key > query - (window or len(keys) + 1))
    scores = np.where(seen, scores, -np.inf)
    sink = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (*scores.shape[:2], 1))
    both = np.concatenate([scores, sink], axis=-1)
    weights = np.exp(both - both.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True))[..., :-1]
    return np.einsum("nqs,snd->qnd", weights, v)
