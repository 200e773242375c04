"""The decode operations outside the experts as launches."""

from typing import Any

import jax

from jmoe.ops.launch.calls import launch
from jmoe.ops.launch.local_gpu import gpu_of
from jmoe.ops.target import Target


def launch_decode(
    operation: str, buffers: dict[str, jax.Array], target: Target | None, **sizes: Any
) -> dict[str, jax.Array]:
    """One of jmoe.triton_src.decode.plans's operations for a GPU, that of this machine if no other is named.

    Returns every buffer, given and written, by name. For the sizes see the operation's problem.

    Raises:
      ImportError, NotImplementedError, ValueError: as gpu_of.
    """
    gpu = gpu_of(target)
    from jmoe.triton_src.decode.plans import plan_decode

    return launch(plan_decode(operation, gpu.table, **sizes), buffers, gpu.capability)
