"""LoRA on dense products as launches."""

import jax

from jmoe.ops.launch.calls import launch
from jmoe.ops.launch.local_gpu import gpu_of
from jmoe.ops.target import Target


def launch_lora_by_row(buffers: dict[str, jax.Array], target: Target | None) -> jax.Array:
    """with_lora [T, N] of jmoe.triton_src.lora.by_row for a GPU, that of this machine if no other is named.

    Raises:
      ImportError, NotImplementedError, ValueError: as gpu_of.
    """
    gpu = gpu_of(target)
    from jmoe.triton_src.lora.by_row import LoraByRowProblem, plan_lora_by_row
    from jmoe.triton_src.tiles import tile_for

    (rows, k), n = buffers["x"].shape, buffers["product"].shape[1]
    _, adapters, rank, _ = buffers["a"].shape
    plans = plan_lora_by_row(LoraByRowProblem(rows, n, k, rank, adapters), tile_for(gpu.table.lora_by_row, rows))
    return launch(plans, buffers, gpu.capability)["with_lora"]
