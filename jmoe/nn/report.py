"""What of a model is trained, tensor by tensor."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx


class Tensor(NamedTuple):
    """One array of a model."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    trainable: bool


class TrainableReport(NamedTuple):
    """Every tensor of a model, the trainable ones first. Printed, a table with totals."""

    tensors: tuple[Tensor, ...]

    @property
    def trainable_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors if tensor.trainable)

    @property
    def frozen_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors if not tensor.trainable)

    def __str__(self) -> str:
        lines = [
            f"{'trainable' if tensor.trainable else 'frozen':9}  {tensor.path:40}  {tensor.dtype:9}  "
            f"{tensor.bytes:15,}  {list(tensor.shape)}"
            for tensor in self.tensors
        ]
        totals = f"{self.trainable_bytes:,} bytes trainable, {self.frozen_bytes:,} bytes frozen"
        return "\n".join([*lines, totals])


def trainable_report(model: nnx.Module, wrt: Any = nnx.Param) -> TrainableReport:
    """Each tensor of the model and whether an optimizer with this `wrt` trains it.

    model: may be abstract, as from nnx.eval_shape.
    wrt: as nnx.Optimizer's: a type of variable, nnx.LoRAParam for example, or any nnx filter.

    Raises:
      ValueError: nothing is trainable.
    """
    is_trained = nnx.filterlib.to_predicate(wrt)
    tensors = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        trained = is_trained(path, variable)
        for inner, array in jax.tree_util.tree_leaves_with_path(variable.get_value()):
            name = "/".join(map(str, path)) + jax.tree_util.keystr(inner)
            array = array if hasattr(array, "shape") else np.asarray(array)  # a counter may be a plain number
            size = math.prod(array.shape) * array.dtype.itemsize  # an abstract model's arrays have no nbytes
            tensors.append(Tensor(name, array.shape, str(array.dtype), size, trained))
    if not any(tensor.trainable for tensor in tensors):
        raise ValueError(f"nothing of the model is trainable: none of its {len(tensors)} tensors is of {wrt}")
    return TrainableReport(tuple(sorted(tensors, key=lambda tensor: not tensor.trainable)))
