"""Attention by FlashAttention-3, from the package dew-flash-attn-cu13: the one door to it.

The package asks JAX for the GPU while a program is traced, so it can be used only on the machine that runs the program.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

WIDEST = 256
"""Of heads that the kernels take."""

SEGMENTS = 32
"""Packed sequences that the rows of a batch may hold, a row, on average, if nothing else is said. The kernels' backward
pass starts blocks for each that there may be, and those of the others end at once."""


def available() -> str | None:
    """Why FlashAttention cannot run on this machine; None: it can."""
    try:
        import dew_flash_attn  # noqa: F401
    except ImportError:
        return 'it needs the package dew-flash-attn-cu13: pip install "jmoe[flash]"'
    except OSError as error:  # its libraries load CUDA's
        return f"the package dew-flash-attn-cu13 does not load: {error}"
    found = capabilities()
    if not found:
        return "it needs a Hopper GPU, and JAX sees no CUDA GPU"
    if any(capability != "9.0" for capability in found):
        return f"it needs Hopper GPUs, of compute capability 9.0, and JAX sees {', '.join(sorted(set(found)))}"
    return None


def capabilities() -> list[str]:
    """The compute capability of each GPU that JAX sees."""
    try:
        return [device.compute_capability for device in jax.local_devices(backend="cuda")]
    except RuntimeError:  # JAX has no CUDA here
        return []


def why_not(dtypes: Iterable[DTypeLike], width: int) -> str | None:
    """Why FlashAttention cannot run here on arrays of these dtypes, with heads so wide; None: it can."""
    if others := sorted({jnp.dtype(dtype).name for dtype in dtypes} - {"bfloat16"}):
        return f"it takes bfloat16 alone, got {', '.join(others)}"
    if width > WIDEST:
        return f"it takes heads of at most {WIDEST} wide, got {width}"
    return available()


def flash_attend(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T M D"],
    v: Float[Array, "B T M D"],
    sinks: Float[Array, " N"],
    *,
    window: int | None,
    segment_ids: Int32[Array, "B T"] | None = None,
    most_segments: int = SEGMENTS,
) -> Float[Array, "B T N D"]:
    """As jmoe.gpt_oss.attend, for segments that follow each other; NaN if there are more than most_segments a row."""
    import dew_flash_attn

    # Keys to the left and to the right of a query, without its own; -1 is all.
    sizes = (-1, -1) if window is None else (window - 1, 0)
    if segment_ids is None:
        return dew_flash_attn.flash_mha(q, k, v, is_causal=True, window_size=sizes, sinks=sinks)
    batch, length = segment_ids.shape
    # Every query reads a value, and there are fewer values than results.
    v = jnp.where(segments_a_row(segment_ids) <= most_segments, v, jnp.nan)
    packed = (array.reshape(batch * length, *array.shape[2:]) for array in (q, k, v))
    offsets = segment_offsets(segment_ids, most_segments)
    out = dew_flash_attn.flash_mha_varlen(*packed, offsets, length, is_causal=True, window_size=sizes, sinks=sinks)
    return out.reshape(q.shape)


def segment_offsets(segment_ids: Int32[Array, "B T"], most_segments: int) -> Int32[Array, " S"]:
    """Where each segment begins in the rows behind each other, then their length as often as segments are missing."""
    batch, length = segment_ids.shape
    begins = segment_begins(segment_ids).reshape(-1)
    room = batch * min(most_segments, length)
    offsets = jnp.nonzero(begins, size=room, fill_value=batch * length)[0]
    return jnp.append(offsets, batch * length).astype(jnp.int32)


def segments_a_row(segment_ids: Int32[Array | np.ndarray, "B T"]) -> Float[Array, ""] | np.floating:
    """How many segments rows have on average; of numpy's arrays it is known at once."""
    return 1 + (segment_ids[:, 1:] != segment_ids[:, :-1]).sum() / segment_ids.shape[0]  # type: ignore[no-any-return]


def segment_begins(segment_ids: Int32[Array, "B T"]) -> Bool[Array, "B T"]:
    """The first token of each segment; a row's first is one."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)], constant_values=True)
