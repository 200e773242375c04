"""The GPU of this machine, and what of jmoe's kernels and tiles is for it."""

from typing import TYPE_CHECKING

import jax

from jmoe.ops.launch.installed import check_installed, import_jax_triton

if TYPE_CHECKING:
    from jmoe.triton_src.tiles import TileTables


def local_capability() -> int:
    """The compute capability of this machine's GPU (90 is 9.0).

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
    return int(major) * 10 + int(minor)


def has_cuda() -> bool:
    """Whether this process has an NVIDIA GPU. Without one, only a Target lowers anything for CUDA."""
    try:
        return bool(jax.local_devices(backend="cuda"))
    except RuntimeError:
        return False


def reads_packed_here() -> bool:
    """Whether JAX's default device has kernels that read packed experts.

    Raises:
      ImportError: it is a GPU, and Triton or jax-triton is not there.
    """
    if jax.default_backend() != "gpu":
        return False
    check_installed()
    from jmoe.triton_src.moe import reads_packed

    return reads_packed(local_capability())


def local_tables() -> "TileTables | None":
    """The tile tables that the user has measured for this machine's GPU with `jmoe tune`, if any.

    Raises:
      ValueError: the user's file is no such table.
    """
    from jmoe.triton_src.tile_tables import read_user_table

    return read_user_table(jax.local_devices(backend="cuda")[0].device_kind)


def why_no_triton() -> str | None:
    """Why backend "triton" cannot run on JAX's default device, or None if it can."""
    if jax.default_backend() != "gpu":
        return "JAX sees no GPU"
    try:
        check_installed()
        import_jax_triton()
        from jmoe.triton_src.tiles import tiles_of

        tiles_of(local_capability())
    except (ImportError, NotImplementedError) as error:
        return str(error)
    return None


def tiles_here() -> str:
    """Whose tile tables are used on this machine's GPU, which Triton must be able to run on."""
    from jmoe.triton_src.tile_tables import user_table
    from jmoe.triton_src.tiles import PACKED_TILES

    capability = local_capability()
    if local_tables() is not None:
        return f"the user's, {user_table(jax.local_devices(backend='cuda')[0].device_kind)}"
    if capability in PACKED_TILES:
        return f"jmoe's own for sm_{capability}"
    return f"jmoe's own, of which none was measured on sm_{capability}: run jmoe tune"


def kernel_of_experts_here(tokens: int, experts: int, top_k: int) -> str:
    """The kernel that MXFP4 experts as jmoe.gpt_oss.load lays them out take on this machine's GPU."""
    from jmoe.triton_src.moe import reads_packed
    from jmoe.triton_src.tiles import DecodeTile, choose_packed_tile

    capability = local_capability()
    if not reads_packed(capability):
        return "grouped_matmul"
    tile = choose_packed_tile(capability, tokens * top_k, experts, local_tables())
    return "packed_decode" if isinstance(tile, DecodeTile) else "packed_grouped_matmul"
