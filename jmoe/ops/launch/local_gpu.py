"""The GPU of this machine or of a Target, and what of jmoe's kernels and launch parameters is for it."""

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple

import jax

from jmoe.ops.launch.installed import check_installed, import_jax_triton
from jmoe.ops.target import Target

if TYPE_CHECKING:
    from jmoe.triton_src.tiles import LaunchTable


class Gpu(NamedTuple):
    """What launches are planned for."""

    capability: int
    """Compute capability * 10."""
    table: "LaunchTable"
    """The launch parameters."""


@dataclasses.dataclass(frozen=True)
class Trial(Target):
    """A Target with launch parameters that are to be tried."""

    table: "LaunchTable | None" = None


def local_gpu() -> tuple[int, str]:
    """The compute capability (90 is 9.0) and the name of this machine's GPU.

    Raises:
      NotImplementedError: there is none, so that the target must be named.
    """
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        raise NotImplementedError(
            "lowering for CUDA on a machine without a GPU: "
            'name the GPU to compile for, as in backend=jmoe.Target("sm_90")'
        ) from None
    major, minor = device.compute_capability.split(".")
    return int(major) * 10 + int(minor), device.device_kind


@functools.cache
def gpu_of(target: Target | None) -> Gpu:
    """The GPU to plan for: the Target's, or else this machine's, with the launch parameters that its user measured.

    Looked up once in a process. A Target says which GPU, not whose: what is compiled for it is the same everywhere, and
    no user's tiles count.

    Raises:
      ImportError: Triton or jax-triton is missing.
      NotImplementedError: no Target is named, and there is no GPU here; or the GPU is older than the kernels support.
      ValueError: the user's table is invalid, or the Target's device has another architecture.
    """
    check_installed()
    from jmoe.triton_src.tile_tables import own_table, table_for

    if isinstance(target, Trial) and target.table is not None:
        return Gpu(target.capability, target.table)
    if target is not None:
        return Gpu(target.capability, own_table(target.capability, target.device))
    capability, device = local_gpu()
    return Gpu(capability, table_for(capability, device))


def has_cuda() -> bool:
    """Whether this process has an NVIDIA GPU. Without one, only a Target lowers anything for CUDA."""
    try:
        return bool(jax.local_devices(backend="cuda"))
    except RuntimeError:
        return False


def reads_packed_here() -> bool:
    """Whether JAX's default device has kernels that read packed experts, whatever the number of tokens.

    Raises:
      ImportError: it is a GPU, and Triton or jax-triton is missing.
    """
    if jax.default_backend() != "gpu":
        return False
    check_installed()
    from jmoe.triton_src.tile_tables import own_table
    from jmoe.triton_src.tiles import OLDEST, reads_packed

    capability, device = local_gpu()
    return capability >= OLDEST and reads_packed("packed_grouped_matmul", own_table(capability, device))


def why_no_triton() -> str | None:
    """Why backend "triton" cannot run on JAX's default device, or None if it can."""
    if jax.default_backend() != "gpu":
        return "JAX sees no GPU"
    try:
        check_installed()
        import_jax_triton()
        from jmoe.triton_src.tile_tables import own_table

        own_table(*local_gpu())
    except (ImportError, NotImplementedError) as error:
        return str(error)
    return None


def tiles_here() -> str:
    """Whose launch parameters are used on this machine's GPU, which Triton must be able to run on.

    Raises:
      ValueError: the user's table is invalid.
    """
    from jmoe.triton_src.tile_tables import origin_of, table_for

    table_for(*local_gpu())
    return origin_of(*local_gpu())


def kernel_of_experts_here(tokens: int, experts: int, top_k: int) -> str:
    """The kernel that MXFP4 experts as jmoe.gpt_oss.load lays them out take on this machine's GPU."""
    from jmoe.triton_src.moe import LAYERS
    from jmoe.triton_src.tiles import layer_tile, reads_packed

    table = gpu_of(None).table
    packed = reads_packed("packed_grouped_matmul", table)  # as reads_packed_here, by which load decides
    tile = layer_tile(table, tokens * top_k / experts, packed=packed)
    assert tile is not None
    return LAYERS[type(tile)].kernel
