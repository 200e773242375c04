"""One expert's projections on the rows of a tile, and their gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jmoe.ops.xla.adapters import FactorGradients, Factors, add_adapter_gradients, add_adapters
from jmoe.ops.xla.columns import ExpertWeight, matmul, times, times_transposed


@dataclasses.dataclass(frozen=True)
class Projection:
    """x W^T + LoRA + bias of one expert."""

    weight: ExpertWeight
    bias: Float[Array, " N"] | None
    factors: Factors | None

    def __call__(self, x: Float[Array, "M K"], ids: Int32[Array, " M"] | None) -> Float[Array, "M N"]:
        """The rows' results in float32. ids: the adapter of each row, -1 for none."""
        z = add_adapters(times_transposed(x, self.weight), x, self.factors, ids)
        return z if self.bias is None else z + self.bias.astype(jnp.float32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "bias", "factors"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class ProjectionGradient:
    """Sums in float32 over the rows of one expert, None for those that nobody wants; a pytree."""

    weight: Float[Array, "N K"] | None
    bias: Float[Array, " N"] | None
    factors: FactorGradients


def add_gradient(
    projection: Projection,
    gradient: ProjectionGradient,
    x: Float[Array, "M K"],
    dz: Float[Array, "M N"],
    dz_scale: Float[Array, "M 1"] | float,
    ids: Int32[Array, " M"] | None,
    is_own: Bool[Array, " M"],
) -> tuple[Float[Array, "M K"], ProjectionGradient]:
    """(dx in float32, the gradient with these rows' part added).

    Args:
      dz_scale: multiplies dz in the gradient, not in dx.
      is_own: rows that count; dx of others is arbitrary, and their NaN reaches nothing.
    """
    dx, factors = add_adapter_gradients(
        times(dz.astype(x.dtype), projection.weight), gradient.factors, x, dz, dz_scale, projection.factors, ids
    )
    own = lambda rows: jnp.where(is_own[:, None], rows, 0)  # noqa: E731
    scaled = own(dz_scale * dz.astype(jnp.float32))
    weight, bias = gradient.weight, gradient.bias
    if weight is not None:
        weight = weight + matmul(scaled.astype(x.dtype), own(x), 0, 0)
    if bias is not None:
        bias = bias + jnp.sum(scaled, axis=0)
    return dx, ProjectionGradient(weight, bias, factors)
