"""Attention to pages as launches."""

from typing import Any

import jax

from jmoe.ops.launch.calls import launch
from jmoe.ops.launch.local_gpu import gpu_of
from jmoe.ops.target import Target


def launch_paged(operation: str, buffers: dict[str, jax.Array], target: Target | None, **sizes: Any) -> list[jax.Array]:
    """(attended, cache) of one of jmoe.triton_src.paged.plans's operations for a GPU, that of this machine if no other
    is named; buffers by the kernels' names, sizes of the operation's problem that do not follow from them.

    Raises:
      ImportError, NotImplementedError, ValueError: as gpu_of.
      NotImplementedError: pages of a size that no kernel takes.
    """
    gpu = gpu_of(target)
    from jmoe.triton_src.paged.plans import plan_paged

    sizes |= {"rows": buffers["heads"].shape[0], "heads": buffers["sinks"].shape[1]}
    plans = plan_paged(operation, gpu.table, buffers["cache"].shape, buffers["pages"].shape[1], **sizes)
    written = launch(plans, buffers, gpu.capability)
    return [written["attended"], written["cache"]]
