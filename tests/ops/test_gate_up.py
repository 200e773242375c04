"""Gate and up from halves to alternating rows: the same numbers, once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.ops.random_layer import LayerShape, random_layer
from tests.ops.test_activation import halves

SMALL = LayerShape(7, hidden=64, intermediate=96, experts=4, top_k=2, adapters=2, rank=3, mixed=True)


def test_halves_alternate_and_nothing_else_moves_packed_or_not() -> None:
    layer = random_layer(SMALL)
    apart = halves(layer)
    for got, want in ((jmoe.interleave(apart.experts), layer.experts), (jmoe.interleave(apart.lora), layer.lora)):
        assert all(map(jnp.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))
    on_host = jmoe.interleave(jax.tree.map(np.asarray, apart.experts))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    got = jmoe.pack(apart.experts, interleaved=False)
    assert all(map(jnp.array_equal, jax.tree.leaves(got), jax.tree.leaves(jmoe.pack(layer.experts))))


def test_what_cannot_be_halves_is_refused() -> None:
    experts = random_layer(SMALL).experts
    with pytest.raises(ValueError, match=r"experts\.gate_up must not be packed"):
        jmoe.interleave(jmoe.pack(experts))
    with pytest.raises(ValueError, match="gate_up must have an even number of rows"):
        jmoe.interleave(dataclasses.replace(experts, gate_up=jnp.zeros((1, 3, 32))))
