"""A norm and a narrow product of what it makes: one launch by Triton on CUDA; by XLA elsewhere."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.launch.calls import register, triton_or_xla
from jmoe.ops.launch.decode import launch_decode
from jmoe.ops.norm import rms_norm
from jmoe.ops.row_adapters import by_present_adapter
from jmoe.ops.target import Target

norm_linear_p = jex.core.Primitive("jmoe_norm_linear")
"""Operands as the plan names them, in the order of the parameter `names`. Results: those of `result_names`."""

norm_linear_p.multiple_results = True


class Narrow(NamedTuple):
    """Rows of a stack of weights to multiply by, `columns` of each adapter in a layer: scale * x W^T + bias.

    adapter_ids: each row's, -1 for none, where the product is zero; None: the first `columns` for all.
    """

    weight: Float[Array, "L P K"]
    columns: int
    scale: Float[Array, "L P"] | None = None
    bias: Float[Array, "L P"] | None = None
    adapter_ids: Int32[Array, " T"] | None = None


class NormLinear(NamedTuple):
    """x plus the addend [T, K], its norm [T, K], and the product [T, N] of the last there is; None for what is not."""

    sum: Any
    normal: Any
    product: Any


def norm_linear(
    x: Float[Array, "T K"],
    layer: Int32[Array, ""],
    *,
    addend: Float[Array, "T K"] | None = None,
    norm: Float[Array, "L K"] | None = None,
    eps: float = 0.0,
    narrow: Narrow | None = None,
    target: Target | None = None,
) -> NormLinear:
    """One layer's norm and product for few rows, each step summed in float32 and rounded once. It has no gradient.

    Args:
      norm, eps: the weight of all layers' norms, and what is added to the mean of squares.
      target: a GPU that may not be here, to lower for it; forces Triton.
    """
    given = {"x": x, "layer": layer.reshape(1), "addend": addend, "norm": norm}
    if narrow is not None:
        given |= {"weight": narrow.weight, "scale": narrow.scale, "bias": narrow.bias}
        given |= {"adapter_ids": narrow.adapter_ids}
    buffers = {name: array for name, array in given.items() if array is not None}
    names = tuple(buffers)
    columns = 0 if narrow is None else narrow.columns

    def xla(*operands: Array) -> Sequence[Array]:
        return norm_linear_by_xla(dict(zip(names, operands, strict=True)), columns, eps)

    operands = list(buffers.values())
    results = triton_or_xla(norm_linear_p, xla, operands, target, names=names, columns=columns, eps=eps)
    found = dict(zip(result_names(names), results, strict=True))
    return NormLinear(*(found.get(name) for name in NormLinear._fields))


def result_names(names: Sequence[str]) -> list[str]:
    """What comes of operands of these names."""
    makes = {"addend": "sum", "norm": "normal", "weight": "product"}
    return [result for name, result in makes.items() if name in names]


def norm_linear_by_xla(given: dict[str, Array], columns: int, eps: float) -> list[Array]:
    """norm_linear by plain operations, in x's dtype."""
    results = []

    def own(name: str) -> Array:
        return lax.dynamic_index_in_dim(given[name], given["layer"][0], keepdims=False)

    x = given["x"]
    if "addend" in given:
        results.append(x := x + given["addend"])
    if "norm" in given:
        results.append(x := rms_norm(x, own("norm"), eps))
    if "weight" in given:
        weight, scale, bias = (own(name) if name in given else None for name in ("weight", "scale", "bias"))

        def of_one(adapter: Array | int) -> Array:
            rows = adapter * columns
            part = lambda array: lax.dynamic_slice_in_dim(array, rows, columns)  # noqa: E731
            product = jnp.einsum(
                "tk,nk->tn",
                x,
                part(weight).astype(x.dtype),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            if scale is not None:
                product *= part(scale)
            if bias is not None:
                product += part(bias).astype(jnp.float32)
            return product.astype(x.dtype)

        if "adapter_ids" in given:
            assert weight is not None
            nothing = jnp.zeros((len(x), columns), x.dtype)
            results.append(by_present_adapter(given["adapter_ids"], len(weight) // columns, of_one, nothing))
        else:
            results.append(of_one(0))
    return results


def _avals(*avals: Any, names: tuple[str, ...], columns: int, **_: Any) -> list[Any]:
    x = avals[names.index("x")]
    return [x.update(shape=(x.shape[0], columns)) if name == "product" else x for name in result_names(names)]


norm_linear_p.def_abstract_eval(_avals)


def _launches(*operands: Array, names: tuple[str, ...], columns: int, eps: float, target: Target | None) -> list[Array]:
    buffers = dict(zip(names, operands, strict=True))
    rows, k = buffers["x"].shape
    written = launch_decode(
        "norm_linear",
        buffers,
        target,
        rows=rows,
        k=k,
        n=columns,
        weight_rows=buffers["weight"].shape[1] if columns else 0,
        eps=eps,
        **{name: name in buffers for name in ("addend", "norm", "scale", "bias", "adapter_ids")},
    )
    return [written[name] for name in result_names(names)]


register(norm_linear_p, _launches)
