"""Parity of packed experts, as far as a machine without a GPU can see it."""

import dataclasses
import functools

import jax
import pytest

from jmoe.interop import parity
from jmoe.ops.random_layer import LayerShape, random_layer


def test_packed_experts_have_a_row_of_their_own() -> None:
    shape = LayerShape(7, hidden=96, intermediate=160, experts=3, top_k=2)
    layer = jax.jit(random_layer, static_argnums=0)(shape)
    (row,) = parity.compare(str(shape), layer, shape.top_k, ["packed"])
    assert (row.label, row.layout, row.name) == (str(shape), "packed", f"{shape}, packed")
    assert 0 < row.xla <= parity.LARGEST_ERROR
    assert (row.triton_jax, row.triton_torch, row.same_bits) == ("lowered only", "GPU only", "not run")
    wrong = dataclasses.replace(row, triton_jax=1.0, same_bits=False)
    assert all(failure.startswith(f"{shape}, packed: ") for failure in parity.failures(wrong))
    assert len(parity.failures(wrong)) == 3


def test_experts_are_packed_where_kernels_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    small = LayerShape(1, hidden=64, intermediate=64, experts=4, top_k=2)
    dense = dataclasses.replace(small, mxfp4=False)
    layers = [jax.eval_shape(functools.partial(random_layer, shape)) for shape in (small, dense)]
    assert [parity.layouts_read_here(layer) for layer in layers] == [("checkpoint",)] * 2
    monkeypatch.setattr(parity, "reads_packed_here", lambda: True)
    assert [parity.layouts_read_here(layer) for layer in layers] == [("checkpoint", "packed"), ("checkpoint",)]
