"""Where the arrays of a training step lie on a mesh, and sums of what its devices compute each of its own sequences."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jmoe.finetune.batches import Batch
from jmoe.gpt_oss.layout import AnyMesh, Layout
from jmoe.gpt_oss.model import GptOss
from jmoe.ops.mesh_axes import names_of


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """The split of a step's arrays by the model's layout.

    factors, frozen: of LoRA's factors and of all else of the model, a PartitionSpec in place of each variable.
    """

    mesh: Mesh
    layout: Layout
    factors: Any
    frozen: Any

    @classmethod
    def of(cls, model: GptOss, factors: Any, frozen: Any) -> Self | None:
        """Of a model and the nnx.States that it was split into; None: it has no layout, and lies on one device.

        Raises:
          ValueError: the model has a layout, and is not on a mesh.
        """
        if model.layout is None:
            return None
        sharding = model.stack.sinks.sharding
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            raise ValueError(f"a model with a layout must lie on a mesh, and its arrays are on {sharding}")
        return cls(sharding.mesh, model.layout, specs_of(factors), specs_of(frozen))

    @property
    def parts(self) -> int:
        """In how many parts a batch is split."""
        return self.layout.size(self.mesh, *self.layout.axes_of_batch)

    def of_optimizer(self, optimizer: optax.GradientTransformation, factors: Any) -> Any:
        """The PartitionSpec of each array of an optimizer's state: moments lie as their factors do."""
        state = jax.eval_shape(optimizer.init, factors)
        return optax.tree.map_params(
            optimizer,
            lambda _, spec: spec,
            state,
            self.factors,
            transform_non_params=lambda _: P(),
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )

    def batch_spec(self, dimensions: int) -> P:
        """The split of arrays [..., B, T] of so many dimensions along B."""
        return P(*[None] * (dimensions - 2), self.layout.axes_of_batch or None)

    def put(self, batch: Batch) -> Batch:
        """A batch whose arrays [..., B, T] are on the host, on the mesh: each process sends rows of its own devices.

        Raises:
          ValueError: B is no multiple of the parts.
        """
        check_batch_size(batch.tokens.shape[-2], self.layout, self.mesh)

        def send(array: np.ndarray) -> Array:
            sharding = NamedSharding(self.mesh, self.batch_spec(array.ndim))
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return Batch(*map(send, batch))  # type: ignore[arg-type]

    def whole[T](self, tree: T) -> T:
        """The arrays, each whole on every device; all processes take part."""
        return jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.mesh, P()))(tree)

    def sum_loss(self, loss: Callable[..., Float[Array, ""]]) -> Callable[..., Float[Array, ""]]:
        """loss(factors, frozen, batch) of all devices' sequences, of a function of a device's own."""

        def on_device(factors: Any, frozen: Any, batch: Batch) -> Array:
            return lax.psum(loss(factors, frozen, batch), self.layout.axes_of_batch)

        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(self.factors, self.frozen, self.batch_spec(2)),
            out_specs=P(),
            check_vma=False,
        )

    def sum_gradient(self, gradient: Callable[..., tuple[Array, Any]]) -> Callable[..., tuple[Array, Any]]:
        """(loss, gradient)(factors, frozen, batches, rest) of all devices' sequences, of a function of a device's own.

        What a device computes is of its own sequences until the end: losses and gradients are summed once, here.

        rest: a pytree that is whole on every device.
        """
        # Devices with the same sequences, as those along an axis of heads, sum the loss once for each of them.
        copies = self.mesh.size // self.parts
        axes = self.mesh.axis_names

        def on_device(factors: Any, frozen: Any, batches: Batch, rest: Any) -> tuple[Array, Any]:
            loss, total = gradient(factors, frozen, batches, rest)

            def add(spec: P, variable: Any) -> Any:
                over = tuple(name for name in axes if name not in names_of(spec))
                return jax.tree.map(lambda own: lax.psum(own / copies, over) if over else own / copies, variable)

            return lax.psum(loss / copies, axes), jax.tree.map(add, self.factors, total)

        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(self.factors, self.frozen, self.batch_spec(3), P()),
            out_specs=(P(), self.factors),
            check_vma=False,  # as the model is, whose sums are written out
        )


def specs_of(state: Any) -> Any:
    """The PartitionSpec of each variable, in its place."""
    return jax.tree.map(
        lambda variable: P(*variable.get_metadata("out_sharding", ())),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def check_batch_size(batch_size: int, layout: Layout, mesh: AnyMesh) -> None:
    """Raises ValueError unless devices can have as many sequences each."""
    parts = layout.size(mesh, *layout.axes_of_batch)
    if batch_size % parts:
        raise ValueError(
            f"batch_size counts the sequences of all devices and must be a multiple of {parts}, those along mesh "
            f"{' and '.join(layout.axes_of_batch)}, got {batch_size}"
        )
