"""LoRA on the rows of a tile, which may be of several adapters."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jmoe.ops.experts import Lora
from jmoe.ops.xla.columns import matmul

type Factors = tuple[Float[Array, "A R K"], Float[Array, "A N R"], Float[Array, " A"]]
"""One expert's (a, b, scale) of every adapter."""

type FactorGradients = tuple[Float[Array, "A R K"] | None, Float[Array, "A N R"] | None]
"""Of a and b; None for what nobody wants."""


def gate_up_of(lora: Lora | None) -> Factors | None:
    """(a, b, scale) of gate_up, or None."""
    if lora is None or lora.gate_up_a is None or lora.gate_up_b is None or lora.gate_up_scale is None:
        return None
    return lora.gate_up_a, lora.gate_up_b, lora.gate_up_scale


def down_of(lora: Lora | None) -> Factors | None:
    """(a, b, scale) of down, or None."""
    if lora is None or lora.down_a is None or lora.down_b is None or lora.down_scale is None:
        return None
    return lora.down_a, lora.down_b, lora.down_scale


def shrink(x: Float[Array, "M K"], a: Float[Array, "R K"], scale: Float[Array, ""]) -> Float[Array, "M R"]:
    """scale x a^T, rounded to x's dtype as the kernels store it."""
    return (matmul(x, a, 1, 1) * scale).astype(x.dtype)


def add_adapters(
    z: Float[Array, "M N"], x: Float[Array, "M K"], factors: Factors | None, ids: Int32[Array, " M"] | None
) -> Float[Array, "M N"]:
    """z + scale (x a^T) b^T by each row's adapter, where it has one."""
    if factors is None or ids is None:
        return z

    def add(adapter: Int32[Array, ""], mine: Bool[Array, "M 1"], z: Float[Array, "M N"]) -> Float[Array, "M N"]:
        a, b, scale = _factors_of(factors, adapter, mine, x.dtype)
        return jnp.where(mine, z + matmul(shrink(x, a, scale), b, 1, 1), z)

    return _for_each_adapter(ids, add, z)


def add_adapter_gradients(
    dx: Float[Array, "M K"],
    gradients: FactorGradients,
    x: Float[Array, "M K"],
    dz: Float[Array, "M N"],
    dz_scale: Float[Array, "M 1"] | float,
    factors: Factors | None,
    ids: Int32[Array, " M"] | None,
) -> tuple[Float[Array, "M K"], FactorGradients]:
    """The transpose of add_adapters: what dz says of x, added to dx, and of a and b, added to the gradients.

    Args:
      dz_scale: what dz is of: its part in the factors' gradients is multiplied by this, that in dx is not.
    """
    if factors is None or ids is None:
        return dx, gradients

    def add(
        adapter: Int32[Array, ""], mine: Bool[Array, "M 1"], carry: tuple[Float[Array, "M K"], FactorGradients]
    ) -> tuple[Float[Array, "M K"], FactorGradients]:
        dx, (da, db) = carry
        a, b, scale = _factors_of(factors, adapter, mine, x.dtype)
        # Other rows are 0 before each product: their NaN times 0 would be NaN.
        own = lambda rows: jnp.where(mine, rows, 0).astype(x.dtype)  # noqa: E731
        d_shrunk = scale * matmul(own(dz), b, 1, 0)
        dx = dx + matmul(own(d_shrunk), a, 1, 0)
        if da is not None:
            da = da.at[adapter].add(matmul(own(dz_scale * d_shrunk), own(x), 0, 0))
        if db is not None:
            db = db.at[adapter].add(matmul(own(dz_scale * dz.astype(jnp.float32)), own(shrink(x, a, scale)), 0, 0))
        return dx, (da, db)

    return _for_each_adapter(ids, add, (dx, gradients))


def _for_each_adapter[C](
    ids: Int32[Array, " M"], body: Callable[[Int32[Array, ""], Bool[Array, "M 1"], C], C], carry: C
) -> C:
    """body(adapter, whose rows, carry) from the lowest to the highest adapter that a row has; -1 is none."""
    last = jnp.max(ids)
    first = jnp.min(jnp.where(ids >= 0, ids, last + 1))
    return lax.fori_loop(first, last + 1, lambda adapter, carry: body(adapter, (ids == adapter)[:, None], carry), carry)


def _factors_of(
    factors: Factors, adapter: Int32[Array, ""], mine: Bool[Array, "M 1"], dtype: jnp.dtype
) -> tuple[Float[Array, "R K"], Float[Array, "N R"], Float[Array, ""]]:
    """One adapter's factors. One that no row has may hold NaN, and is 0 here."""
    a, b, scale = (jnp.where(mine.any(), factor[adapter], 0) for factor in factors)
    return a.astype(dtype), b.astype(dtype), scale
