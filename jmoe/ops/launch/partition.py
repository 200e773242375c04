"""The layer's primitive on arrays that Auto axes of a mesh may split."""

import functools
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from jmoe.ops.batching import batch_launches
from jmoe.ops.call import Call, Kept, Options
from jmoe.ops.launch.layer import moe_p
from jmoe.ops.launch.local_gpu import gpu_of, has_cuda
from jmoe.ops.partition import partitioned


def bind_partitioned(*leaves: jax.Array, **params: Any) -> list[jax.Array]:
    """As moe_p.bind, with a rule for XLA's partitioner, under batch_launches' rule for vmap."""
    compute = custom_vmap(functools.partial(_bind, **params))

    @compute.def_vmap
    def batch(size: int, is_batched: list[bool], *leaves: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        dims = [0 if moves else None for moves in is_batched]
        results, _ = batch_launches(bind_partitioned, leaves, dims, **params)
        return results, [True] * len(results)

    return compute(*leaves)


def _bind(*leaves: jax.Array, tree: Any, results: tuple[str, ...], options: Options) -> list[jax.Array]:
    compute = functools.partial(_one_device, options)
    content = f"triton {options} {_of_this_machine(options)}"
    return partitioned(compute, content, results, *jax.tree.unflatten(tree, leaves))


def _of_this_machine(options: Options) -> str:
    """The GPU and the launch parameters that its user measured, which kernels are compiled by if no Target is named."""
    if options.target is not None or not has_cuda():
        return ""
    try:
        return str(gpu_of(None))
    except (ImportError, NotImplementedError, ValueError):
        return ""  # raised when it is lowered for CUDA, if it is


def _one_device(
    options: Options, results: tuple[str, ...], call: Call, kept: Kept | None, dy: jax.Array | None
) -> list[jax.Array]:
    leaves, tree = jax.tree.flatten((call, kept, dy))
    return moe_p.bind(*leaves, tree=tree, results=results, options=options)
