"""The timing of forward and backward pass, on a CPU."""

import jax
import pytest

from jmoe.bench.case import Case, Matrix, Size
from jmoe.bench.gradient import GROUPED_MM, IMPLEMENTATIONS, MEMORY, RECOMPUTED
from jmoe.bench.grouped_mm import grouped_layer
from jmoe.bench.ours import PACKED
from jmoe.bench.run import run
from jmoe.bench.weights import Weights, random_input
from jmoe.interop import reference
from jmoe.interop.dlpack import to_torch
from tests.torch_layers import relative_error


@pytest.mark.slow
def test_time_and_memory_of_each_case() -> None:
    size = Size(64, 64, 2)
    rows = list(run(Matrix(size, (16,), (4,), (0, 4)), IMPLEMENTATIONS))
    assert [row.case.rank for row in rows] == [0, 4]
    for row in rows:
        found = row.microseconds
        assert all(float(found[name]) > 0 for name in (PACKED, RECOMPUTED, MEMORY.format(PACKED)))
    assert rows[0].microseconds[GROUPED_MM] == "GPU only"
    assert GROUPED_MM not in rows[1].microseconds


def test_torchs_grouped_products_are_the_layer() -> None:
    weights = Weights(Size(64, 96, 2), experts=4)
    experts = jax.tree.map(to_torch, weights.dense)
    products = [(experts.gate_up, experts.gate_up_bias), (experts.down, experts.down_bias)]
    x, (logits,) = (to_torch(array) for array in random_input(Case(4, 9), weights.size, draws=1))
    exact = reference.moe(x, logits, weights.torch_experts, top_k=2)
    # Everything between the launches is rounded to bf16.
    assert relative_error(grouped_layer(x, logits, products, weights.size), exact) <= 1e-2
