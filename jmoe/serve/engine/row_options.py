"""What is one sequence's own on the device: its adapter and how its tokens are drawn, as one row of integers."""

from typing import NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

from jmoe.serve.engine.request import SamplingParams

FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
WIDTH = len(FLOATS) + 5
"""Integers of a row: those floats' bits, top_k, the adapter, the number of biases, the seed's halves."""

LARGEST_TOP_K = 2**31 - 1


def pack_options(params: SamplingParams, seed: int, adapter: int) -> Int32[np.ndarray, " W"]:
    """A sequence's row.

    seed: of any size, of which 64 bits count.
    adapter: its place; -1: none.
    """
    floats = np.array([getattr(params, name) for name in FLOATS], np.float32).view(np.int32)
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    halves = np.array([high, low], np.uint32).view(np.int32)
    integers = [min(params.top_k, LARGEST_TOP_K), adapter, len(params.logit_bias)]
    return np.concatenate([floats, np.array(integers, np.int32), halves])


class RowOptions(NamedTuple):
    """The options of rows; fields as in SamplingParams.

    adapter: its place, -1 for none.
    biases: how many tokens logit_bias names.
    seed: the data of a key of jax.random.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    top_k: Int32[Array, " B"]
    adapter: Int32[Array, " B"]
    biases: Int32[Array, " B"]
    seed: UInt32[Array, "B 2"]

    @classmethod
    def unpack(cls, rows: Int32[Array, "B W"]) -> Self:
        """What pack_options has packed."""
        count = len(FLOATS)
        floats = lax.bitcast_convert_type(rows[:, :count], jnp.float32)
        seed = lax.bitcast_convert_type(rows[:, count + 3 :], jnp.uint32)
        top_k, adapter, biases = rows[:, count : count + 3].T
        named = dict(zip(FLOATS, floats.T, strict=True))
        return cls(**named, top_k=top_k, adapter=adapter, biases=biases, seed=seed)
